"""Groups of gloo processes that play vLLM-Neuron's runner; test_vllm_contract starts them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from neuron_minimax.backends.torch_neuron.vllm_plugin import (
    ConvertedForCausalLM,
    OnDeviceSampling,
    RankConfig,
)
from neuron_minimax.backends.torch_neuron.weights import shard_of
from neuron_minimax.config import ModelConfig
from tests.vllm_neuron_runner import MixedPool, Request, Runner, serve

SAMPLED = "sampled"
# Degrees of tensor and of expert parallelism; as many processes as the first.
RUN = [
    ("MiniMax-M2 in FP8", (2, 1)),
    ("MiniMax-M2 in BF16", (2, 2)),
    ("Qwen3-MoE in FP8", (2, 2)),
    ("Qwen3-MoE of 7 experts", (2, 2)),
    ("MiniMax-M2 of 6 experts", (4, 4)),
]
WORLDS = (2, 4)
SAMPLING_WORLD = 2


@contextmanager
def group_without_others(rank: int, world: int) -> Iterator[str]:
    """The name of a group of which this process is the only one."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield dist.group.WORLD.group_name
    finally:
        dist.destroy_process_group()


def loaded(
    directory: Path,
    rank: int = 0,
    tp_degree: int = 1,
    ep_degree: int = 1,
    group: str = "",
    **options: Any,
) -> ConvertedForCausalLM:
    """A model with its weights, made as the runner makes it."""
    config = ModelConfig.from_dir(directory)
    with torch.device("meta"):
        shard = shard_of(config, rank, tp_degree, ep_degree, group)
        model = ConvertedForCausalLM(RankConfig(shard=shard, compute=torch.float32, **options))
    model.load_weights(str(directory), torch.device("cpu"), None)
    return model.to("cpu")


def main(world: int, rank: int, out: Path, directories: list[str]) -> None:
    store = f"file://{out / f'store_{world}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    group = dist.group.WORLD.group_name
    served: dict[str, list[Request]] = {}
    for (name, degrees), directory in zip(RUN, directories, strict=True):
        if degrees[0] != world:
            continue
        model = loaded(Path(directory), rank, *degrees, group)
        served[f"{name} {degrees}"] = serve(Runner(model, model, MixedPool(), rank=rank))
    if world == SAMPLING_WORLD:
        options = {"sampling": OnDeviceSampling(max_top_k=20), "returns_logits": True}
        model = loaded(Path(directories[0]), rank, *RUN[0][1], group, **options)
        torch.manual_seed(rank)  # ranks draw each for itself
        params = torch.tensor([[10.0, 0.9, 1.0]])
        sampler = Runner(model, model, MixedPool(), lambda rows: params.expand(rows, 3), rank)
        served[SAMPLED] = serve(sampler)
    torch.save(served, out / f"{world}_{rank}.pt")
    dist.destroy_process_group()


def start(out: Path, directories: list[str]) -> int:
    """Run every rank of every group, each in a process of its own; they share what is imported."""
    started = []
    for world in WORLDS:
        for rank in range(world):
            process = os.fork()
            if process == 0:
                main(world, rank, out, directories)
                return 0
            started.append(process)
    return max(os.waitpid(process, 0)[1] for process in started)


if __name__ == "__main__":
    sys.exit(min(start(Path(sys.argv[1]), sys.argv[2:]), 1))
