"""`inspect --check-values` against `cat` of the same files, warm and cold, in alternating pairs; and the headers alone.

python -m benchmarks.inspection [--directory DIR] [--checkpoint CKPT] [--rounds N]
"""

import shutil
import statistics
import subprocess
import time
from pathlib import Path

from benchmarks.conversion import drop_from_cache, read_into_cache
from benchmarks.shared import checkpoint, empty_scratch, parser_of
from benchmarks.synthetic import real_layers
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
    parser = parser_of(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="check this one instead of the seeded one of 2.1 GB")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    source = arguments.checkpoint or checkpoint(arguments.directory, "2-layers-64-experts", real_layers())
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
    full = write_sparse(empty_scratch(arguments.directory) / "full_size")
    start = time.perf_counter()
    report = inspect(full)
    print(f"headers of {report.bytes / 1e9:.0f} GB, {report.tensors:,} tensors: {time.perf_counter() - start:.2f} s")
    shutil.rmtree(full)


if __name__ == "__main__":
    main()
