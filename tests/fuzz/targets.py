"""What is mutated, what reads it, and why a success on a mutated input is wrong.

`run` works in a child and returns exit codes by step, and what else the judge needs; `judge` says
in the parent, by an independent reading, what was accepted that is damaged.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from neuron_minimax.checkpoint.header import TORCH_DTYPES
from neuron_minimax.cli import application
from neuron_minimax.cli.ending import exit_code
from tests.fuzz import readings
from tests.fuzz.mutations import Kind
from tests.fuzz.pristine import Pristine
from tests.fuzz.readings import Refused

COMMANDS = typer.main.get_command(application())
Codes = dict[str, int]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 2?"},
]
CHECKPOINT = "checkpoint"
SHARD = "model-00002-of-00002.safetensors"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A case after its run: where it ran, the input as it was mutated (None: the special file), the
    steps' exit codes, what else `run` returned, and what it returned on the pristine input.
    """

    made: Pristine
    target: "Target"
    data: bytes | None
    special: str | None = None
    codes: Codes
    found: Any
    truth: Any

    @property
    def work(self) -> Path:
        return self.made.work

    @property
    def kept(self) -> Path:
        return self.made.kept

    @property
    def untouched(self) -> bool:
        """True when the mutation left the bytes as they were."""
        return self.data == (self.kept / self.target.file).read_bytes()


@dataclass(frozen=True, kw_only=True)
class Target:
    """One file (below the working directory) and the commands that read it.

    `needs` are the names that the working directory holds, `writes` those that commands may
    change or make.
    """

    name: str
    file: str
    kind: Kind
    needs: tuple[str, ...]
    writes: tuple[str, ...] = ()
    run: Callable[[Path], tuple[Codes, Any]]
    judge: Callable[[Case], str | None]
    specials: bool = True
    weight: int = 4


def command(*arguments: Any) -> int:
    """Run a command of the program, as `cli.main` does; the parsers are made once, which takes as
    long as a case.
    """

    def run() -> int:
        try:
            COMMANDS(args=[str(argument) for argument in arguments], prog_name="neuron-minimax")
        except SystemExit as exit_:
            return exit_.code if isinstance(exit_.code, int) else 1
        return 0

    return exit_code(run)


def entry(read: Callable[[], Any]) -> tuple[int, Any]:
    """Run an entry of the library as a command would; return its exit code and its value."""
    value = None

    def run() -> int:
        nonlocal value
        value = read()
        return 0

    return exit_code(run), value


# A checkpoint: inspect, then convert.
def run_checkpoint(work: Path) -> tuple[Codes, Any]:
    codes = {
        "inspect": command("inspect", work / CHECKPOINT),
        "convert": command("convert", work / CHECKPOINT, work / "out"),
    }
    return codes, None


def judge_checkpoint(case: Case) -> str | None:
    codes = case.codes
    if codes["inspect"] and not codes["convert"]:
        return "convert goes on where inspect refuses"
    if codes["inspect"] and codes["convert"]:
        return None
    tensors = readings.checkpoint_of(case.work / CHECKPOINT)
    raw = readings.json_of(case.work / CHECKPOINT / "config.json", lenient=True)
    if problem := readings.config_problem(raw, tensors):
        return f"{problem}"
    if codes["convert"] or tensors != readings.checkpoint_of(case.kept / CHECKPOINT):
        return None
    if readings.shards_of(case.work / "out") != readings.shards_of(case.kept / "converted"):
        return "the same tensors were converted to others"
    return _config_carried(case.work)


def _config_carried(work: Path) -> str | None:
    before = readings.json_of(work / CHECKPOINT / "config.json", lenient=True)
    after = readings.json_of(work / "out" / "config.json", lenient=True)
    for raw in (before, after):
        raw.pop("quantization_config", None)
        raw.pop("neuron_minimax", None)
    name = readings.differing(before, after)
    return name and f"config.json: {name} was not carried over"


# A single small file, for headers alone.
def run_small(work: Path) -> tuple[Codes, Any]:
    from neuron_minimax.checkpoint.reader import TensorDirectory

    def read() -> Any:
        tensors = TensorDirectory(work / "small")
        tensors.require_usable()
        return {
            name: (TORCH_DTYPES[entry.dtype], entry.shape, tensors.array(name).tobytes())
            for name, entry in tensors.entries.items()
        }

    code, found = entry(read)
    return {"read": code}, found


def judge_small(case: Case) -> str | None:
    """The reader and the safetensors library accept the same files, and find the same in them."""
    try:
        truth = readings.tensors_of(case.work / case.target.file)
    except Refused as refusal:
        return None if case.codes["read"] else f"the safetensors library refuses it ({refusal})"
    known = {f"torch.{dtype}" for dtype in TORCH_DTYPES.values()}
    if any(dtype not in known for dtype, _, _ in truth.values()):
        return None
    if case.codes["read"]:
        plain = all(_is_plain(case, name) for name in truth)
        return f"refused, though the safetensors library reads {sorted(truth)}" if plain else None
    found = {name: (f"torch.{kind}", *rest) for name, (kind, *rest) in case.found.items()}
    return None if found == truth else "the safetensors library finds others in it"


def _is_plain(case: Case, name: str) -> bool:
    """The library also takes entries with other keys, those that are lists, empty names, a key of
    the metadata twice, and nothing times what no array can have.
    """
    data = (case.work / case.target.file).read_bytes()
    text = data[8 : 8 + int.from_bytes(data[:8], "little")]
    fields = readings.json_from(text)[name]
    plain = isinstance(fields, dict) and fields.keys() == {"dtype", "shape", "data_offsets"}
    if plain and math.prod(size for size in fields["shape"] if size) >= 2**60:
        return False
    return plain and name.isprintable() and 0 < len(name) <= 500 and not readings.repeats(text)


# The tokenizer's files.
def run_tokenizer(work: Path) -> tuple[Codes, Any]:
    from neuron_minimax.generation.tokenizer import TextTokenizer

    def read() -> Any:
        tokenizer = TextTokenizer.from_dir(work / CHECKPOINT)
        ids = tokenizer.encode("The weather in Paris: 123.")
        prompt = tokenizer.render_chat(CHAT)
        return {
            "ids": ids,
            "text": tokenizer.decode(ids),
            "prompt": prompt[:100_000],
            "stops": list(tokenizer.stop_token_ids),
            "sampling": vars(tokenizer.sampling),
        }

    code, found = entry(read)
    return {"read": code}, found


def judge_tokenizer(case: Case) -> str | None:
    from tokenizers import Tokenizer

    if case.codes["read"]:
        return None
    path = case.work / CHECKPOINT / "tokenizer.json"
    if case.data is None and not path.is_file():
        return "read: good without a tokenizer.json"
    try:
        ids = (
            Tokenizer.from_file(str(path))
            .encode("The weather in Paris: 123.", add_special_tokens=False)
            .ids
        )
    except Exception as error:  # of the library's own kind
        raise Refused(f"tokenizers: {str(error)[:100]}") from None
    return None if case.found["ids"] == ids else "the tokenizer library has other tokens"


def judge_generation_config(case: Case) -> str | None:
    if case.codes["read"]:
        return None
    path = case.work / CHECKPOINT / "generation_config.json"
    if not path.exists():
        return None
    raw = readings.json_of(path)
    if not isinstance(raw, dict):
        return "no object"
    return _generation_problem(raw, case.found)


def _generation_problem(raw: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    stops = raw.get("eos_token_id")
    for stop in stops if isinstance(stops, list) else [stops]:
        if stop is not None and (isinstance(stop, bool) or not isinstance(stop, int)):
            return f"eos_token_id {stop!r:.60}"
    if not isinstance(raw.get("do_sample", True), bool | None):
        return f"do_sample {raw['do_sample']!r:.60}"
    for name in ("temperature", "top_p", "top_k"):
        value = raw.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(
            value, int if name == "top_k" else int | float
        ):
            return f"{name} {value!r:.60}"
        if raw.get("do_sample", True) is not False and found["sampling"][name] != value:
            return f"{name} is {value!r:.60}, taken as {found['sampling'][name]!r:.60}"
    return None


def judge_tokenizer_config(case: Case) -> str | None:
    path = case.work / CHECKPOINT / "tokenizer_config.json"
    if case.codes["read"] or not path.exists():
        return None
    return None if isinstance(readings.json_of(path, lenient=True), dict) else "no object"


def judge_template(case: Case) -> str | None:
    if case.codes["read"] or case.data is None:
        return None
    try:
        case.data.decode("utf-8")
    except UnicodeDecodeError:
        return "a template that is no UTF-8"
    return None
