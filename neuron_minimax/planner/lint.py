"""Find settings that cannot work or will disappoint, before a compile.

A requirement is a function of a `Case` that yields findings: numbered, explained, with what fixes
each. Sources: NxD 0.18.0 and NxDI 0.9.0
(SDK 2.29), NxD 0.17.0 and NxDI 0.8.0 (SDK 2.28) as run on a CPU, their guides, and the reports
named in planner/instances.json.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from neuron_minimax.config import ModelConfig
from neuron_minimax.fp8 import ceil_div
from neuron_minimax.planner.blockwise import (
    DEFAULT,
    TOKEN_BLOCK,
    blockwise_matmul,
    token_blocks,
    unrolled_products,
)
from neuron_minimax.planner.instances import GIB, Instance
from neuron_minimax.planner.memory import (
    KERNEL_TOKENS,
    NEURON_E4M3_MAX,
    Deployment,
    heads,
    rank_memory,
)
from neuron_minimax.planner.sdks import SDKS

REFUSE = "refuse"
WARN = "warn"
USE_TORCH = "use expert_kernel torch"


@dataclass(frozen=True)
class Objection:
    """One numbered finding; `refuse` means the compile cannot lead to a working model."""

    rule: str
    severity: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.rule} {self.severity}: {self.message}; {self.fix}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model in a deployment on an instance; `fp8_max` is the largest code stored."""

    config: ModelConfig
    deployment: Deployment
    instance: Instance
    fp8_max: int = NEURON_E4M3_MAX


Requirement = Callable[[Case], Iterator[Objection]]


def lint(case: Case) -> list[Objection]:
    """All findings of all requirements, in their order."""
    return [finding for requirement in REQUIREMENTS for finding in requirement(case)]


def shares(case: Case) -> Iterator[Objection]:
    """R1: experts have to divide among the ranks, once each."""
    deployment = case.deployment
    config = case.config
    product = deployment.moe_tp_degree * deployment.moe_ep_degree
    if product != deployment.tp_degree:
        yield Objection(
            "R1",
            REFUSE,
            f"moe_tp_degree {deployment.moe_tp_degree} * moe_ep_degree {deployment.moe_ep_degree} "
            f"is {product}, not tp_degree {deployment.tp_degree}",
            "choose degrees whose product is tp_degree",
        )
    for name, size, degree in (
        ("num_local_experts", config.num_local_experts, deployment.moe_ep_degree),
        ("intermediate_size", config.intermediate_size, deployment.moe_tp_degree),
        ("hidden_size", config.hidden_size, deployment.tp_degree),
    ):
        if size % degree:
            fix = f"choose a divisor of {size}"
            yield Objection("R1", REFUSE, f"{name} {size} cannot be shared by {degree} ranks", fix)


def whole_blocks(case: Case) -> Iterator[Objection]:
    """R2: a rank's share of a scaled weight is whole blocks; NxD floor-divides the scale shape."""
    config = case.config
    deployment = case.deployment
    rows = config.weight_block_size[0]
    channels = config.intermediate_size // deployment.moe_tp_degree
    if deployment.fp8_experts and channels % rows:
        good = [
            d
            for d in divisors(config.intermediate_size)
            if config.intermediate_size // d % rows == 0
        ]
        yield Objection(
            "R2",
            REFUSE,
            f"moe_tp_degree {deployment.moe_tp_degree} leaves {channels} expert channels per rank, "
            f"not whole blocks of {rows} (moe_tp 64 was seen to repeat itself after 30 tokens)",
            "moe_tp_degree can be "
            f"{', '.join(map(str, good)) or 'nothing: the size itself is not whole blocks'}",
        )
    if deployment.fp8_attention and config.head_dim % rows:
        yield Objection(
            "R2",
            REFUSE,
            f"head_dim {config.head_dim} is not whole blocks of {rows}",
            "convert with --attention bf16",
        )


def expert_decoding(case: Case) -> Iterator[Objection]:
    """R3: NxD's expert-parallel token generation runs only when enough experts are chosen."""
    config = case.config
    batch = case.deployment.batch_size
    needed = ceil_div(config.num_local_experts, config.num_experts_per_tok)
    if case.deployment.expert_kernel == "nki":
        return  # the kernel visits the chosen experts of this rank, however few
    if case.deployment.moe_ep_degree > 1 and batch < needed:
        yield Objection(
            "R3",
            REFUSE,
            f"with expert parallelism batch_size {batch} * {config.num_experts_per_tok} chosen of "
            f"{config.num_local_experts} experts is below 1, for which NxD raises "
            "NotImplementedError",
            f"use batch_size {needed} or more, moe_ep_degree 1, or expert_kernel nki on trn2",
        )


def expert_encoding(case: Case) -> Iterator[Objection]:
    """R4: below one token block NxD takes a path that ignores expert parallelism."""
    tokens = case.deployment.smallest_context
    top_k = case.config.num_experts_per_tok
    if case.deployment.moe_ep_degree > 1 and tokens * top_k < TOKEN_BLOCK:
        yield Objection(
            "R4",
            REFUSE,
            f"a context of {tokens} tokens * {top_k} experts is below the block of {TOKEN_BLOCK}, "
            "and NxD then ignores expert parallelism (IndexError)",
            f"make the smallest bucket at least {ceil_div(TOKEN_BLOCK, top_k)} tokens",
        )


def trn1_groups(case: Case) -> Iterator[Objection]:
    """R5: NxD orders groups of four specially on trn1 and inf2, and not together with expert
    parallelism.
    """
    deployment = case.deployment
    if (
        case.instance.family in ("trn1", "inf2")
        and deployment.moe_tp_degree == 4
        and deployment.moe_ep_degree > 1
    ):
        yield Objection(
            "R5",
            REFUSE,
            "moe_tp_degree 4 with expert parallelism raises NotImplementedError on trn1 and inf2 "
            "(NxD 0.17, 0.18)",
            f"use moe_tp_degree 2 and moe_ep_degree {deployment.tp_degree // 2}",
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
            "lower it",
        )
    if instance.tp_degrees and tp not in instance.tp_degrees:
        listed = ", ".join(map(str, instance.tp_degrees))
        yield Objection(
            "R6",
            WARN,
            f"tp_degree {tp} is not among those documented for {instance.name}",
            f"use {listed}",
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


def unrolled_blocks(case: Case) -> Iterator[Objection]:
    """R8: blockwise context encoding in torch is a Python loop, unrolled in the graph."""
    way = blockwise_matmul(case.deployment.blockwise_matmul)
    if way.is_kernel:
        return
    products = unrolled_products(way, case.config, case.deployment)
    elsewhere = f". Elsewhere, on trn2: {way.known}" if case.instance.nki_kernels else ""
    yield Objection(
        "R8",
        WARN,
        f"context encoding of {case.deployment.context_length} tokens in torch operations unrolls "
        f"{token_blocks(case.config, case.deployment)} blocks in each of "
        f"{case.config.num_hidden_layers} layers, {products} expert products in one graph",
        f"lower the largest bucket or raise moe_ep_degree; expect a long compile{elsewhere}",
    )


def blockwise_kernels(case: Case) -> Iterator[Objection]:
    """R13: the NKI kernels of context encoding need two cores per rank and whole tiles, and have
    not run here.
    """
    way = blockwise_matmul(case.deployment.blockwise_matmul)
    instance = case.instance
    deployment = case.deployment
    if not way.is_kernel:
        return
    fix = f"use blockwise_matmul {DEFAULT}"
    if not instance.nki_kernels or instance.logical_nc_config != 2:
        yield Objection(
            "R13",
            REFUSE,
            f"blockwise_matmul {way.name} is a kernel for trn2 and later with logical_nc_config 2; "
            f"on {instance.name} NxD leaves it out, with a warning in the log only",
            fix,
        )
        return
    channels = case.config.intermediate_size // deployment.moe_tp_degree
    if channels % way.channel_multiple:
        yield Objection(
            "R13",
            REFUSE,
            f"blockwise_matmul {way.name} takes multiples of {way.channel_multiple} expert "
            f"channels per rank; moe_tp_degree {deployment.moe_tp_degree} leaves {channels}",
            f"lower moe_tp_degree, or {fix}",
        )
    if deployment.moe_ep_degree == 2:
        yield Objection(
            "R13",
            REFUSE,
            f"with moe_ep_degree 2 the kernels of SDK 2.29, {way.name} among them, were reported "
            "to give wrong output (a Kimi-K2 port)",
            f"choose another moe_ep_degree, or {fix}",
        )
    yield Objection(
        "R13",
        WARN,
        f"blockwise_matmul {way.name} has not run with this class; elsewhere: {way.known}",
        "check it with `neuron-minimax check-device` first",
    )


def expert_kernel(case: Case) -> Iterator[Objection]:
    """R14: the NKI expert kernel needs trn2's NKI, and reads codes as the E4M3 that ends at 240."""
    if case.deployment.expert_kernel != "nki":
        return
    if not case.instance.nki_kernels:
        yield Objection(
            "R14",
            REFUSE,
            f"expert_kernel nki needs trn2 or later; {case.instance.name} has no such NKI",
            USE_TORCH,
        )
    elif not case.deployment.fp8_experts or case.config.weight_block_size != (128, 128):
        yield Objection(
            "R14",
            REFUSE,
            "expert_kernel nki takes FP8 experts with 128 x 128 block scales only",
            USE_TORCH,
        )
    elif case.deployment.batch_size > KERNEL_TOKENS:
        yield Objection(
            "R14",
            REFUSE,
            f"expert_kernel nki takes batches of at most {KERNEL_TOKENS}, not "
            f"{case.deployment.batch_size}",
            f"lower the batch size, or {USE_TORCH}",
        )
    else:
        yield Objection(
            "R14",
            WARN,
            "expert_kernel nki has run on a simulator only",
            "check it with `neuron-minimax check-device` first",
        )
    if case.fp8_max > NEURON_E4M3_MAX:
        yield Objection(
            "R14",
            REFUSE,
            f"expert_kernel nki reads codes as E4M3 up to {NEURON_E4M3_MAX}; this conversion has "
            f"codes up to {case.fp8_max}, which it would read as infinity or NaN",
            f"convert with --fp8-range neuron, or {USE_TORCH}",
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
            "convert with --fp8-range neuron",
        )
    else:
        yield Objection(
            "R9",
            REFUSE,
            f"codes up to {case.fp8_max} are native on {case.instance.family}, but no compiler has "
            "shown that it reads them so once NxDI's FP8 switch, which ends at 240, is left out",
            "convert with --fp8-range neuron, whose codes are as exact and read alike with and "
            "without the switch",
        )


def host_memory(case: Case) -> Iterator[Objection]:
    """R11: NxD's ModelBuilder.shard_checkpoint keeps the shards of all ranks in host memory until
    the last is made.
    """
    needed = rank_memory(case.config, case.deployment).weights * case.deployment.tp_degree
    if needed > case.instance.host_memory:
        yield Objection(
            "R11",
            WARN,
            f"the shards of all ranks take {needed / GIB:.0f} GiB of host memory while they are "
            f"made, and {case.instance.name} has {case.instance.host_memory / GIB:.0f} GiB",
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


def positions(case: Case) -> Iterator[Objection]:
    """R15: a sequence ends where the model's positions end."""
    most = case.config.max_position_embeddings
    if case.deployment.seq_len > most:
        yield Objection(
            "R15",
            REFUSE,
            f"seq_len {case.deployment.seq_len} is beyond max_position_embeddings {most} of "
            "config.json",
            f"use seq_len {most} or less",
        )


REQUIREMENTS: tuple[Requirement, ...] = (
    shares,
    whole_blocks,
    expert_decoding,
    expert_encoding,
    trn1_groups,
    cores,
    head_padding,
    unrolled_blocks,
    code_range,
    host_memory,
    supported_sdk,
    blockwise_kernels,
    expert_kernel,
    positions,
)


def divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
