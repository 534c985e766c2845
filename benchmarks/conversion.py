"""Conversion against `cp -r` and sync of the same files, warm and cold, in alternating pairs; peak anonymous memory.

python -m benchmarks.conversion [--directory DIR] [--rounds N] [--full-layer]
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.shared import checkpoint, empty_scratch, parser_of
from benchmarks.synthetic import real_layers

# Runs the conversion after its imports, watching its own anonymous memory.
CHILD = """
import json, sys, threading, time
from neuron_minimax.convert.run import convert
peak, stop = 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.01):
        lines = open("/proc/self/status").read().splitlines()
        peak = max(peak, next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
thread = threading.Thread(target=watch, daemon=True)
thread.start()
start = time.perf_counter()
convert(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - start
stop.set()
thread.join()
print(json.dumps({"seconds": seconds, "peak_anonymous_mb": peak / 1024}))
"""


def drop_from_cache(directory: Path) -> None:
    """Push a directory's files out of the page cache."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_cache(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def time_copy(source: Path, destination: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
    for path in destination.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def time_conversion(source: Path, destination: Path) -> tuple[float, float]:
    command = [sys.executable, "-c", CHILD, str(source), str(destination)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found["seconds"], found["peak_anonymous_mb"]


def measure(source: Path, scratch: Path, rounds: int) -> None:
    """Print one row per state of the cache: medians over alternating pairs."""
    gigabytes = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e9
    print(f"{source.name}: {gigabytes:.2f} GB")
    print(f"{'':6}{'convert s':>10}{'cp+sync s':>10}{'ratio':>7}{'GB/s':>7}{'anon MB':>9}")
    for state, prepare in (("warm", read_into_cache), ("cold", drop_from_cache)):
        pairs = []
        for _ in range(rounds):
            row = []
            for run in (time_conversion, time_copy):
                prepare(source)
                row.append(run(source, scratch / "out"))
                shutil.rmtree(scratch / "out")
            pairs.append((row[0][0], row[1], row[0][1]))
        ours, peer, memory = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(pair[0] / pair[1] for pair in pairs)
        print(f"{state:6}{ours:10.2f}{peer:10.2f}{ratio:7.2f}{gigabytes / ours:7.2f}{memory:9.0f}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full-layer", action="store_true", help="also one layer of 256 experts, 3.7 GB")
    arguments = parser.parse_args()
    cases = [("2-layers-64-experts", real_layers())]
    if arguments.full_layer:
        cases.append(("1-layer-256-experts", real_layers(layers=1, experts=256)))
    for name, config in cases:
        source = checkpoint(arguments.directory, name, config)
        measure(source, empty_scratch(arguments.directory), arguments.rounds)


if __name__ == "__main__":
    main()
