"""A process of vLLM's tensor-parallel group, in which vLLM reads config.json, finds the model in
its registry, gives blocks and samples; test_vllm starts it in an environment with vLLM.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.models import ModelRegistry
from vllm.plugins import load_general_plugins
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm_neuron.model.neuron_config import NeuronConfig, OnDeviceSamplingConfig
from vllm_neuron.parallel import neuron_parallel_state

from tests.vllm_neuron_runner import BLOCK_SIZE, POOL, Request, Runner, serve

GREEDY = OnDeviceSamplingConfig(all_greedy=True)


class VllmPool:
    """vLLM's own pool, which keeps block 0 for itself."""

    def __init__(self) -> None:
        self.pool = BlockPool(POOL, enable_caching=False, hash_block_size=BLOCK_SIZE)

    def take(self, count: int) -> list[int]:
        return [block.block_id for block in self.pool.get_new_blocks(count)]

    def give_back(self, blocks: Sequence[int]) -> None:
        self.pool.free_blocks([self.pool.blocks[block] for block in blocks])


def metadata(rows: int) -> SamplingMetadata:
    """Greedy sampling of so many sequences."""
    none = torch.zeros(rows)
    return SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none + 1,
        output_token_ids=[[] for _ in range(rows)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


class SampledOnHost(Runner):
    """Has vLLM's sampler choose tokens of the logits."""

    def _read(self, result: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = Sampler()(result.clone(), metadata(len(result)))
        return result, output.sampled_token_ids[:, 0]


def run(directory: str, ep_degree: int, rank: int) -> list[Request]:
    """Serve the requests by a directory, with logits and with tokens from the device."""
    neuron_parallel_state.ep_degree = ep_degree
    overrides = {"quantization_config": {}, "dtype": "float32"}
    config = ModelConfig(model=directory, skip_tokenizer_init=True, hf_overrides=overrides)
    model_class, _ = ModelRegistry.resolve_model_cls(config.architectures, config)
    served = []
    for sampling in (None, GREEDY):
        settings = NeuronConfig(on_device_sampling_config=sampling, max_logprobs=1)
        with torch.device("meta"):
            model = model_class.from_configs(config.hf_config, settings)
        model.load_weights(config.model, torch.device("cpu"), None)
        for layer in model.get_kv_spec().layers:
            spec = FullAttentionSpec(
                block_size=BLOCK_SIZE,
                num_kv_heads=layer.num_kv_heads,
                head_size=layer.head_size,
                dtype=layer.dtype,
            )
            keys_and_values = 2 * BLOCK_SIZE * layer.num_kv_heads * layer.head_size * 4
            assert spec.page_size_bytes == keys_and_values
        if sampling is None:
            served += serve(SampledOnHost(model, model, VllmPool(), rank=rank))
        else:
            served += serve(
                Runner(model, model, VllmPool(), lambda rows: torch.ones(rows, 3), rank)
            )
    return served


def main(out: Path, rank: int, world: int, ep_degree: int, directories: list[str]) -> None:
    load_general_plugins()
    os.environ["VLLM_DIST_IDENT"] = str(os.getppid())  # as vLLM's executor on CPUs sets it
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            world, rank, f"file://{out / 'store'}", rank, backend="gloo"
        )
        parallel_state.initialize_model_parallel(world, backend="gloo")
        served = [run(directory, ep_degree, rank) for directory in directories]
    torch.save(served, out / f"{rank}.pt")
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5:])
