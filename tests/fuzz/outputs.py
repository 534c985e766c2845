"""The targets of outputs: what is behind a finished one, its manifest, an unfinished one, and a
compiled directory.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.fuzz import readings
from tests.fuzz.mutations import Kind
from tests.fuzz.pristine import COMPILE
from tests.fuzz.readings import Refused
from tests.fuzz.targets import CHECKPOINT, Case, Codes, command, entry


# Data that has changed behind a finished output.
def run_source_data(work: Path) -> tuple[Codes, Any]:
    checkpoint = work / CHECKPOINT
    codes = {
        "convert": command("convert", checkpoint, work / "converted"),
        "cache": command("cache", checkpoint, work / "cache"),
        "verify": command("verify", checkpoint, work / "converted"),
    }
    return codes, None


def judge_source_data(case: Case) -> str | None:
    accepted = [step for step, code in case.codes.items() if not code]
    if case.untouched:
        return None if len(accepted) == 3 else f"refused what is whole: {case.codes}"
    return f"{', '.join(accepted)}: good, though the source has changed" if accepted else None


def run_converted(work: Path) -> tuple[Codes, Any]:
    codes = {
        "verify": command("verify", work / CHECKPOINT, work / "converted"),
        "compile": compile_again(work),
        "convert": command("convert", work / CHECKPOINT, work / "converted"),
    }
    return codes, None


def compile_again(work: Path) -> int:
    buckets = ",".join(map(str, COMPILE["buckets"]))
    options = (
        "--batch-size",
        COMPILE["slots"],
        "--seq-len",
        COMPILE["seq_len"],
        "--engine",
        "eager",
    )
    return command("compile", work / "converted", work / "traced", "--buckets", buckets, *options)


TRUTHS = ("identity", "tensors", "rounded_codes")  # of conversion.json


def judge_converted(case: Case) -> str | None:
    """verify and compile find a changed file; convert refuses it, or makes it again. Another
    spelling of the same JSON is no change. Wrong records in conversion.json verify alone finds.
    """
    if _converted_like(case, case.data):
        return None
    accepted = [step for step in ("verify", "compile") if not case.codes[step]]
    if case.target.name == "conversion":
        return "verify: good on a wrong record" if "verify" in accepted else None
    if accepted:
        return f"{', '.join(accepted)}: good, though {case.target.file} has changed"
    if case.codes["convert"]:
        return None
    path = case.work / case.target.file
    if not path.is_file() or not _converted_like(case, path.read_bytes()):
        return f"convert: good, though {case.target.file} has changed"
    return None


def _converted_like(case: Case, data: bytes | None) -> bool:
    """Say whether a file of the conversion is as it was made."""
    kept = (case.kept / case.target.file).read_bytes()
    if data is None or case.target.kind is Kind.SAFETENSORS:
        return data == kept
    truth = readings.json_from(kept)
    try:
        found = readings.json_from(data)
    except Refused:
        return False
    if case.target.name != "conversion":
        return readings.same(found, truth)
    return isinstance(found, dict) and all(
        readings.same(_explicit(found.get(name)), truth[name]) for name in TRUTHS
    )


def _explicit(section: Any) -> Any:
    """Return records of tensors with what one without a count of rounded codes means."""
    if not isinstance(section, dict):
        return section
    return {
        name: {"rounded_codes": 0, **fields}
        if isinstance(fields, dict) and "crc32" in fields
        else fields
        for name, fields in section.items()
    }


def run_cache(work: Path) -> tuple[Codes, Any]:
    code = command("cache", work / CHECKPOINT, work / "cache")
    digests = {name: sha256(data) for name, data in readings.shards_of(work / "cache").items()}
    check = command("cache", work / CHECKPOINT, work / "cache", "--check")
    return {"cache": code, "cache --check": check}, digests


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def judge_cache(case: Case) -> str | None:
    """After a success the cache is the one that was made: it was whole, or was made again."""
    if not case.codes["cache"] and case.found != case.truth:
        return "cache: good, though the cache is another"
    if case.codes["cache --check"]:
        return None
    if readings.shards_of(case.work / "cache") != readings.shards_of(case.kept / "cache"):
        return "cache --check: good, though the cache is another"
    return _wrong_field(case, "cache/cache.json", ("identity", "tensors"))


def _wrong_field(case: Case, file: str, names: Sequence[str]) -> str | None:
    """Name a field of a manifest that is not, after a success, as it was made."""
    raw = readings.json_of(case.work / file)
    truth = readings.json_of(case.kept / file)
    for name in names:
        if not isinstance(raw, dict) or not readings.same(raw.get(name), truth[name]):
            return f"good, though {name} of {file} is not the truth"
    return None


def run_unfinished(work: Path) -> tuple[Codes, Any]:
    return {"convert": command("convert", work / CHECKPOINT, work / "unfinished")}, None


def judge_unfinished(case: Case) -> str | None:
    if case.codes["convert"]:
        return None
    if readings.shards_of(case.work / "unfinished") != readings.shards_of(case.kept / "converted"):
        return "the resumed conversion is another"
    mine = readings.json_of(case.work / "unfinished" / "conversion.json")
    truth = readings.json_of(case.kept / "converted" / "conversion.json")
    if not readings.same(mine["tensors"], truth["tensors"]):
        return "the resumed conversion records other tensors"
    left = [path.name for path in (case.work / "unfinished").glob(".unfinished*")]
    return "leaves .unfinished behind" if left else None


# A compiled directory.
def run_traced(work: Path) -> tuple[Codes, Any]:
    from neuron_minimax.generation.llm import LLM
    from neuron_minimax.generation.sampling import GREEDY

    def generate() -> Any:
        llm = LLM(work / "traced")
        answer = llm.generate([5, 6, 7], GREEDY, max_new_tokens=3)
        return list(answer.token_ids), vars(llm.backend.capabilities)

    loaded, answer = entry(generate)
    return {"load": loaded, "compile": compile_again(work)}, answer


REQUEST = ("backend", "checkpoint", "versions", "machine", "weights", "graphs")


def judge_manifest(case: Case) -> str | None:
    """What is loaded is what was compiled; after a compile the directory is as that leaves it."""
    if not case.codes["load"]:
        raw = readings.json_from(case.data) if case.data is not None else None
        truth = readings.json_of(case.kept / "traced" / "manifest.json")
        if not isinstance(raw, dict):
            return "load: good without a manifest"
        for name in REQUEST:
            if not readings.same(raw.get(name), truth[name]):
                return f"load: good, though {name} is not the truth"
        if problem := _options_obeyed(case, raw["options"], truth["options"]):
            return problem
    return None if case.codes["compile"] else _compiled(case)


def _compiled(case: Case) -> str | None:
    shards = readings.shards_of(case.work / "traced" / "model")
    if shards != readings.shards_of(case.kept / "traced" / "model"):
        return "compile: good, though the model is another"
    return _wrong_field(case, "traced/manifest.json", (*REQUEST, "options"))


def _options_obeyed(case: Case, options: Any, truth: Mapping[str, Any]) -> str | None:
    tokens, can = case.found
    if readings.same(options, truth) and tokens != case.truth[0]:
        return f"load: the answer is {tokens}, that of the pristine model {case.truth[0]}"
    for name in ("slots", "seq_len", "buckets"):
        asked = options.get(name)
        if not readings.same(asked, list(can[name]) if name == "buckets" else can[name]):
            return f"load: option {name} is {asked!r:.60}, the backend has {can[name]!r:.60}"
    if options.keys() != truth.keys():
        return f"load: good with options {sorted(options)}"
    return None


def judge_traced_config(case: Case) -> str | None:
    """Another spelling of the same JSON is no change."""
    truth = readings.json_of(case.kept / case.target.file)
    if not case.codes["load"] and (
        case.data is None or not readings.same(readings.json_from(case.data), truth)
    ):
        return "load: good, though config.json has changed"
    if case.codes["compile"]:
        return None
    if not readings.same(readings.json_of(case.work / case.target.file), truth):
        return "compile: good, though config.json has changed"
    return _compiled(case)


def run_companions(work: Path) -> tuple[Codes, Any]:
    return {"convert": command("convert", work / CHECKPOINT, work / "out")}, None


def judge_companions(case: Case) -> str | None:
    """What is no regular file is not copied, and what is one is copied whole."""
    if case.codes["convert"]:
        return None
    name = Path(case.target.file).name
    source = case.work / CHECKPOINT / name
    copy = case.work / "out" / name
    if not source.exists():
        return f"{name} is in the output, but not in the source" if copy.exists() else None
    if not source.is_file():
        return f"convert: good, though {name} is no regular file"
    return None if copy.read_bytes() == source.read_bytes() else f"{name} was copied as another"
