"""Find settings that cannot work or will disappoint, before a compile.

A requirement is a function of a `Case` that yields findings: numbered, explained, with what fixes
each. Sources: NxD 0.18.0 and NxDI 0.9.0 (SDK 2.29), NxD 0.17.0 and NxDI 0.8.0 (SDK 2.28) as run on
a CPU, their guides, and the reports named in planner/instances.json.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import gcd

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import BINARY_UNITS, size_text
from neuron_minimax.errors import counted
from neuron_minimax.families import Role
from neuron_minimax.families.family import DENSE_ROLES, EXPERT_ROLES, SHARED_ROLES
from neuron_minimax.planner.cases import REFUSE, WARN, Case, Objection, Requirement
from neuron_minimax.planner.expert_lint import EXPERT_REQUIREMENTS, expert_kernel, repeated_scales
from neuron_minimax.planner.memory import (
    BLOCK_SCALES,
    NEURON_E4M3_MAX,
    cache_bytes_per_token,
    has_fp8,
    heads,
    whole_block,
)
from neuron_minimax.planner.sdks import SDKS

PROJECTIONS = (Role.QUERY, Role.KEY, Role.VALUE, Role.OUTPUT)
# The MLPs whose intermediate channels ranks share: what a message calls them, and their matrices.
MLPS = (
    ("expert", EXPERT_ROLES),
    ("dense MLP", DENSE_ROLES),
    ("shared expert", SHARED_ROLES),
)
# What AWS goes on with on trn2 and trn3.
OTHER_PATH = "--backend torch-neuron"


def lint(case: Case) -> list[Objection]:
    """All findings of all requirements, in their order; those of experts only where there are
    some.
    """
    requirements = REQUIREMENTS
    if case.config.family.architecture.has_experts:
        requirements = EXPERT_REQUIREMENTS + REQUIREMENTS
    found = [finding for requirement in requirements for finding in requirement(case)]
    return sorted(found, key=lambda finding: int(finding.rule.removeprefix("R")))


@dataclass(frozen=True, kw_only=True)
class Channels:
    """The intermediate channels of one kind of MLP, and the ranks that share them."""

    kind: str
    size: int
    degree_name: str
    degree: int
    fp8: bool

    @property
    def of_experts(self) -> bool:
        return self.degree_name == "moe_tp_degree"


def shared_channels(case: Case) -> Iterator[Channels]:
    """The channels of every kind of MLP that the model has."""
    config = case.config
    family = config.family
    deployment = case.deployment
    for kind, roles in MLPS:
        if not family.has(roles[0]) or not config.layers_with(family.weight_of(roles[0])):
            continue
        of_experts = family.weight_of(roles[0]).per_expert
        yield Channels(
            kind=kind,
            size=schema.shape_of(family.weight_of(roles[0]), config)[0],
            degree_name="moe_tp_degree" if of_experts else "tp_degree",
            degree=deployment.moe_tp_degree if of_experts else deployment.tp_degree,
            fp8=stored_fp8(roles, case),
        )


def shares(case: Case) -> Iterator[Objection]:
    """R1: experts, channels and the hidden size have to divide among the ranks, once each."""
    deployment = case.deployment
    config = case.config
    product = deployment.moe_tp_degree * deployment.moe_ep_degree
    if config.family.architecture.has_experts and product != deployment.tp_degree:
        yield Objection(
            "R1",
            REFUSE,
            f"moe_tp_degree {deployment.moe_tp_degree} * moe_ep_degree {deployment.moe_ep_degree} "
            f"is {product}, not tp_degree {deployment.tp_degree}",
            "needs degrees whose product is tp_degree",
        )
    for what, size, degree_name, degree in (
        ("channels of the hidden size", config.hidden_size, "tp_degree", deployment.tp_degree),
        *(
            (f"{shared.kind} channels", shared.size, shared.degree_name, shared.degree)
            for shared in shared_channels(case)
        ),
    ):
        if size % degree:
            yield Objection(
                "R1",
                REFUSE,
                f"{size} {what} cannot be shared by the {degree} ranks of {degree_name}",
                f"needs a {degree_name} that divides {size}",
            )


def whole_blocks(case: Case) -> Iterator[Objection]:
    """R2: a rank's share of a scaled weight is whole blocks, where a scale is of a block; NxD
    floor-divides the scale shape.
    """
    rows = whole_block(case.config)
    for shared in shared_channels(case):
        if not shared.fp8 or shared.size // shared.degree % rows == 0:
            continue
        if not shared.of_experts or case.deployment.expert_scales == BLOCK_SCALES:
            yield _partial_blocks(shared, rows, case.config.hidden_size)


def whole_heads(case: Case) -> Iterator[Objection]:
    """R2: the hidden size and a head are whole blocks, at whatever degrees."""
    config = case.config
    rows = whole_block(config)
    if stored_fp8(tuple(Role), case) and config.hidden_size % rows:
        yield Objection(
            "R2",
            REFUSE,
            f"hidden_size {config.hidden_size} is not whole blocks of {rows}, which NxD's scales "
            "have to be",
            "needs the checkpoint in BF16",
        )
    if stored_fp8(PROJECTIONS, case) and config.head_dim % rows:
        yield Objection(
            "R2",
            REFUSE,
            f"head_dim {config.head_dim} is not whole blocks of {rows}: ranks take whole heads, "
            "which NxDI pads and repeats, and a scale that covers parts of two goes with neither",
            "needs a conversion with --attention bf16",
        )


def stored_fp8(roles: Collection[Role], case: Case) -> bool:
    """Return whether a weight of one of the roles is FP8 on the device; of a model in BF16 no layer
    is looked at.
    """
    deployment = case.deployment
    any_fp8 = deployment.fp8_attention or deployment.fp8_experts
    return any_fp8 and has_fp8(roles, case.config, deployment)


def _partial_blocks(shared: Channels, rows: int, hidden_size: int) -> Objection:
    # tp_degree has to divide the hidden size too (R1).
    both = shared.size if shared.of_experts else gcd(shared.size, hidden_size)
    good = [degree for degree in divisors(both) if shared.size // degree % rows == 0]
    seen = " (MiniMax-M2 at moe_tp 64 was seen to repeat itself after 30 tokens)"
    degrees = f"a {shared.degree_name} of {' or '.join(map(str, good))}"
    if shared.of_experts:
        needed = "needs expert_scales auto, which repeats the scales of a block for its channels"
        needed += f", or {degrees}" if good else ""
    elif good:
        needed = f"needs {degrees}, or a conversion with its projections in --keep-in-bf16"
    else:
        needed = (
            f"no {shared.degree_name} does, as {shared.size} is not whole blocks: needs the "
            "checkpoint in BF16, or a conversion with its projections in --keep-in-bf16"
        )
    return Objection(
        "R2",
        REFUSE,
        f"{shared.degree_name} {shared.degree} leaves {shared.size // shared.degree} {shared.kind} "
        f"channels per rank, not whole blocks of {rows}{seen if shared.of_experts else ''}",
        needed,
    )


def cores(case: Case) -> Iterator[Objection]:
    """R6: ranks have to be cores, in a number that NxDI supports."""
    tp = case.deployment.tp_degree
    instance = case.instance
    if tp > instance.logical_cores:
        yield Objection(
            "R6",
            REFUSE,
            f"tp_degree {tp} is more than the {instance.logical_cores} logical cores of "
            f"{instance.name}",
            f"needs a tp_degree of {instance.logical_cores} or less",
        )
    if instance.tp_degrees and tp not in instance.tp_degrees:
        listed = ", ".join(map(str, instance.tp_degrees))
        yield Objection(
            "R6",
            WARN,
            f"tp_degree {tp} is not among those documented for {instance.name}",
            f"documented are {listed}",
        )


def head_padding(case: Case) -> Iterator[Objection]:
    """R7: query heads are padded to a multiple of tp_degree, key/value heads repeated."""
    layout = heads(case.config, case.deployment.tp_degree)
    padded = len(layout.query_slots)
    real = case.config.num_attention_heads
    if padded > real:
        yield Objection(
            "R7",
            WARN,
            f"{real} query heads become {padded} at tp_degree {case.deployment.tp_degree}: "
            f"{1 - real / padded:.0%} of the attention is zeros",
            "correct, and counted in the memory; tp degrees that divide the heads avoid it",
        )


def repeated_keys(case: Case) -> Iterator[Objection]:
    """R16: key/value heads that tp_degree neither divides nor is a multiple of are repeated to one
    per query head, in the cache too.
    """
    heads_stored = case.config.num_key_value_heads
    tp = case.deployment.tp_degree
    if heads_stored % tp and tp % heads_stored:
        cached = len(heads(case.config, tp).key_value_slots)
        yield Objection(
            "R16",
            WARN,
            f"num_key_value_heads {heads_stored} and tp_degree {tp} do not divide: NxDI repeats "
            f"them to {cached}, one for each query head, and the cache takes "
            f"{cached / heads_stored:.3g} times the memory",
            f"tp degrees that divide {heads_stored} or are a multiple of it avoid it",
        )


def code_range(case: Case) -> Iterator[Objection]:
    """R9: codes above the chip's largest finite E4M3 value read as infinity or NaN."""
    if case.fp8_max == NEURON_E4M3_MAX or not (
        case.deployment.fp8_attention or case.deployment.fp8_experts
    ):
        return
    if case.fp8_max > case.instance.e4m3_max:
        yield Objection(
            "R9",
            REFUSE,
            f"codes up to {case.fp8_max} are infinite or NaN on {case.instance.family}, whose E4M3 "
            f"ends at {case.instance.e4m3_max}",
            "needs a conversion with --fp8-range neuron, or, on trn2, "
            f"{OTHER_PATH}, which looks every code up",
        )
    else:
        yield Objection(
            "R9",
            REFUSE,
            f"codes up to {case.fp8_max} are native on {case.instance.family}, but no compiler has "
            "shown that it reads them so once NxDI's FP8 switch, which ends at 240, is left out",
            "needs a conversion with --fp8-range neuron, whose codes are as exact and read alike "
            f"with and without the switch, or {OTHER_PATH}, which looks every code up",
        )


def host_memory(case: Case) -> Iterator[Objection]:
    """R11: NxD's ModelBuilder.shard_checkpoint keeps the shards of all ranks in host memory until
    the last is made.
    """
    needed = case.memory.weights * case.deployment.tp_degree
    if needed > case.instance.host_memory:
        yield Objection(
            "R11",
            WARN,
            f"the shards of all ranks take {memory_text(needed)} of host memory while they are "
            f"made, and {case.instance.name} has {memory_text(case.instance.host_memory)}",
            "compile on a larger machine of the same chip, or add swap",
        )


def supported_sdk(case: Case) -> Iterator[Objection]:
    """R12: NxDI of SDK 2.29 supports trn2 and newer chips only (its release notes)."""
    instance = case.instance
    newest = next(iter(SDKS))
    if instance.sdk != newest:
        yield Objection(
            "R12",
            WARN,
            f"NxDI models are supported on {instance.family} up to SDK {instance.sdk}, not by SDK "
            f"{newest}",
            f"install the packages of SDK {instance.sdk}",
        )


def newer_chip(case: Case) -> Iterator[Objection]:
    """R20: NxDI documents no degrees for trn3, and its support there ends (SDK 2.30 and 2.33, their
    release notes).
    """
    if case.instance.family == "trn3":
        yield Objection(
            "R20",
            WARN,
            "nothing is known of this class on trn3: NxDI documents no tp_degree for it, and its "
            "support there ends with SDK 2.34",
            f"{OTHER_PATH} goes on, and so does vLLM-Neuron 0.24 or later",
        )


def positions(case: Case) -> Iterator[Objection]:
    """R15: a sequence ends where the model's positions end."""
    most = case.config.max_position_embeddings
    if case.deployment.seq_len > most:
        yield Objection(
            "R15",
            REFUSE,
            f"seq_len {case.deployment.seq_len} is beyond max_position_embeddings {most} of "
            "config.json",
            f"needs a seq_len of {most} or less",
        )


def neuron_class(case: Case) -> Iterator[Objection]:
    """R17: not every family has a class for Neuron."""
    family = case.config.family
    if not family.neuron_class:
        yield Objection(
            "R17",
            REFUSE,
            f"{family.title} has no class for Neuron",
            "needs --backend cpu; the numbers are those it would take",
        )


def core_memory(case: Case) -> Iterator[Objection]:
    """R18: weights, cache and what is left free have to be within the core of a rank."""
    memory = case.memory
    core = case.instance.memory_per_core
    if memory.total <= core:
        return
    room = core - memory.weights - memory.scratch
    tokens = room // cache_bytes_per_token(case.config, case.deployment.tp_degree)
    yield Objection(
        "R18",
        REFUSE,
        f"a rank takes {memory_text(memory.total)}: {memory_text(memory.weights)} of weights, "
        f"{memory_text(memory.key_value_cache)} of keys and values, {memory_text(memory.scratch)} "
        f"left free; a core of {case.instance.name} has {memory_text(core)}",
        f"needs {counted(tokens, 'position')} or fewer over all sequences at these degrees"
        if tokens > 0
        else "needs less of the weights on each rank",
    )


def memory_text(nbytes: int) -> str:
    """Bytes of a device's or a host's memory, in binary units."""
    return size_text(nbytes, 2, units=BINARY_UNITS)


REQUIREMENTS: tuple[Requirement, ...] = (
    shares,
    whole_blocks,
    whole_heads,
    cores,
    head_padding,
    repeated_keys,
    code_range,
    host_memory,
    supported_sdk,
    expert_kernel,
    repeated_scales,
    newer_chip,
    positions,
    neuron_class,
    core_memory,
)
# Those that no degrees, batch or length can meet.
OF_MODEL_AND_CHIP: tuple[Requirement, ...] = (whole_heads, code_range, neuron_class)


def refusals(case: Case) -> list[Objection]:
    """The findings that refuse a case; where there are none, it fits."""
    return [finding for finding in lint(case) if finding.severity == REFUSE]


def divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
