"""The requirements of a mixture of experts: R1, R3, R4, R5, R8, R13, R14, R19 and R21.

Sources: those of planner/lint.py.
"""

from collections.abc import Iterator
from dataclasses import replace

from neuron_minimax.checkpoint.header import BINARY_UNITS, size_text
from neuron_minimax.errors import counted
from neuron_minimax.families.family import EXPERT_ROLES, LayerKind, Role
from neuron_minimax.fp8 import ceil_div
from neuron_minimax.kernels.nki.memory import ExpertSizes, overflow
from neuron_minimax.planner.blockwise import (
    DEFAULT,
    TOKEN_BLOCK,
    blockwise_matmul,
    sparse_layers,
    token_blocks,
    unrolled_products,
)
from neuron_minimax.planner.cases import REFUSE, WARN, Case, Objection, Requirement
from neuron_minimax.planner.memory import (
    BLOCK_SCALES,
    EXPANDED_SCALES,
    EXPERT_SCALES,
    KERNEL_TOKENS,
    expert_scales,
    fp8_expert_layers,
    has_fp8,
    held_experts,
    layers_text,
    padding_experts,
    stays_fp8,
)

SHORTEST_CONTEXT = 2  # of every compile
NEEDS_TORCH = "needs expert_kernel torch"


def least_batch(case: Case) -> int:
    """The fewest sequences that token generation takes; the NKI kernel visits the chosen experts of
    a rank, however few.
    """
    if case.deployment.moe_ep_degree == 1 or case.deployment.expert_kernel == "nki":
        return 1
    return ceil_div(all_experts(case), case.config.num_experts_per_tok)


def all_experts(case: Case) -> int:
    """Experts that the ranks hold together, those of zeros included."""
    return case.config.num_local_experts + padding_experts(case.config, case.deployment)


def least_context(case: Case) -> int:
    """The shortest length that context encoding can be compiled for."""
    if case.deployment.moe_ep_degree == 1:
        return SHORTEST_CONTEXT
    return max(SHORTEST_CONTEXT, ceil_div(TOKEN_BLOCK, case.config.num_experts_per_tok))


def shared_experts(case: Case) -> Iterator[Objection]:
    """R1 and R21: every rank holds an expert, and as many as the others, zeros included."""
    experts = case.config.num_local_experts
    ranks = case.deployment.moe_ep_degree
    if ranks > experts:
        yield Objection(
            "R1",
            REFUSE,
            f"{experts} experts cannot be shared by the {ranks} ranks of moe_ep_degree",
            f"needs a moe_ep_degree of {experts} or less",
        )
        return
    padding = padding_experts(case.config, case.deployment)
    if not padding:
        return
    held = held_experts(case.config, case.deployment)
    one = size_text(case.memory.experts // held, 2, units=BINARY_UNITS)
    yield Objection(
        "R21",
        WARN,
        f"moe_ep_degree {ranks} does not divide {experts} experts: {padding} of its ranks hold "
        f"{counted(held - 1, 'expert')} and one of zeros, {one} that no token can choose",
        f"exact; a moe_ep_degree that divides {experts} avoids it",
    )


def expert_decoding(case: Case) -> Iterator[Objection]:
    """R3: NxD's expert-parallel token generation runs only when enough experts are chosen."""
    config = case.config
    batch = case.deployment.batch_size
    needed = least_batch(case)
    if batch < needed:
        yield Objection(
            "R3",
            REFUSE,
            f"with expert parallelism batch_size {batch} * {config.num_experts_per_tok} chosen of "
            f"{all_experts(case)} experts is below 1, for which NxD raises "
            "NotImplementedError",
            f"needs batch_size {needed} or more, moe_ep_degree 1, or expert_kernel nki on trn2",
        )


def expert_encoding(case: Case) -> Iterator[Objection]:
    """R4: below one token block NxD takes a path that ignores expert parallelism."""
    tokens = case.deployment.smallest_context
    top_k = case.config.num_experts_per_tok
    needed = least_context(case)
    if tokens < needed:
        yield Objection(
            "R4",
            REFUSE,
            f"a context of {tokens} tokens * {counted(top_k, 'expert')} is below the block of "
            f"{TOKEN_BLOCK}, and NxD then ignores expert parallelism (IndexError)",
            f"needs a smallest bucket of {needed} tokens or more",
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
            "needs another moe_tp_degree, or moe_ep_degree 1",
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
        f"{counted(token_blocks(case.config, case.deployment), 'block')} in each of "
        f"{counted(sparse_layers(case.config), 'layer')}, {counted(products, 'expert product')} in "
        "one graph",
        "fewer with a shorter largest bucket or a higher moe_ep_degree; expect a long "
        f"compile{elsewhere}",
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
    fix = f"needs blockwise_matmul {DEFAULT}"
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
            f"{fix}, or a share of whole tiles",
        )
    if deployment.moe_ep_degree == 2:
        yield Objection(
            "R13",
            REFUSE,
            f"with moe_ep_degree 2 the kernels of SDK 2.29, {way.name} among them, were reported "
            "to give wrong output (a Kimi-K2 port)",
            f"{fix}, or another moe_ep_degree",
        )
    yield Objection(
        "R13",
        WARN,
        f"blockwise_matmul {way.name} has not run with this class; elsewhere: {way.known}",
        "check it with `neuron-minimax check-device` first",
    )


def expert_kernel(case: Case) -> Iterator[Objection]:
    """R14: the NKI expert kernel needs NKI of trn2 or later, and reads codes as the chip's E4M3."""
    if case.deployment.expert_kernel != "nki":
        return
    if not case.config.family.architecture.has_experts:
        yield Objection(
            "R14",
            REFUSE,
            f"expert_kernel nki is for experts, and {case.config.family.title} has none",
            NEEDS_TORCH,
        )
        return
    if not case.instance.nki_kernels:
        yield Objection(
            "R14",
            REFUSE,
            f"expert_kernel nki needs trn2 or later; {case.instance.name} has no such NKI",
            NEEDS_TORCH,
        )
    elif case.config.weight_block_size != (128, 128) or not has_fp8(
        EXPERT_ROLES, case.config, case.deployment
    ):
        yield Objection(
            "R14",
            REFUSE,
            "expert_kernel nki takes FP8 experts with 128 x 128 block scales only",
            NEEDS_TORCH,
        )
    elif kept := kept_layers(case):
        yield Objection(
            "R14",
            REFUSE,
            "expert_kernel nki takes experts whose weights are all FP8, and in "
            f"{layers_text(kept)} modules_to_not_convert keeps some in BF16",
            f"{NEEDS_TORCH}, or a conversion without them in --keep-in-bf16",
        )
    elif case.deployment.batch_size > KERNEL_TOKENS:
        yield Objection(
            "R14",
            REFUSE,
            f"expert_kernel nki takes batches of at most {KERNEL_TOKENS}, not "
            f"{case.deployment.batch_size}",
            f"{NEEDS_TORCH}, or a smaller batch",
        )
    elif said := overflow(kernel_sizes(case), case.deployment.batch_size):
        yield Objection(
            "R14",
            REFUSE,
            f"expert_kernel nki has too little memory: {said}",
            f"{NEEDS_TORCH}, or fewer sequences or channels on a rank",
        )
    else:
        yield Objection(
            "R14",
            WARN,
            "expert_kernel nki has run on a simulator only",
            "check it with `neuron-minimax check-device` first",
        )
    if case.fp8_max > case.instance.e4m3_max:
        yield Objection(
            "R14",
            REFUSE,
            f"expert_kernel nki reads codes up to {case.instance.e4m3_max} there; this conversion "
            f"has codes up to {case.fp8_max}, which it would read as infinity or NaN",
            f"{NEEDS_TORCH}, or a conversion with --fp8-range neuron",
        )


def expert_layers(case: Case) -> tuple[list[int], list[int]]:
    """The layers whose experts are FP8 on the device, whole and in part."""
    config = case.config

    def is_fp8(role: Role, layer: int) -> bool:
        return stays_fp8(config.family.weight_of(role), layer, config, case.deployment)

    return fp8_expert_layers(config, is_fp8)


def kernel_sizes(case: Case) -> ExpertSizes:
    """What the kernel has on a rank."""
    return ExpertSizes(
        hidden=case.config.hidden_size,
        channels=case.config.intermediate_size // case.deployment.moe_tp_degree,
        expanded=expert_scales(case.config, case.deployment) == EXPANDED_SCALES,
    )


def kept_layers(case: Case) -> list[int]:
    """The layers with experts that are not FP8 whole."""
    whole, _ = expert_layers(case)
    return [layer for layer in case.config.layers_of(LayerKind.SPARSE) if layer not in whole]


def repeated_scales(case: Case) -> Iterator[Objection]:
    """R19: expanded scales take memory, and are for experts that are FP8 whole."""
    deployment = case.deployment
    if not has_fp8(EXPERT_ROLES, case.config, deployment):
        if deployment.expert_scales == EXPANDED_SCALES:
            yield Objection(
                "R19",
                REFUSE,
                "expert_scales expanded repeats the scales of FP8 experts, and there are none",
                f"needs expert_scales {EXPERT_SCALES[0]}",
            )
        return
    if expert_scales(case.config, deployment) != EXPANDED_SCALES:
        return
    _, partly = expert_layers(case)
    if partly:
        yield Objection(
            "R19",
            REFUSE,
            f"expert_scales expanded takes experts whose weights are all FP8, and in "
            f"{layers_text(partly)} modules_to_not_convert keeps some in BF16",
            f"needs expert_scales {BLOCK_SCALES} at a share of whole blocks, or a conversion with "
            f"all of them or none in --keep-in-bf16 ({case.config.family.experts_module})",
        )
        return
    blocks = replace(deployment, expert_scales=BLOCK_SCALES)
    as_blocks = replace(case, deployment=blocks).memory.experts
    if not as_blocks:  # more ranks than experts or channels, which R1 refuses
        return
    more = case.memory.experts - as_blocks
    channels = case.config.intermediate_size // deployment.moe_tp_degree
    yield Objection(
        "R19",
        WARN,
        f"the scales of experts are repeated for each of a rank's {counted(channels, 'channel')}: "
        f"{size_text(more, 2, units=BINARY_UNITS)} more on a rank, {more / as_blocks:.1%} of its "
        "experts",
        "exact at any split; a rank's share of whole blocks avoids it",
    )


EXPERT_REQUIREMENTS: tuple[Requirement, ...] = (
    shared_experts,
    expert_decoding,
    expert_encoding,
    trn1_groups,
    unrolled_blocks,
    blockwise_kernels,
)
