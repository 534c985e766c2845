"""Run the NxDI model in CPU mode, one process per rank over gloo, and bring rank 0's logits and
tokens back.

What NxDI has no CPU code for is supplied here, as test support: expert-parallel groups, and
building the quantized layers, which `to_cpu` never does.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One configuration: the directory to load, parallel degrees, dtype, and extra NeuronConfig
    fields.
    """

    directory: str
    tp_degree: int = 1
    moe_tp_degree: int = 1
    moe_ep_degree: int = 1
    dtype: str = "float32"
    through_load_module: bool = (
        False  # as a compile builds the model; the only way to quantized layers
    )
    options: dict[str, Any] = field(default_factory=dict)
    expert_kernel: str = "torch"
    expert_placement: str | None = None


def run(configuration: Run, output: Path, timeout: float = 300.0) -> dict[str, Any]:
    """{"tokens", "logits", "parameters", "routers"} of rank 0.

    Raises AssertionError with the output of a rank that failed.
    """
    import torch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "NXD_CPU_MODE": "1",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(configuration.tp_degree),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [
        sys.executable,
        "-m",
        "tests.neuron.ranks",
        json.dumps(asdict(configuration)),
        str(output),
    ]
    ranks = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(configuration.tp_degree)
    ]
    try:
        for rank in ranks:
            said, _ = rank.communicate(timeout=timeout)
            assert rank.returncode == 0, said[-6000:]
    finally:
        for rank in ranks:
            rank.kill()
    return torch.load(output, weights_only=True)


def gloo_expert_groups(moe_tp_degree: int, moe_ep_degree: int) -> None:
    """NxD makes these groups with XLA options; the same meshes in gloo, stored where NxD looks for
    them.
    """
    import torch.distributed as dist
    from neuronx_distributed.modules.moe import moe_process_group as groups
    from neuronx_distributed.parallel_layers import parallel_state

    meshes = parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=moe_tp_degree,
        expert_model_parallel_size=moe_ep_degree,
        mesh_only=True,
        lnc_size=1,
    )
    for kind, mesh in (("TENSOR", meshes.tp_groups), ("EXPERT", meshes.ep_model_groups)):
        made = {tuple(ranks): dist.new_group(ranks, backend="gloo") for ranks in mesh}
        mine = next(group for ranks, group in made.items() if dist.get_rank() in ranks)
        for stage in ("TKG", "CTE"):
            setattr(groups, f"_MOE_{stage}_{kind}_MODEL_PARALLEL_GROUP", mine)

    def place_in_mesh(rank: int, expert_parallel_group: Any) -> int:
        """As NxD's, which reads the mesh off an XLA group."""
        return next(ranks.index(rank) for ranks in meshes.ep_model_groups if rank in ranks)

    parallel_state.get_expert_parallel_rank_from_global_rank = place_in_mesh


def build(configuration: Run) -> Any:
    """The application with weights, as `to_cpu` leaves it."""
    import torch
    import torch.distributed as dist
    from neuronx_distributed.parallel_layers import parallel_state
    from neuronx_distributed.trace.trace import get_sharded_checkpoint

    from neuron_minimax.backends.nxdi import imports
    from neuron_minimax.backends.nxdi.config import MiniMaxM2InferenceConfig, read_config
    from neuron_minimax.backends.nxdi.model import NeuronMiniMaxM2ForCausalLM
    from neuron_minimax.backends.nxdi.options import MOE_SETTINGS, quantization_options
    from tests.neuron.cases import LENGTHS, SEQ_LEN

    options = {
        "on_cpu": True,
        "torch_dtype": getattr(torch, configuration.dtype),
        "attn_kernel_enabled": False,
        "logical_nc_config": 1,
        "enable_bucketing": False,
        "batch_size": len(LENGTHS),
        "seq_len": SEQ_LEN,
        "max_context_length": SEQ_LEN,
        "tp_degree": configuration.tp_degree,
        "moe_tp_degree": configuration.moe_tp_degree,
        "moe_ep_degree": configuration.moe_ep_degree,
        **MOE_SETTINGS,
        **quantization_options(configuration.directory),
        **configuration.options,
    }
    neuron_config = imports.MoENeuronConfig(**options)
    config = MiniMaxM2InferenceConfig(
        neuron_config,
        load_config=read_config(configuration.directory),
        expert_kernel=configuration.expert_kernel,
        expert_placement=configuration.expert_placement,
    )
    application = NeuronMiniMaxM2ForCausalLM(configuration.directory, config)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=configuration.tp_degree, skip_collective_init=True
    )
    if configuration.moe_ep_degree > 1:
        gloo_expert_groups(configuration.moe_tp_degree, configuration.moe_ep_degree)
    if configuration.through_load_module:
        parallel_state.set_aot_mode(True)
        instance = application.models[0].get_model_instance()
        instance.config = application.config
        instance.neuron_config = application.neuron_config
        instance.load_module()
        module = instance.module
        parallel_state.set_aot_mode(False)
    else:
        module = application.models[0].model_cls(application.config)
    state = application.checkpoint_loader_fn()
    get_sharded_checkpoint(state, module, dist.get_rank(), configuration.tp_degree)
    module.load_state_dict(state, strict=False)
    for wrapper in application.models:
        wrapper.model = module
    return application.eval()


def generate(application: Any) -> dict[str, Any]:
    """Greedy continuation of the four prompts as one right-padded batch."""
    import torch

    from tests.neuron.cases import LENGTHS, STEPS, prompts

    texts = prompts(application.config.vocab_size)
    longest = max(LENGTHS)
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = (torch.arange(longest) < lengths).long()
    positions = torch.where(mask.bool(), torch.arange(longest), 1)
    slots = torch.arange(len(texts))
    rows = []
    chosen = []
    with torch.no_grad():
        for step in range(STEPS + 1):
            answer = application(
                input_ids=ids, attention_mask=mask, position_ids=positions, seq_ids=slots
            )
            logits = answer.logits[:, -1, : application.config.vocab_size]
            rows.append(logits.float())
            chosen.append(logits.argmax(-1))
            ids = chosen[-1][:, None]
            positions = lengths + step
            mask = (torch.arange(int(positions.max())) < positions).long()
    module = application.models[0].model
    parameters = {
        name: (str(tensor.dtype), list(tensor.shape))
        for name, tensor in module.state_dict().items()
    }
    routers = {name: tensor for name, tensor in module.state_dict().items() if ".router." in name}
    return {
        "tokens": torch.stack(chosen, 1),
        "logits": torch.stack(rows, 1),
        "parameters": parameters,
        "routers": routers,
    }


def interpret_kernel() -> Any:
    """The NKI kernel's module, run by the NumPy interpreter; gives the machine that counts its
    instructions.
    """
    from tests import nki_interpreter

    name = "neuron_minimax.kernels.nki.expert_mlp"
    module, machine = nki_interpreter.load(ROOT / f"{name.replace('.', '/')}.py")
    sys.modules[name] = module
    vars(sys.modules["neuron_minimax.kernels.nki"])["expert_mlp"] = module
    return machine


def main() -> None:
    from tests.neuron import standins

    standins.install()
    import torch
    import torch.distributed as dist

    configuration = Run(**json.loads(sys.argv[1]))
    machine = interpret_kernel() if configuration.expert_kernel == "nki" else None
    result = generate(build(configuration))
    result["kernel_matmuls"] = machine.counts["nc_matmul"] if machine else 0
    if dist.get_rank() == 0:
        torch.save(result, sys.argv[2])
    dist.barrier()


if __name__ == "__main__":
    main()
