"""Four gloo processes that run the models of cases in groups of 1, 2 and 4; test_shards starts
them.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from neuron_minimax.backends.torch_neuron.graphs import (
    BlockStep,
    ContextEncoding,
    TokenGeneration,
    block_cache,
    slot_cache,
)
from neuron_minimax.backends.torch_neuron.weights import load_rank, shard_of
from neuron_minimax.config import ModelConfig
from neuron_minimax.model.decoder import Decoder

WORLD = 4
PROMPT = 5
STEPS = 6
CUT = 2
PIECES = [9, 3, 1, 1]


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
    return {
        "logits": logits,
        "tokens": greedy(model),
        "block_logits": in_blocks(model),
        "bytes_read": loaded.bytes_read,
        "bytes_held": sum(tensor.nbytes for tensor in model.state_dict().values()),
    }


def greedy(model: Decoder) -> list[int]:
    """Tokens by the graphs over slots, in the second of two; the first is not active."""
    cache = slot_cache(model, 2, 32)
    encoding = ContextEncoding(model, cache)
    generation = TokenGeneration(model, cache)
    ids = torch.nn.functional.pad(some_ids()[0, :PROMPT], (0, 8 - PROMPT))
    logits, _ = encoding(ids, torch.tensor([1]), torch.tensor([0]), torch.tensor([PROMPT]))
    tokens = [int(logits.argmax())]
    active = torch.tensor([False, True])
    for position in range(PROMPT, PROMPT + STEPS - 1):
        step = (torch.tensor([0, tokens[-1]]), torch.tensor([0, position]), active)
        tokens.append(int(generation(*step)[1].argmax()))
    return tokens


def in_blocks(model: Decoder) -> torch.Tensor:
    """Logits of the last token of two sequences over blocks of four positions that lie mixed, the
    second shorter by CUT; the tokens come in pieces of PIECES.
    """
    graph = BlockStep(model, block_cache(model, 10, 4))
    tables = torch.tensor([[5, 2, 9, 1], [3, 8, 4, 7]])
    ids = some_ids()
    count = ids.shape[1]
    lengths = torch.tensor([[count], [count - CUT]])
    logits = torch.zeros(2, model.config.vocab_size)
    for tokens in torch.arange(count).split(PIECES):
        positions = tokens.expand(2, -1)
        slots = tables.gather(1, positions // 4) * 4 + positions % 4
        slots = torch.where(positions < lengths, slots, -1)
        last = torch.tensor([len(tokens) - 1] * 2)
        found = graph(ids[:, tokens], positions, tables, slots, last)
        ended = (lengths - 1 == tokens[-1]).flatten()
        logits[ended] = found[ended]
    return logits


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


def start(directory: Path) -> int:
    """Run every rank in a process of its own; they share what is imported. 0 when all end well."""
    started = []
    for rank in range(WORLD):
        process = os.fork()
        if process == 0:
            main(rank, directory)
            return 0
        started.append(process)
    return max(os.waitpid(process, 0)[1] for process in started)


if __name__ == "__main__":
    sys.exit(min(start(Path(sys.argv[1])), 1))
