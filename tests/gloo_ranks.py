"""One rank of gloo processes that run the model of cases in groups of 1, 2 and 4; test_shards
starts them.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from neuron_minimax.backends.torch_neuron.weights import load_rank, shard_of
from neuron_minimax.config import ModelConfig

WORLD = 4
PROMPT = 5
STEPS = 8


def some_ids() -> torch.Tensor:
    return torch.randint(0, 160, (2, 14), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def run(directory: Path, tp_degree: int, ep_degree: int, group: dist.ProcessGroup) -> dict:
    """What one rank of a group sees: logits, greedy tokens, bytes read."""
    config = ModelConfig.from_dir(directory)
    shard = shard_of(config, dist.get_rank(), tp_degree, ep_degree, group.group_name)
    loaded = load_rank(directory, shard)
    model = loaded.model
    logits, _ = model(some_ids())
    found, cache = model(some_ids()[:1, :PROMPT], use_cache=True)
    tokens: list[int] = []
    for _ in range(STEPS):
        tokens.append(int(found[0, -1].argmax()))
        found, cache = model(torch.tensor([tokens[-1:]]), cache)
    return {
        "logits": logits.clone(),
        "tokens": tokens,
        "bytes_read": loaded.bytes_read,
        "bytes_held": sum(tensor.nbytes for tensor in model.state_dict().values()),
    }


def main(rank: int, directory: Path) -> None:
    store = f"file://{directory / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 4)}
    results = {}
    for name, degrees in json.loads((directory / "cases.json").read_text()).items():
        for tp_degree, ep_degree in degrees:
            if rank < tp_degree:
                key = f"{name} {tp_degree} {ep_degree}"
                converted = directory / name
                results[key] = run(converted, tp_degree, ep_degree, groups[tp_degree])
    torch.save(results, directory / f"rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
