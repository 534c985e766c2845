"""One layer of MiniMax-M2's published sizes divided over gloo ranks, beside the same on one.

python -m benchmarks.rank_layer [--experts N] [--directory DIR]

One line per group: the largest difference of a logit in float32 from the undivided model, and the
bytes that its first rank read.
"""

import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.shared import converted, parser_of
from benchmarks.synthetic import real_layers
from neuron_minimax.backends.torch_neuron.weights import load_rank, shard_of
from neuron_minimax.config import ModelConfig
from neuron_minimax.model.decoder import Decoder

WORLD = 4
VOCABULARY = 4096
GROUPS = ((2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
TOKENS = 6


def layer_of(directory: Path, config_json: dict[str, Any]) -> Path:
    """Return the converted layer of a config.json, made once for each number of experts."""
    name = f"1-layer-{config_json['num_local_experts']}-experts"
    return converted(directory, name, config_json)


@torch.no_grad()
def run(rank: int, layer: Path, store: str) -> None:
    """Be one rank of every group; the first prints."""
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(list(range(size))) for size in (2, 4)}
    config = ModelConfig.from_dir(layer)
    ids = torch.arange(TOKENS)[None]
    wanted = Decoder.from_converted(layer)(ids)[0] if rank == 0 else torch.zeros(())
    for tp_degree, ep_degree in GROUPS:
        if rank < tp_degree:
            name = groups[tp_degree].group_name
            loaded = load_rank(layer, shard_of(config, rank, tp_degree, ep_degree, name))
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
    layer = layer_of(options.directory, real_layers(1, options.experts, VOCABULARY))
    with tempfile.TemporaryDirectory() as scratch:
        store = f"file://{scratch}/store"
        fork = multiprocessing.get_context("fork")  # they share what is imported
        ranks = [fork.Process(target=run, args=(rank, layer, store)) for rank in range(WORLD)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    return int(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    sys.exit(main())
