"""`inspect --check-values` against `cat` of the same files, warm and cold, in alternating pairs; and the headers alone.

python -m benchmarks.inspection [--directory DIR] [--rounds N]
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.conversion import drop_from_cache, read_into_cache
from benchmarks.synthetic import real_layers, write_synthetic
from neuron_minimax.checkpoint.precision import inspect
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.values import check_values
from tests.full_size import write_sparse


def time_values(source: Path) -> float:
    start = time.perf_counter()
    check_values(Checkpoint(source))
    return time.perf_counter() - start


def time_cat(source: Path) -> float:
    start = time.perf_counter()
    with open("/dev/null", "wb") as nowhere:
        subprocess.run(["cat", *sorted(source.glob("*.safetensors"))], check=True, stdout=nowhere)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--directory", type=Path, help="a checkpoint, or where to make the 2 GB one (default: temporary)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = arguments.directory or Path(scratch) / "real_layers"
        if not (source / "config.json").exists():
            write_synthetic(source, real_layers())
        gigabytes = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e9
        print(f"{source.name}: {gigabytes:.2f} GB")
        print(f"{'':6}{'values s':>10}{'cat s':>8}{'GB/s':>7}{'of cat':>8}")
        for state, prepare in (("warm", read_into_cache), ("cold", drop_from_cache)):
            pairs = []
            for _ in range(arguments.rounds):
                row = []
                for run in (time_values, time_cat):
                    prepare(source)
                    row.append(run(source))
                pairs.append(row)
            values, cat = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(f"{state:6}{values:10.2f}{cat:8.2f}{gigabytes / values:7.2f}{cat / values:8.2f}")
        full = write_sparse(Path(scratch) / "full_size")
        start = time.perf_counter()
        report = inspect(full)
        print(
            f"headers of {report.bytes / 1e9:.0f} GB, {report.tensors:,} tensors: {time.perf_counter() - start:.2f} s"
        )


if __name__ == "__main__":
    main()
