"""The targets of studies, training and the server."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax.errors import shortened
from tests.fuzz import readings
from tests.fuzz.pristine import make_trainer
from tests.fuzz.targets import CHECKPOINT, Case, Codes, command, entry

SHAPES = {
    "tokens": "N",
    "is_decode": "N",
    "expert_index": "LNK",
    "affinity": "LNK",
    "scores": "LNE",
    "bias": "LE",
}
DTYPES = {
    "tokens": "torch.int32",
    "is_decode": "torch.bool",
    "expert_index": "torch.int16",
    "affinity": "torch.float32",
    "scores": "torch.float16",
    "bias": "torch.float32",
}


def run_trace(work: Path) -> tuple[Codes, Any]:
    from neuron_minimax.studies.experts.trace import Trace

    def load() -> Any:
        trace = Trace.load(work / "trace.safetensors")
        return {name: np.ascontiguousarray(getattr(trace, name)).tobytes() for name in SHAPES}

    code, found = entry(load)
    trace = ("--trace", work / "trace.safetensors", "--output", work / "out")
    return {"load": code, "placement": command("experts", *trace, "--placement", 2)}, found


def run_report(work: Path) -> tuple[Codes, Any]:
    trace = ("--trace", work / "trace.safetensors", "--output", work / "out")
    return {"experts": command("experts", *trace)}, None


def judge_trace(case: Case) -> str | None:
    accepted = [step for step, code in case.codes.items() if not code]
    if not accepted:
        return None
    problem = _trace_problem(case)
    return problem and f"{', '.join(accepted)}: good, though {problem}"


def _trace_problem(case: Case) -> str | None:
    tensors = readings.tensors_of(case.work / "trace.safetensors")
    if tensors.keys() != SHAPES.keys():
        return f"it holds {sorted(tensors)}"
    sizes: dict[str, int] = {}
    for name, letters in SHAPES.items():
        dtype, shape, _ = tensors[name]
        if dtype != DTYPES[name] or len(shape) != len(letters):
            return f"{name} is {dtype} {shape}"
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                return f"{name} has shape {shape}, others {sizes}"
    index = np.frombuffer(tensors["expert_index"][2], np.int16)
    if index.size and (index.min() < 0 or index.max() >= sizes["E"]):
        return f"expert_index goes from {index.min()} to {index.max()}"
    for name, dtype in (("affinity", "f4"), ("scores", "f2"), ("bias", "f4")):
        if not np.isfinite(np.frombuffer(tensors[name][2], dtype)).all():
            return f"{name} is not finite"
    if case.found and any(case.found[name] != tensors[name][2] for name in SHAPES):
        return "arrays were read as others"
    return None


def run_rows(work: Path) -> tuple[Codes, Any]:
    from neuron_minimax.training.data.encoding import Encoder
    from neuron_minimax.training.data.sources import JsonLines
    from neuron_minimax.training.data.tokenizer import load_tokenizer

    def read() -> Any:
        encoder = Encoder(load_tokenizer(work / CHECKPOINT), 64)
        source = JsonLines.read(work / "rows.jsonl")
        for row in source.rows:
            encoder.encode(row)
        return [said_in(row) for row in source.rows]

    code, rows = entry(read)
    return {"read": code}, rows


def said_in(row: Any) -> Any:
    """What is learned from a row: its text, or who says what."""
    messages = row.get("messages")
    if messages is None:
        return row.get("text")
    return [[message.get("role"), message.get("content")] for message in messages]


def judge_rows(case: Case) -> str | None:
    if case.codes["read"]:
        return None
    if case.data is None:
        return "read: good on a special file"
    lines = [line for line in case.data.split(b"\n") if line.strip()]
    rows = [readings.json_from(line, lenient=True) for line in lines]
    for row in rows:
        if not isinstance(row, dict) or not (
            isinstance(row.get("text"), str) or isinstance(row.get("messages"), list)
        ):
            return f"the row {str(row)[:80]}"
    if not readings.same([said_in(row) for row in rows], case.found):
        return "rows were read as others"
    return None


def run_state(work: Path) -> tuple[Codes, Any]:
    def resume() -> Any:
        trainer = make_trainer(work)
        before = {
            name: value.numpy().tobytes() for name, value in trainer.model.state_dict().items()
        }
        step = trainer.step
        history = list(trainer.history)
        list(trainer.run(2))
        after = {
            name: value.numpy().tobytes() for name, value in trainer.model.state_dict().items()
        }
        return {"step": step, "history": history, "before": before, "after": after}

    code, found = entry(resume)
    return {"resume": code}, found


def judge_state(case: Case) -> str | None:
    """A state that is taken up is the one that was saved: the run goes on to the same weights."""
    if case.codes["resume"]:
        return None
    if case.special in ("missing", "dangling link"):
        return None if case.found["step"] == 0 else "resume: good on nothing"
    name = readings.differing(case.truth, case.found)
    return name and f"resume: good, though {name} is not what was saved"


def run_placement(work: Path) -> tuple[Codes, Any]:
    from neuron_minimax.planner.placement import Placement

    def load() -> Any:
        placement = Placement.load(work / "placement.json")
        return {"order": placement.order.tolist(), "ranks": placement.ranks}

    code, found = entry(load)
    return {"load": code}, found


def judge_placement(case: Case) -> str | None:
    if case.codes["load"]:
        return None
    raw = readings.json_of(case.work / "placement.json")
    if not isinstance(raw, dict):
        return "no object"
    expected = {"order": raw.get("expert_order"), "ranks": raw.get("moe_ep_degree")}
    name = readings.differing(expected, case.found)
    if name:
        return f"{name} is {expected[name]!r:.60}, read as {case.found[name]!r:.60}"
    if raw.get("format_version") != 1 or isinstance(raw["format_version"], bool):
        return f"format_version {raw.get('format_version')!r:.60}"
    rows = expected["order"]
    if not rows or any(sorted(row) != list(range(len(rows[0]))) for row in rows):
        return "rows that are no orders of all experts"
    return None


# Requests. The file stands for the body.
def run_request(name: str, work: Path) -> tuple[Codes, Any]:
    from neuron_minimax.generation.sampling import GREEDY
    from neuron_minimax.generation.tokenizer import TextTokenizer
    from neuron_minimax.serving import preparation, protocol
    from neuron_minimax.serving.fields import Extras

    body = (work / name).read_bytes()
    tokenizer = TextTokenizer.from_dir(work / CHECKPOINT)
    known = preparation.Preparation(
        hugging_face=tokenizer.hugging_face,
        chat_format=tokenizer.chat_format,
        model_name="m",
        seq_len=64,
        vocab_size=len(tokenizer.hugging_face),
    )
    kinds = {
        "chat": (protocol.ChatRequest, preparation.prepare_chat),
        "completion": (protocol.CompletionRequest, preparation.prepare_completion),
        "tokenize": (protocol.TokenizeRequest, preparation.tokenize),
        "detokenize": (protocol.DetokenizeRequest, preparation.detokenize),
    }
    codes: Codes = {}
    found: dict[str, Any] = {}
    for kind, (model, prepare) in kinds.items():

        def read(model: Any = model, prepare: Any = prepare) -> Any:
            extras = Extras()
            request = protocol.parse_request(model, body, extras)
            prepare(known, Extras(), body)
            if hasattr(request, "stops"):
                request.stops()
                request.sampling(GREEDY)
                request.limit()
                request.top()
            fields = request.model_dump(exclude_unset=True, by_alias=True, mode="json")
            return {"fields": set(fields), "ignored": set(extras.ignored)}

        codes[kind], found[kind] = entry(read)
    return codes, found


def judge_request(case: Case) -> str | None:
    """What is accepted is JSON with the same fields but for those that are said to be passed over,
    and text that can be written; numbers without an end are in those alone.
    """
    for name, code in case.codes.items():
        if code:
            continue
        if case.data is None:
            return f"{name}: good on a special file"
        raw = readings.json_from(case.data, lenient=True)
        ignored = case.found[name]["ignored"]
        readings.json_from(json.dumps(_without(raw, ignored)).encode())
        try:
            json.dumps(raw, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return f"{name}: half a surrogate pair"
        fields = case.found[name]["fields"]
        unsaid = {shortened(field) for field in {*raw} - fields} - ignored
        if unsaid or fields - {*raw}:
            return f"{name}: fields {sorted(raw)} were read as {sorted(fields)}"
    return None


def _without(value: Any, ignored: set[str]) -> Any:
    """The value without the fields of these names, wherever they stand."""
    if isinstance(value, list):
        return [_without(item, ignored) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _without(item, ignored)
        for name, item in value.items()
        if shortened(name) not in ignored
    }
