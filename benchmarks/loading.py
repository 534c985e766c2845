"""Loading a compiled model of 2.0 GB: time to the first token, memory, and compile times.

python -m benchmarks.loading [--directory DIR] [--rounds N] [--transformers]
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.decoding import BUCKETS, SEQ_LEN, compile_single
from benchmarks.files import read_into_cache, shards_bytes
from benchmarks.processes import run_apart
from benchmarks.shared import REAL, checkpoint, converted, parser_of
from benchmarks.sides import prompt_ids
from benchmarks.table import Goal, Row, render, row

PROMPT = 16
TWO_SECONDS = Goal(figure="ours", value=2, at_most=True)
ONE_SECOND = Goal(figure="ours", value=1, at_most=True)


def first_token(traced: str, started: str) -> dict[str, float]:
    """Return seconds since `started` (time.time() before the process), and bytes of memory."""
    began = time.time() - float(started)
    import torch

    from benchmarks.processes import memory
    from neuron_minimax.backends import load

    imported = time.time() - float(started)
    before = memory()
    backend = load(traced)
    loaded = time.time() - float(started)
    token = torch.tensor(
        [backend.encode(0, prompt_ids(backend.capabilities.vocab_size, PROMPT)).argmax()]
    )
    encoded = time.time() - float(started)
    after = memory()
    backend.step(token, torch.tensor([PROMPT]), torch.tensor([True]))
    return {
        "python": began,
        "imported": imported,
        "loaded": loaded,
        "first": encoded,
        "second": time.time() - float(started),
        "added": after["RssAnon"] - before["RssAnon"],
        "mapped": after["RssFile"] - before["RssFile"],
    }


def start_process(traced: Path) -> dict[str, float]:
    program = (
        "import json, sys; from benchmarks.loading import first_token; "
        "print(json.dumps(first_token(*sys.argv[1:])))"
    )
    command = [sys.executable, "-c", program, str(traced), str(time.time())]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def time_transformers(source: Path) -> float:
    """Return the seconds of from_pretrained (FP8 to bfloat16) and of the first token."""
    import torch
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.inference_mode():
        model(torch.tensor([prompt_ids(model.config.vocab_size, PROMPT)]))
    return time.perf_counter() - start


def time_compile_again(converted_directory: Path, traced: Path) -> float:
    """Return the seconds of the whole command when there is nothing to do."""
    command = [
        sys.executable,
        "-m",
        "neuron_minimax",
        "compile",
        str(converted_directory),
        str(traced),
    ]
    command += ["--batch-size", "1", "--seq-len", str(SEQ_LEN)]
    command += [argument for bucket in BUCKETS for argument in ("--buckets", str(bucket))]
    start = time.perf_counter()
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - start
    if "up to date" not in said:
        raise RuntimeError(f"{traced} was compiled again although nothing has changed: {said}")
    return seconds


def load_rows(found: list[dict[str, float]], stored: int, peer: list[float] | None) -> list[Row]:
    def seconds(key: str, since: str = "") -> list[float]:
        return [each[key] - (each[since] if since else 0) for each in found]

    def timed(
        what: str, values: list[float], goal: Goal | None = None, against: bool = False
    ) -> Row:
        other = ("transformers bfloat16", peer) if against and peer else None
        return row(what, values, "s", less_is_better=True, peer=other, goal=goal)

    # A second copy of the weights would add all that is stored; 15 % are left for the cache and the
    # loader.
    little = Goal(figure="ours", value=0.15 * stored / 1e6, at_most=True)
    return [
        timed("load", seconds("loaded", "imported")),
        timed(
            f"load and first token behind {PROMPT}", seconds("first", "imported"), TWO_SECONDS, True
        ),
        timed(
            "load and first token, from process start, imports too", seconds("first"), TWO_SECONDS
        ),
        timed("second token", seconds("second", "first")),
        row(
            "anonymous memory added by load and first token",
            [each["added"] / 1e6 for each in found],
            "MB",
            less_is_better=True,
            peer=("stored weights", [stored / 1e6]),
            goal=little,
        ),
        row("mapped memory of the same", [each["mapped"] / 1e6 for each in found], "MB"),
    ]


def rows(directory: Path, rounds: int = 3, transformers: bool = True) -> list[Row]:
    from neuron_minimax.backends.directory import read_manifest

    traced = compile_single(directory)
    source = converted(directory, *REAL)
    read_into_cache(source)
    found = [start_process(traced) for _ in range(1 + rounds)][1:]  # the first one warms up
    peer = [run_apart(time_transformers, checkpoint(directory, *REAL))] if transformers else None
    again = [time_compile_again(source, traced) for _ in range(rounds)]
    graphs = read_manifest(traced).graphs
    return [
        *load_rows(found, shards_bytes(source), peer),
        row(
            "compile again, unchanged, whole command",
            again,
            "s",
            less_is_better=True,
            goal=ONE_SECOND,
        ),
        *(
            row(f"compile {name}", [graph.seconds], "s", less_is_better=True)
            for name, graph in graphs.items()
            if name.endswith(".so")  # kernels come from the cache, once any model is compiled
        ),
    ]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--transformers", action="store_true", help="also time transformers (9 GB of memory)"
    )
    arguments = parser.parse_args()
    print(render(rows(arguments.directory, arguments.rounds, arguments.transformers)))


if __name__ == "__main__":
    main()
