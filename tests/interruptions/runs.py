"""The commands that are disturbed, their small inputs, and what a directory holds when they are
done.
"""

import hashlib
import json
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import neuron_minimax as nm
from neuron_minimax import cli
from neuron_minimax.checkpoint import streaming
from neuron_minimax.cli.ending import exit_code
from neuron_minimax.studies.experts.trace import Trace
from tests.tiny import write_tiny
from tests.tiny_tokenizer import write_tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
    "num_hidden_layers": 1,
    "vocab_size": 384,
}
# Nanoseconds since 1970 are larger; nothing else in a manifest is.
LARGEST_NUMBER = 10**18
# And a manifest's digest of itself, which covers them.
DURATIONS = ("seconds", "compile_seconds", "tokens_per_second", "digest")


@dataclass(frozen=True)
class Run:
    """A command, and the commands before it that make what it finds.

    `{inputs}` and `{work}` stand for directories; what is below `work` is watched. Of all cases
    every n-th is taken.
    """

    title: str
    arguments: str
    before: tuple[str, ...] = ()
    exists: bool = True  # whether the output directory is there before
    every: int = 1
    starts_processes: bool = False


EAGER = "compile {inputs}/converted {work}/out --engine eager --buckets 16"
EXPORTED = "compile {inputs}/converted {work}/out --engine exported --buckets 16 --seq-len 64"
RUNS = (
    Run("convert", "convert {inputs}/checkpoint {work}/out", exists=False),
    Run(
        "convert --overwrite",
        "convert {inputs}/checkpoint {work}/out --overwrite",
        ("convert {inputs}/other {work}/out",),
    ),
    Run(
        "convert in processes",
        "in-processes convert {inputs}/checkpoint {work}/out",
        exists=False,
        starts_processes=True,
    ),
    Run("cache", "cache {inputs}/checkpoint {work}/out"),
    Run(
        "cache --overwrite",
        "cache {inputs}/checkpoint {work}/out --overwrite",
        ("cache {inputs}/other {work}/out --dtype bf16",),
    ),
    Run("compile", EAGER + " --seq-len 64"),
    Run("compile again", EAGER + " --seq-len 64", (EAGER + " --seq-len 32",)),
    Run(
        "compile --copy-weights",
        EAGER + " --seq-len 64 --copy-weights",
        (EAGER + " --seq-len 32",),
    ),
    Run("compile exported", EXPORTED, exists=False, every=23, starts_processes=True),
    Run(
        "train",
        "train {work}/out --config {inputs}/checkpoint --tokenizer {inputs}/checkpoint "
        "--data {inputs}/rows.jsonl --steps 4 --save-every 2 --batch-size 2 --max-tokens 64",
        exists=False,
    ),
    Run("experts without plots", "analyse {inputs}/trace.safetensors {work}/out"),
    Run(
        "experts",
        "experts --trace {inputs}/trace.safetensors --output {work}/out",
        exists=False,
        every=23,
    ),
)
# One that does everything wrong, to see that it is found: by all its cases, also in a sample.
CARELESS = Run("careless", "careless {work}/out")


def execute(words: Sequence[str]) -> int:
    """Run a command in this process; return its exit code."""
    ours = {"analyse": analyse, "careless": careless}
    if words[0] == "in-processes":  # as a checkpoint of some size is streamed
        streaming.PARALLEL_FROM = 0
        return cli.main(words[1:])
    if words[0] in ours:
        return exit_code(lambda: ours[words[0]](*words[1:]))
    return cli.main(words)


def analyse(trace: str, output: str) -> int:
    """Do what the command `experts` does, without the plots, which take seconds."""
    request = nm.ExpertsRequest(
        output=Path(output), traces=[Path(trace)], options=nm.ReportOptions(plots=False)
    )
    print(nm.run_experts(request))
    return 0


def careless(output: str) -> int:
    """Write a file under a name of its own, and rename it; nothing is synced or cleaned."""
    directory = Path(output)
    if (directory / "done").exists():
        return 0
    with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
        file.write(b"data")
    Path(file.name).rename(directory / "data")
    (directory / "done").touch()
    return 0


def write_inputs(inputs: Path) -> None:
    """Write what all commands read, except the converted directory, which is a command's."""
    write_tiny(write_tokenizer(inputs / "checkpoint"), **SMALL)
    write_tiny(write_tokenizer(inputs / "other"), seed=1, **{**SMALL, "num_hidden_layers": 2})
    for name, tokens in (("checkpoint", 12), ("other", 34)):
        (inputs / name / "generation_config.json").write_text(json.dumps({"top_k": tokens}))
    (inputs / "other/added_tokens.json").write_text("{}")
    rows = [
        json.dumps({"text": f"row {number}: {'one two three ' * number}"}) for number in range(9)
    ]
    (inputs / "rows.jsonl").write_text("\n".join(rows) + "\n")
    _trace().save(inputs / "trace.safetensors")


def _trace(layers: int = 2, tokens: int = 12, experts: int = 4) -> Trace:
    generator = np.random.default_rng(0)
    shape = (layers, tokens, experts)
    scores = generator.random(shape, dtype=np.float32).astype(np.float16)
    return Trace(
        tokens=np.arange(tokens, dtype=np.int32),
        is_decode=np.arange(tokens) >= tokens // 2,
        expert_index=np.argsort(-scores, axis=2)[:, :, :2].astype(np.int16),
        affinity=np.full((layers, tokens, 2), 0.5, np.float32),
        scores=scores,
        bias=np.zeros((layers, experts), np.float32),
        texts=tuple(f"t{number}" for number in range(tokens)),
        answer="t6",
        finish_reason="length",
        name="small",
    )


def contents(directory: Path) -> dict[str, str]:
    """Return what a directory holds: path below it to kind, mode and a digest of the bytes, time
    stamps and durations in JSON files left out.
    """
    return {
        str(path.relative_to(directory)): _described(path) for path in sorted(directory.rglob("*"))
    }


def _described(path: Path) -> str:
    found = path.lstat()
    mode = f"{stat.filemode(found.st_mode)}"
    if not stat.S_ISREG(found.st_mode):
        return mode
    data = path.read_bytes()
    if path.suffix == ".json":
        with suppress(ValueError):  # a broken one is compared as it is
            data = json.dumps(_timeless(json.loads(data))).encode()
    return f"{mode} {len(data)} bytes {hashlib.sha256(data).hexdigest()[:12]}"


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: None if key in DURATIONS else _timeless(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_timeless(held) for held in value]
    return None if isinstance(value, int) and value > LARGEST_NUMBER else value


def differences(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Say what is missing, left over, or different."""
    return [
        *(f"{name} is left over" for name in found.keys() - wanted.keys()),
        *(f"{name} is missing" for name in wanted.keys() - found.keys()),
        *(
            f"{name} is {found[name]}, not {wanted[name]}"
            for name in sorted(found.keys() & wanted.keys())
            if found[name] != wanted[name]
        ),
    ]


def words(arguments: str, inputs: Path, work: Path) -> Sequence[str]:
    """Return a command's arguments."""
    return [word.format(inputs=inputs, work=work) for word in arguments.split()]
