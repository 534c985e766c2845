"""One layer of MiniMax-M2's published sizes divided over gloo ranks, beside the same on one.

python -m benchmarks.rank_layer [--experts N] [--directory DIR]

One line per group: the largest difference of a logit in float32 from the undivided model, and the
bytes that its first rank read.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.shared import parser_of
from benchmarks.synthetic import real_layers, write_synthetic
from neuron_minimax.backends.torch_neuron.weights import load_rank, shard_of
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.model.decoder import Decoder

WORLD = 4
GROUPS = ((2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
TOKENS = 6


@torch.no_grad()
def run(rank: int, directory: Path) -> None:
    """Be one rank of every group; the first prints."""
    converted = directory / "converted"
    store = f"file://{directory / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(list(range(size))) for size in (2, 4)}
    config = ModelConfig.from_dir(converted)
    ids = torch.arange(TOKENS)[None]
    wanted = Decoder.from_converted(converted)(ids)[0] if rank == 0 else torch.zeros(())
    for tp_degree, ep_degree in GROUPS:
        if rank < tp_degree:
            name = groups[tp_degree].group_name
            loaded = load_rank(converted, shard_of(config, rank, tp_degree, ep_degree, name))
            logits, _ = loaded.model(ids)
            if rank == 0:
                difference = float((logits - wanted).abs().max())
                print(
                    f"tp {tp_degree}, ep {ep_degree}: {difference:.1e} of logits of size "
                    f"{float(wanted.abs().max()):.1f}; {loaded.bytes_read:,} bytes read",
                    flush=True,
                )
    dist.barrier()
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--experts", type=int, default=32)
    options = parser.parse_args(arguments)
    directory = options.directory / "rank_layer"
    layer = real_layers(1, options.experts, 4096)
    checkpoint = Checkpoint(write_synthetic(directory / "published", layer))
    plan_conversion(checkpoint).write(directory / "converted")
    (directory / "store").unlink(missing_ok=True)
    started = []
    for rank in range(WORLD):
        process = os.fork()
        if process == 0:
            run(rank, directory)
            return 0
        started.append(process)
    return max(min(os.waitpid(process, 0)[1], 1) for process in started)


if __name__ == "__main__":
    sys.exit(main())
