"""Every benchmark in one table.

python -m benchmarks [--directory DIR] [MODULE ...]

With all modules it writes benchmarks/results/last.json and last.md. Exit code 1 when one failed.
"""

import sys
from functools import partial

from benchmarks.machine import this_machine
from benchmarks.shared import parser_of
from benchmarks.suite import RESULTS, Benchmark, Table, collect

BENCHMARKS = (
    Benchmark(module="conversion", options={"rounds": 2, "full_layer": False}),
    Benchmark(module="inspection", options={"rounds": 2}),
    Benchmark(module="cache", options={"rounds": 2, "bfloat16": False}),
    Benchmark(module="loading", options={"rounds": 2}),
    Benchmark(module="decoding", options={"rounds": 2}),
    Benchmark(module="rounding", options={}),
    Benchmark(module="llama", options={"rounds": 2}),
    Benchmark(module="length", options={"rounds": 2}),
    Benchmark(module="serving", options={"rounds": 2}),
    Benchmark(module="prefixes", options={"rounds": 2}),
    Benchmark(module="speculation", options={"rounds": 5}),
    Benchmark(module="attacks", options={"seconds": 3}),
    Benchmark(module="training", options={"rounds": 1}),
    Benchmark(module="scaling", options={"full": False}),
    Benchmark(module="kernel_model", options={}),
)


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help="only these; then nothing is written"
    )
    arguments = parser.parse_args(argv)
    known = [benchmark.module for benchmark in BENCHMARKS]
    if unknown := sorted(set(arguments.modules) - set(known)):
        parser.error(f"there is no benchmark {unknown[0]}; expected one of {', '.join(known)}")
    wanted = [
        each for each in BENCHMARKS if not arguments.modules or each.module in arguments.modules
    ]
    machine = this_machine()
    rows, seconds = collect(
        [(each.module, partial(each.rows, arguments.directory)) for each in wanted],
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    table = Table(rows=tuple(rows), machine=machine, seconds=seconds)
    print(table.render())
    if not arguments.modules:
        table.write(RESULTS, "last")
    return 1 if any(row.failure for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
