"""The dequantized cache against plain writing of the same bytes, in alternating rounds; memory; opening; transformers.

python -m benchmarks.cache [--directory DIR] [--rounds N] [--transformers]
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.conversion import CHILD, read_into_cache
from benchmarks.shared import checkpoint, empty_scratch, parser_of
from benchmarks.synthetic import real_layers
from neuron_minimax.checkpoint.fp32_cache import build_cache, open_cache
from neuron_minimax.checkpoint.reader import Checkpoint

BUILD = CHILD.replace("convert.run import convert", "checkpoint.fp32_cache import build_cache").replace(
    "convert(sys.argv[1], sys.argv[2])", "build_cache(*sys.argv[1:4])"
)
# Without a cache: load, dequantize and save, which has to happen once, or load and dequantize at every start.
PEER = """
import json, sys, time, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
start = time.perf_counter()
dtype = getattr(torch, sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).to(dtype)
loaded = time.perf_counter()
save_file(model.state_dict(), sys.argv[2])
print(json.dumps({"load": loaded - start, "save": time.perf_counter() - loaded}))
"""


def time_build(source: Path, target: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-c", BUILD, str(source), str(target), dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def time_plain_write(sizes: list[int], target: Path) -> float:
    """Seconds to write and sync files of these sizes from memory."""
    block = np.random.default_rng(0).integers(0, 256, 8 << 20, dtype=np.uint8)
    target.mkdir()
    start = time.perf_counter()
    for number, size in enumerate(sizes):
        with (target / str(number)).open("wb", buffering=0) as file:
            for position in range(0, size, block.size):
                file.write(block[: size - position].data)
            os.fsync(file.fileno())
    return time.perf_counter() - start


def measure(source: Path, scratch: Path, dtype: str, rounds: int) -> None:
    """Print one row: medians over alternating rounds."""
    target, seconds, plain, memory = scratch / "cache", [], [], []
    for _ in range(rounds):
        read_into_cache(source)
        built = time_build(source, target, dtype)
        sizes = [path.stat().st_size for path in target.glob("*.safetensors")]
        shutil.rmtree(target)
        plain.append(time_plain_write(sizes, target))
        shutil.rmtree(target)
        seconds.append(built["seconds"])
        memory.append(built["peak_anonymous_mb"])
    share = statistics.median(write / build for write, build in zip(plain, seconds, strict=True))
    numbers = (statistics.median(seconds), statistics.median(plain), 100 * share, sum(sizes) / 1e9, max(memory))
    print(f"{dtype:9}" + "".join(f"{number:12.2f}" for number in numbers))


def time_opening(source: Path, target: Path) -> float:
    """Seconds until every tensor of a finished float32 cache is a mapped torch tensor, checks included."""
    start = time.perf_counter()
    cache = open_cache(target, Checkpoint(source))
    assert sum(cache.tensor(name).numel() for name in cache.entries) > 0
    return time.perf_counter() - start


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transformers", action="store_true", help="also time transformers (14 GB of memory)")
    arguments = parser.parse_args()
    scratch = empty_scratch(arguments.directory)
    target = scratch / "cache"
    source = checkpoint(arguments.directory, "2-layers-64-experts", real_layers())
    print(f"{'':9}" + "".join(f"{name:>12}" for name in ("build s", "write s", "% of write", "GB", "anon MB")))
    for dtype in ("float32", "bfloat16"):
        measure(source, scratch, dtype, arguments.rounds)
    build_cache(source, target)
    print(f"opening the finished float32 cache: {time_opening(source, target):.2f} s")
    shutil.rmtree(target)
    if arguments.transformers:
        command = [sys.executable, "-c", PEER, str(source), str(target), "float32"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"transformers: load and dequantize {found['load']:.1f} s, save {found['save']:.1f} s")
        target.unlink()


if __name__ == "__main__":
    main()
