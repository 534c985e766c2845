"""The targets, one row each."""

from collections.abc import Callable
from functools import partial

from hypothesis.strategies import SearchStrategy

from tests.fuzz import outputs, structured, studies, targets
from tests.fuzz.mutations import Kind
from tests.fuzz.targets import CHECKPOINT, SHARD, Target

CHECKPOINT_ROW = {
    "needs": (CHECKPOINT,),
    "writes": ("out",),
    "run": targets.run_checkpoint,
    "judge": targets.judge_checkpoint,
}
CONVERTED_ROW = {
    "needs": (CHECKPOINT, "converted", "traced"),
    "writes": ("converted", "traced"),
    "run": outputs.run_converted,
    "judge": outputs.judge_converted,
}
CACHE_ROW = {
    "needs": (CHECKPOINT, "cache"),
    "writes": ("cache",),
    "run": outputs.run_cache,
}
UNFINISHED_ROW = {
    "kind": Kind.JSON,
    "needs": (CHECKPOINT, "unfinished"),
    "writes": ("unfinished",),
    "run": outputs.run_unfinished,
    "judge": outputs.judge_unfinished,
}
TRACED_ROW = {
    "kind": Kind.JSON,
    "needs": ("converted", "traced"),
    "writes": ("traced",),
    "run": outputs.run_traced,
}
TOKENIZER_ROW = {"needs": (CHECKPOINT,), "run": targets.run_tokenizer}


def companions(name: str) -> Target:
    return Target(
        name=f"convert_with_{name.split('.')[0]}",
        file=f"{CHECKPOINT}/{name}",
        kind=Kind.TEXT,
        needs=(CHECKPOINT,),
        writes=("out",),
        run=outputs.run_companions,
        judge=outputs.judge_companions,
        weight=1,
    )


ROWS = [
    Target(
        name="header",
        file=f"{CHECKPOINT}/{SHARD}",
        kind=Kind.SAFETENSORS,
        weight=16,
        **CHECKPOINT_ROW,
    ),
    Target(
        name="small_header",
        file="small/model.safetensors",
        kind=Kind.SAFETENSORS,
        needs=("small",),
        run=targets.run_small,
        judge=targets.judge_small,
        weight=8,
    ),
    Target(
        name="index",
        file=f"{CHECKPOINT}/model.safetensors.index.json",
        kind=Kind.JSON,
        weight=8,
        **CHECKPOINT_ROW,
    ),
    Target(
        name="config", file=f"{CHECKPOINT}/config.json", kind=Kind.JSON, weight=16, **CHECKPOINT_ROW
    ),
    Target(
        name="source_data",
        file=f"{CHECKPOINT}/{SHARD}",
        kind=Kind.BYTES,
        needs=(CHECKPOINT, "converted", "cache"),
        writes=("converted", "cache"),
        run=outputs.run_source_data,
        judge=outputs.judge_source_data,
    ),
    Target(
        name="converted_data",
        file="converted/model-00002-of-00003.safetensors",
        kind=Kind.SAFETENSORS,
        **CONVERTED_ROW,
    ),
    Target(
        name="conversion",
        file="converted/conversion.json",
        kind=Kind.JSON,
        weight=8,
        **CONVERTED_ROW,
    ),
    Target(
        name="converted_config",
        file="converted/config.json",
        kind=Kind.JSON,
        **CONVERTED_ROW,
    ),
    Target(
        name="converted_index",
        file="converted/model.safetensors.index.json",
        kind=Kind.JSON,
        **CONVERTED_ROW,
    ),
    Target(
        name="cache_manifest",
        file="cache/cache.json",
        kind=Kind.JSON,
        weight=8,
        judge=outputs.judge_cache,
        **CACHE_ROW,
    ),
    Target(
        name="cache_data",
        file="cache/model.safetensors",
        kind=Kind.SAFETENSORS,
        judge=outputs.judge_cache,
        **CACHE_ROW,
    ),
    Target(name="journal", file="JOURNAL", **UNFINISHED_ROW),
    Target(name="identity", file="unfinished/.unfinished/identity.json", **UNFINISHED_ROW),
    Target(
        name="manifest",
        file="traced/manifest.json",
        weight=12,
        judge=outputs.judge_manifest,
        **TRACED_ROW,
    ),
    Target(
        name="traced_config",
        file="traced/model/config.json",
        judge=outputs.judge_traced_config,
        **TRACED_ROW,
    ),
    Target(
        name="tokenizer",
        file=f"{CHECKPOINT}/tokenizer.json",
        kind=Kind.JSON,
        judge=targets.judge_tokenizer,
        **TOKENIZER_ROW,
    ),
    Target(
        name="tokenizer_config",
        file=f"{CHECKPOINT}/tokenizer_config.json",
        kind=Kind.JSON,
        judge=targets.judge_tokenizer_config,
        weight=8,
        **TOKENIZER_ROW,
    ),
    Target(
        name="generation_config",
        file=f"{CHECKPOINT}/generation_config.json",
        kind=Kind.JSON,
        judge=targets.judge_generation_config,
        weight=8,
        **TOKENIZER_ROW,
    ),
    Target(
        name="template",
        file=f"{CHECKPOINT}/chat_template.jinja",
        kind=Kind.TEXT,
        judge=targets.judge_template,
        weight=8,
        **TOKENIZER_ROW,
    ),
    companions("tokenizer.json"),
    companions("tokenizer_config.json"),
    companions("generation_config.json"),
    companions("chat_template.jinja"),
    Target(
        name="trace",
        file="trace.safetensors",
        kind=Kind.SAFETENSORS,
        needs=("trace.safetensors",),
        writes=("out",),
        run=studies.run_trace,
        judge=studies.judge_trace,
        weight=8,
    ),
    Target(
        name="trace_report",
        file="trace.safetensors",
        kind=Kind.SAFETENSORS,
        needs=("trace.safetensors",),
        writes=("out",),
        run=studies.run_report,
        judge=studies.judge_trace,
        specials=False,
        weight=1,
    ),
    Target(
        name="rows",
        file="rows.jsonl",
        kind=Kind.LINES,
        needs=(CHECKPOINT, "rows.jsonl"),
        run=studies.run_rows,
        judge=studies.judge_rows,
        weight=8,
    ),
    Target(
        name="state",
        file="trained/training_state.pt",
        kind=Kind.BYTES,
        needs=(CHECKPOINT, "rows.jsonl", "trained"),
        writes=("trained",),
        run=studies.run_state,
        judge=studies.judge_state,
    ),
    Target(
        name="placement",
        file="placement.json",
        kind=Kind.JSON,
        needs=("placement.json",),
        run=studies.run_placement,
        judge=studies.judge_placement,
    ),
]


def bodies(name: str, weight: int) -> Target:
    return Target(
        name=f"request_{name}",
        file=f"{name}.json",
        kind=Kind.JSON,
        needs=(CHECKPOINT, f"{name}.json"),
        run=partial(studies.run_request, f"{name}.json"),
        judge=studies.judge_request,
        specials=False,
        weight=4 * weight,
    )


TARGETS = {
    target.name: target
    for target in (*ROWS, bodies("chat", 3), bodies("completion", 1), bodies("tokens", 1))
}

# Inputs by hypothesis, of these targets: a strategy from the pristine input.
STRUCTURED: dict[str, Callable[[bytes], SearchStrategy[bytes]]] = {
    **{name: structured.documents for name, target in TARGETS.items() if target.kind is Kind.JSON},
    "small_header": lambda pristine: structured.safetensors_files(),
    "rows": lambda pristine: structured.rows(),
}
# The others draw plots.
QUICK = [name for name in TARGETS if name != "trace_report"]
