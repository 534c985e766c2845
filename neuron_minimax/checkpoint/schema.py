"""The tensors that a config implies, from its family's table of weights, and what differs.

Reports, coverage checks, planners and tests are derived from it.
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod

from neuron_minimax.checkpoint.header import HasSpec, TensorEntry, TensorSpec
from neuron_minimax.config import CONVERTED_SECTION, ModelConfig
from neuron_minimax.errors import shown
from neuron_minimax.families import foreign, module_of
from neuron_minimax.families.family import Role, Weight
from neuron_minimax.fp8 import block_grid

SCALE_SUFFIX = "_scale_inv"
# Of weights that are no FP8, and of block scales: all that float32 holds exactly.
DENSE_DTYPES = ("BF16", "F32", "F16")
SCALE_DTYPES = (*DENSE_DTYPES, "F8_E8M0", "U8")
# How config.json counts modules of multi-token prediction, and the parts that only these have.
MTP_COUNTS = ("num_mtp_modules", "num_nextn_predict_layers", "mtp_num_hidden_layers")
MTP_PARTS = ("eh_proj.", "enorm.", "hnorm.", "shared_head.")
CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".kv_scale")
IN_LAYER = re.compile(r"model\.layers\.([0-9]{1,9})\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Expected(HasSpec):
    """One tensor that a checkpoint of a given config holds, its row, layer and expert."""

    spec: TensorSpec
    weight: Weight
    is_scale: bool = False
    layer: int | None = None
    expert: int | None = None

    @cached_property
    def elements(self) -> int:
        return prod(self.shape)


def dimension_sizes(config: ModelConfig) -> dict[str, int]:
    """The size behind each dimension symbol."""
    return {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "I": config.intermediate_size,
        "F": config.dense_intermediate_size,
        "S": config.shared_intermediate_size,
        "Q": config.query_size,
        "K": config.key_value_size,
        "E": config.num_local_experts,
        "D": config.head_dim,
    }


def shape_of(weight: Weight, config: ModelConfig) -> tuple[int, ...]:
    sizes = dimension_sizes(config)
    return tuple(sizes[symbol] for symbol in weight.dimensions)


def expected(config: ModelConfig) -> Iterator[Expected]:
    """Every tensor of the published format, scales included, in layer order: 96,103 for the real
    config. A tied head is not among them.
    """
    for weight in config.family.weights:
        if is_tied(weight, config):
            continue
        shape = shape_of(weight, config)
        grid = block_grid(shape, config.weight_block_size) if weight.quantized else ()
        for layer in config.layers_with(weight):
            for expert in range(config.num_local_experts) if weight.per_expert else (None,):
                name = weight.template.format(l=layer, e=expert)
                place = partial(Expected, weight=weight, layer=layer, expert=expert)
                yield place(spec=TensorSpec(name, weight.published_dtype, shape))
                if weight.quantized:
                    scales = TensorSpec(scale_name(name), config.family.scale_dtypes[0], grid)
                    yield place(spec=scales, is_scale=True)


def declared(config: ModelConfig) -> Iterator[Expected]:
    """Every tensor as config.json says: BF16 without scales where it declares no FP8."""
    for wanted in expected(config):
        if config.declares_fp8 or not wanted.weight.quantized:
            yield wanted
        elif not wanted.is_scale:
            yield replace(wanted, spec=TensorSpec(wanted.name, "BF16", wanted.shape))


def is_tied(weight: Weight, config: ModelConfig) -> bool:
    """Return whether the embedding stands for this weight: the head, where config.json says so."""
    return config.tie_word_embeddings and weight.role is Role.HEAD


def with_stored_head(config: ModelConfig, names: Container[str]) -> ModelConfig:
    """The config of a checkpoint with tensors of these names.

    A head that is stored is used, as transformers does, though config.json ties it.
    """
    heads = {weight.template for weight in config.family.weights if weight.role is Role.HEAD}
    if not config.tie_word_embeddings or not any(head in names for head in heads):
        return config
    raw = {**config.raw, "tie_word_embeddings": False}
    return replace(config, tie_word_embeddings=False, raw=raw)


def scale_name(weight_name: str) -> str:
    return weight_name + SCALE_SUFFIX


def mtp_names(names: Iterable[str], config: ModelConfig) -> list[str]:
    """Return the names of multi-token-prediction tensors, which this project does not run: named
    so, or of a layer beyond the last that config.json declares, or whose names show it.

    Such a layer holds something that no layer of the model has, named as only prediction names it,
    or declared by config.json and without what a layer of the model has: else config.json counts
    too few layers.
    """
    found = []
    beyond: dict[int, dict[str, str]] = {}  # of each layer, a name's rest to the name
    for name in names:
        layer = IN_LAYER.match(name)
        if any(part.startswith(config.family.ignored_markers) for part in name.split(".")):
            found.append(name)
        elif layer is not None and int(layer[1]) >= config.num_hidden_layers:
            beyond.setdefault(int(layer[1]), {})[layer[2]] = name
    if not beyond:
        return found
    declared = any(config.raw.get(field) for field in MTP_COUNTS)
    own: dict[int, set[str]] = {}
    for wanted in expected(config):
        match = None if wanted.is_scale else IN_LAYER.match(wanted.name)
        if match is not None:
            own.setdefault(int(match[1]), set()).add(match[2])
    known = set().union(*own.values())
    for members in beyond.values():
        others = {
            rest
            for rest in members
            if rest.removesuffix(SCALE_SUFFIX) not in known and not rest.endswith(CACHE_SCALES)
        }
        is_whole = any(weights <= members.keys() for weights in own.values())
        if (others and declared and not is_whole) or any(
            rest.startswith(MTP_PARTS) for rest in others
        ):
            found += members.values()
    return found


def cache_scale_names(names: Iterable[str], config: ModelConfig) -> list[str]:
    """Return the names of scales that servers put beside attention for an FP8 key/value cache."""
    attention = f".{config.family.attention_module}."
    return [name for name in names if attention in name and name.endswith(CACHE_SCALES)]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a checkpoint: the file or tensor it concerns, and the sentence that says
    it. Names in it are printable: the reader takes no others.
    """

    subject: str
    message: str
    kind: str

    def __str__(self) -> str:
        return self.message


def foreign_format(entries: Mapping[str, TensorEntry], config: ModelConfig) -> Problem | None:
    """Return the one problem of a checkpoint in a format that is not read, or under other names."""
    known = [wanted.name for wanted in expected(config)]
    dtypes = {name: entry.dtype for name, entry in entries.items()}
    found = foreign.recognized(dtypes, known)
    if found is not None:
        (title, name) = found
        return Problem(
            name,
            f"{name} in {entries[name].shard} ({entries[name].spec.form}) shows that the weights "
            f"are stored as {title}, which is not read; {foreign.take(config.family)}",
            "format",
        )
    prefixes = foreign.renamed(dtypes, known)
    if prefixes is not None:
        (there, wanted) = prefixes
        name = next(name for name in dtypes if name.startswith(there))
        return Problem(
            name,
            f"the names of the tensors, such as {name}, begin with {shown(there)} where "
            f"{shown(wanted)} is expected, as of a model that was saved within another one or "
            f"without its head; {foreign.take(config.family)}, or save the language model itself",
            "names",
        )
    return None


def check_against_schema(
    entries: Mapping[str, TensorEntry], config: ModelConfig, tolerated: set[str]
) -> Iterator[Problem]:
    """Yield every way in which the entries differ from what the table expects for this config."""
    if CONVERTED_SECTION in config.raw:
        yield Problem(
            "config.json",
            f"config.json has a {CONVERTED_SECTION} section: this directory is the output of a "
            "conversion, with Neuron's names and shapes. Take the checkpoint it was made of; "
            "`neuron-minimax verify` compares the two",
            "converted",
        )
    known: set[str] = set()
    joined = _Joined(config)
    for wanted in expected(config):
        known.add(wanted.name)
        entry = entries.get(wanted.name)
        if wanted.is_scale:
            scaled = entries.get(wanted.name.removesuffix(SCALE_SUFFIX))
            yield from _check_scale(entry, scaled, wanted)
        elif entry is None:
            yield Problem(
                wanted.name,
                f"{wanted.name} is missing; config.json implies {list(wanted.shape)}",
                "missing",
            )
        else:
            joined.add(entry, wanted)
            yield from _check_weight(entry, wanted)
    yield from joined.problems()
    for name, entry in entries.items():
        if name not in known and name not in tolerated:
            yield Problem(
                name,
                f"{name} in {entry.shard} is no weight of this model; check that config.json "
                "belongs to it",
                "extra",
            )


class _Joined:
    """The dtypes of weights that a conversion stores in one tensor, which has one."""

    def __init__(self, config: ModelConfig) -> None:
        self.targets = {
            source: rule.target
            for rule in config.family.rules
            for source in rule.sources
            if rule.per_expert or len(rule.sources) > 1
        }
        # Target and layer to dtype to how many weights have it, and the first of them.
        self.found: dict[tuple[str, int | None], dict[str, tuple[int, str]]] = {}

    def add(self, entry: TensorEntry, wanted: Expected) -> None:
        target = self.targets.get(wanted.weight.template)
        if target is not None:
            dtypes = self.found.setdefault((target, wanted.layer), {})
            count, first = dtypes.get(entry.dtype, (0, entry.name))
            dtypes[entry.dtype] = (count + 1, first)

    def problems(self) -> Iterator[Problem]:
        for (target, layer), dtypes in self.found.items():
            if len(dtypes) == 1:
                continue
            (rarest, (_, odd)) = min(dtypes.items(), key=lambda item: item[1][0])
            listed = sorted(dtypes.items(), key=lambda item: -item[1][0])
            counts = ", ".join(f"{count} {dtype}" for dtype, (count, _) in listed)
            yield Problem(
                odd,
                f"{odd} is {rarest}, but it is stored in one tensor with others as "
                f"{module_of(target).format(l=layer)}, whose weights are of several dtypes "
                f"({counts}); expected one",
                "dtype",
            )


def _check_weight(entry: TensorEntry, wanted: Expected) -> Iterator[Problem]:
    where = f"{entry.name} in {entry.shard}"
    if entry.shape != wanted.shape:
        yield Problem(
            entry.name,
            f"{where} has shape {list(entry.shape)}, but config.json implies {list(wanted.shape)}; "
            "check that both come from the same model",
            "shape",
        )
    wrong = wrong_dtype(entry.dtype, wanted.weight)
    if wrong:
        yield Problem(entry.name, f"{where} {wrong}", "dtype")


def wrong_dtype(dtype: str, weight: Weight, is_scale: bool = False) -> str:
    """Say which dtypes a weight, or its block scales, may be stored in; "" when it has one."""
    allowed: tuple[str, ...] = DENSE_DTYPES
    if is_scale:
        allowed = SCALE_DTYPES
    elif weight.quantized:
        allowed = ("F8_E4M3", *DENSE_DTYPES)
    if dtype in allowed:
        return ""
    reason = ": routing in less flips experts" if weight.float32_only else ""
    return f"is {dtype}; expected {' or '.join(allowed)}{reason}"


def _check_scale(
    scale: TensorEntry | None,
    weight: TensorEntry | None,
    wanted: Expected,
) -> Iterator[Problem]:
    fp8_weight = weight is not None and weight.dtype == "F8_E4M3"
    name = wanted.name
    if scale is None:
        if fp8_weight:
            yield Problem(
                name,
                f"{name} is missing, but its weight is FP8; without it the weight is raw codes",
                "scale",
            )
    elif not fp8_weight:
        found = "missing" if weight is None else weight.dtype
        yield Problem(
            name,
            f"{name} in {scale.shard} scales a weight that is {found}; expected F8_E4M3",
            "scale",
        )
    elif scale.shape != wanted.shape or scale.dtype not in SCALE_DTYPES:
        yield Problem(
            name,
            f"{name} in {scale.shard} is {scale.dtype} {list(scale.shape)}; expected "
            f"{' or '.join(SCALE_DTYPES)} {list(wanted.shape)}, one scale for each block of the "
            "weight",
            "scale",
        )
