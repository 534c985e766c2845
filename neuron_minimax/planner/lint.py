"""Settings that cannot work or will disappoint, found before a compile: numbered, explained, with what fixes each.

Each rule is a function of a `Case` that yields findings. Sources: NxD 0.18.0 and NxDI 0.9.0 (SDK 2.29), NxD
0.17.0 and NxDI 0.8.0 (SDK 2.28) as run on a CPU, their guides, and the reports named in planner/instances.json.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from neuron_minimax.config import ModelConfig
from neuron_minimax.planner.instances import GIB, Instance
from neuron_minimax.planner.memory import Deployment, heads, rank_memory

# NxD's token block of the blockwise expert matmul (modules/moe/model_utils.py).
TOKEN_BLOCK = 512
# The newest Neuron SDK that the model class has been run with.
NEWEST_SDK = "2.29"
REFUSE, WARN = "refuse", "warn"


@dataclass(frozen=True)
class Finding:
    """One numbered finding; `refuse` means the compile cannot lead to a working model."""

    rule: str
    severity: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.rule} {self.severity}: {self.message}; {self.fix}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the rules look at. `ep_degree` is NxDI's outer expert parallelism, `fp8_max` the largest code stored."""

    config: ModelConfig
    deployment: Deployment
    instance: Instance
    ep_degree: int = 1
    fp8_max: int = 240
    quantized_mlp_kernel: bool = False


Rule = Callable[[Case], Iterator[Finding]]


def lint(case: Case) -> list[Finding]:
    """All findings of all rules, in their order."""
    return [finding for rule in RULES for finding in rule(case)]


def shares(case: Case) -> Iterator[Finding]:
    """R1: experts have to divide among the ranks, once each."""
    deployment, config = case.deployment, case.config
    product = deployment.moe_tp_degree * deployment.moe_ep_degree
    if product != deployment.tp_degree:
        yield Finding(
            "R1",
            REFUSE,
            f"moe_tp_degree {deployment.moe_tp_degree} * moe_ep_degree {deployment.moe_ep_degree} is {product}, not "
            f"tp_degree {deployment.tp_degree}",
            "choose degrees whose product is tp_degree",
        )
    for name, size, degree in (
        ("num_local_experts", config.num_local_experts, deployment.moe_ep_degree),
        ("intermediate_size", config.intermediate_size, deployment.moe_tp_degree),
        ("hidden_size", config.hidden_size, deployment.tp_degree),
    ):
        if size % degree:
            fix = f"choose a divisor of {size}"
            yield Finding("R1", REFUSE, f"{name} {size} cannot be shared by {degree} ranks", fix)


def whole_blocks(case: Case) -> Iterator[Finding]:
    """R2: a rank's share of a block-scaled weight is whole blocks; NxD floor-divides the scale shape."""
    config, deployment = case.config, case.deployment
    rows = config.weight_block_size[0]
    channels = config.intermediate_size // deployment.moe_tp_degree
    if deployment.fp8_experts and channels % rows:
        good = [d for d in divisors(config.intermediate_size) if config.intermediate_size // d % rows == 0]
        yield Finding(
            "R2",
            REFUSE,
            f"moe_tp_degree {deployment.moe_tp_degree} leaves {channels} expert channels per rank, not whole blocks of "
            f"{rows} (moe_tp 64 was seen to repeat itself after 30 tokens)",
            f"moe_tp_degree can be {', '.join(map(str, good)) or 'nothing: the size itself is not whole blocks'}",
        )
    if deployment.fp8_attention and config.head_dim % rows:
        yield Finding(
            "R2", REFUSE, f"head_dim {config.head_dim} is not whole blocks of {rows}", "convert with --attention bf16"
        )


def expert_decoding(case: Case) -> Iterator[Finding]:
    """R3: NxD's expert-parallel token generation runs all local experts, and only when enough are chosen."""
    config, batch = case.config, case.deployment.batch_size
    needed = -(-config.num_local_experts // config.num_experts_per_tok)
    if case.deployment.moe_ep_degree > 1 and batch < needed:
        yield Finding(
            "R3",
            REFUSE,
            f"with expert parallelism batch_size {batch} * {config.num_experts_per_tok} chosen of "
            f"{config.num_local_experts} experts is below 1, for which NxD raises NotImplementedError",
            f"use batch_size {needed} or more, or moe_ep_degree 1",
        )


def expert_encoding(case: Case) -> Iterator[Finding]:
    """R4: below one token block NxD takes a path that ignores expert parallelism."""
    tokens, top_k = case.deployment.smallest_context, case.config.num_experts_per_tok
    if case.deployment.moe_ep_degree > 1 and tokens * top_k < TOKEN_BLOCK:
        yield Finding(
            "R4",
            REFUSE,
            f"a context of {tokens} tokens * {top_k} experts is below the block of {TOKEN_BLOCK}, and NxD then ignores "
            "expert parallelism (IndexError)",
            f"make the smallest bucket at least {-(-TOKEN_BLOCK // top_k)} tokens",
        )


def trn1_groups(case: Case) -> Iterator[Finding]:
    """R5: NxD orders groups of four specially on trn1 and inf2, and not together with expert parallelism."""
    deployment = case.deployment
    if case.instance.family in ("trn1", "inf2") and deployment.moe_tp_degree == 4 and deployment.moe_ep_degree > 1:
        yield Finding(
            "R5",
            REFUSE,
            "moe_tp_degree 4 with expert parallelism raises NotImplementedError on trn1 and inf2 (NxD 0.17, 0.18)",
            f"use moe_tp_degree 2 and moe_ep_degree {deployment.tp_degree // 2}",
        )


def cores(case: Case) -> Iterator[Finding]:
    """R6: ranks have to be cores, in a number that NxDI supports."""
    tp, instance = case.deployment.tp_degree, case.instance
    if tp * case.ep_degree > instance.logical_cores:
        reason = f"tp_degree {tp}" + (f" * ep_degree {case.ep_degree}" if case.ep_degree > 1 else "")
        yield Finding(
            "R6",
            REFUSE,
            f"{reason} is more than the {instance.logical_cores} logical cores of {instance.name}",
            "spread experts with moe_ep_degree, which stays inside tp_degree" if case.ep_degree > 1 else "lower it",
        )
    elif case.ep_degree > 1:
        fix = "use moe_ep_degree"
        yield Finding("R6", REFUSE, f"ep_degree {case.ep_degree} multiplies the world size, not the experts", fix)
    if instance.tp_degrees and tp not in instance.tp_degrees:
        listed = ", ".join(map(str, instance.tp_degrees))
        yield Finding("R6", WARN, f"tp_degree {tp} is not among those documented for {instance.name}", f"use {listed}")


def head_padding(case: Case) -> Iterator[Finding]:
    """R7: query heads are padded to a multiple of tp_degree, key/value heads repeated."""
    layout = heads(case.config, case.deployment.tp_degree)
    padded, real = len(layout.query_slots), case.config.num_attention_heads
    if padded > real:
        yield Finding(
            "R7",
            WARN,
            f"{real} query heads become {padded} at tp_degree {case.deployment.tp_degree}: {1 - real / padded:.0%} of "
            "the attention is zeros",
            "correct, and counted in the memory; tp degrees that divide the heads avoid it",
        )


def unrolled_blocks(case: Case) -> Iterator[Finding]:
    """R8: without NKI kernels blockwise context encoding is a Python loop, one block after another in the graph."""
    if case.instance.nki_kernels:
        return
    blocks = token_blocks(case.config, case.deployment)
    yield Finding(
        "R8",
        WARN,
        f"{case.instance.family} has no NKI kernels in NxDI 0.9: context encoding of {case.deployment.context_length} "
        f"tokens unrolls {blocks} blocks in each of {case.config.num_hidden_layers} layers into one graph",
        "lower the largest bucket or raise moe_ep_degree; expect a long compile",
    )


def token_blocks(config: ModelConfig, deployment: Deployment) -> int:
    """Blocks of one expert's tokens in the worst case (NxD, ExpertMLPsV2.forward_blockwise)."""
    experts = config.num_local_experts // deployment.moe_ep_degree
    choices = deployment.context_length * config.num_experts_per_tok
    return min(-(-(choices - (experts - 1)) // TOKEN_BLOCK) + experts - 1, choices)


def code_range(case: Case) -> Iterator[Finding]:
    """R9: codes above the chip's largest finite E4M3 value read as infinity or NaN."""
    if case.fp8_max > case.instance.e4m3_max and (case.deployment.fp8_attention or case.deployment.fp8_experts):
        yield Finding(
            "R9",
            REFUSE,
            f"codes up to {case.fp8_max} are infinite or NaN on {case.instance.family}, whose E4M3 ends at "
            f"{case.instance.e4m3_max}",
            "convert with --fp8-range neuron",
        )


def dense_kernel(case: Case) -> Iterator[Finding]:
    """R10: the quantized MLP kernel is for dense models."""
    if case.quantized_mlp_kernel:
        yield Finding(
            "R10",
            REFUSE,
            "quantized_mlp_kernel_enabled is a switch of NxDI's dense MLP that forces per-channel scales; this "
            "checkpoint has block scales and no dense MLP",
            "use quantized=True, quantization_type='blockwise_symmetric', quantization_block_axis=[1, 2]",
        )


def host_memory(case: Case) -> Iterator[Finding]:
    """R11: NxD's ModelBuilder.shard_checkpoint keeps the shards of all ranks in host memory until the last is made."""
    needed = rank_memory(case.config, case.deployment).weights * case.deployment.tp_degree
    if needed > case.instance.host_memory:
        yield Finding(
            "R11",
            WARN,
            f"the shards of all ranks take {needed / GIB:.0f} GiB of host memory while they are made, and "
            f"{case.instance.name} has {case.instance.host_memory / GIB:.0f} GiB",
            "compile on a larger machine of the same chip, or add swap",
        )


def supported_sdk(case: Case) -> Iterator[Finding]:
    """R12: NxDI of SDK 2.29 supports trn2 and newer chips only (its release notes)."""
    instance = case.instance
    if instance.sdk != NEWEST_SDK:
        yield Finding(
            "R12",
            WARN,
            f"NxDI models are supported on {instance.family} up to SDK {instance.sdk}, not by SDK {NEWEST_SDK}",
            f"install the packages of SDK {instance.sdk}",
        )


RULES: tuple[Rule, ...] = (
    shares,
    whole_blocks,
    expert_decoding,
    expert_encoding,
    trn1_groups,
    cores,
    head_padding,
    unrolled_blocks,
    code_range,
    dense_kernel,
    host_memory,
    supported_sdk,
)


def divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
