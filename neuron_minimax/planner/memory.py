"""Count the bytes of one rank from the table of weights and the sharding of each module."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import lcm, prod

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.config import CONVERTED_SECTION, ModelConfig
from neuron_minimax.families.family import EXPERT_ROLES, LayerKind, Role, Weight
from neuron_minimax.fp8 import ceil_div
from neuron_minimax.planner.instances import scratch_bytes
from neuron_minimax.planner.sharding import HeadLayout, head_layout

BF16_BYTES = 2
FP8_BYTES = 1
FLOAT32_BYTES = 4
CHANNELS = "I"  # the dimension of an expert's weights along which ranks share them
DTYPE_BYTES = {"BF16": BF16_BYTES, "F32": FLOAT32_BYTES}
# Largest finite values of Neuron's own E4M3 and of OCP's E4M3FN.
NEURON_E4M3_MAX = 240
OCP_E4M3_MAX = 448
# How experts compute in token generation; the first is the default until the other has run on a
# device.
EXPERT_KERNELS = ("torch", "nki")
# How a rank holds the scales of FP8 experts: one for each stored block, or each repeated along the
# intermediate channels, so that any split of those is exact; "auto" repeats only where a rank's
# share is not whole blocks.
BLOCK_SCALES = "block"
EXPANDED_SCALES = "expanded"
EXPERT_SCALES = ("auto", BLOCK_SCALES, EXPANDED_SCALES)
# Most sequences that the NKI kernel takes at once: its tokens lie along the chip's 128 partitions
KERNEL_TOKENS = 128
LISTED_LAYERS = 8  # in a message


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A model's place on ranks; lengths in tokens. FP8 weights have float32 block scales.

    `moe_tp_degree` ranks share the channels of an expert, or, as all ranks, those of the MLP of a
    family without experts. `fp8_experts` is of experts and of dense MLPs.
    """

    tp_degree: int
    moe_tp_degree: int
    moe_ep_degree: int
    batch_size: int
    seq_len: int
    context_length: int  # the longest context-encoding bucket
    smallest_context: int  # the shortest
    fp8_attention: bool = True
    fp8_experts: bool = True
    blockwise_matmul: str = "torch"  # of context encoding, a name of planner/blockwise.py
    expert_kernel: str = EXPERT_KERNELS[0]  # of token generation
    expert_scales: str = EXPERT_SCALES[0]


def held_experts(config: ModelConfig, deployment: Deployment) -> int:
    """Experts of a layer on a rank, as many on each: where the ranks do not divide them, some hold
    zeros in place of one, which no token can choose, because the router does not know them.
    """
    return ceil_div(config.num_local_experts, deployment.moe_ep_degree)


def padding_experts(config: ModelConfig, deployment: Deployment) -> int:
    """Experts of zeros in a layer, over all ranks."""
    held = held_experts(config, deployment)
    return held * deployment.moe_ep_degree - config.num_local_experts


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on one rank; `replicated` is the part of the weights that every rank holds whole."""

    experts: int
    mlp: int  # dense
    attention: int
    embedding_and_head: int
    replicated: int
    key_value_cache: int
    scratch: int

    @property
    def weights(self) -> int:
        shared = self.experts + self.mlp + self.attention + self.embedding_and_head
        return shared + self.replicated

    @property
    def total(self) -> int:
        return self.weights + self.key_value_cache + self.scratch

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "weights": self.weights, "total": self.total}


def largest_code(config: ModelConfig) -> int:
    """Largest FP8 code of a checkpoint as it is loaded: 448 when converted with `--fp8-range ocp`,
    else 240.
    """
    converted = config.raw.get(CONVERTED_SECTION) or {}
    return OCP_E4M3_MAX if converted.get("fp8_range") == "ocp" else NEURON_E4M3_MAX


def rank_memory(config: ModelConfig, deployment: Deployment) -> RankMemory:
    """Bytes of one rank; all ranks hold as much, padded heads included, and a head of its own where
    config.json ties it to the embedding.
    """
    names = ("experts", "mlp", "attention", "embedding_and_head", "replicated")
    parts = dict.fromkeys(names, 0)
    for weight in config.family.weights:
        group, shape = local_shape(weight, config, deployment)
        for layer in config.layers_with(weight):
            block = scale_block(weight, layer, config, deployment)
            parts[group] += weight_bytes(weight, shape, block)
    return RankMemory(
        **parts,
        key_value_cache=deployment.batch_size
        * deployment.seq_len
        * cache_bytes_per_token(config, deployment.tp_degree),
        scratch=scratch_bytes(),
    )


def heads(config: ModelConfig, tp_degree: int) -> HeadLayout:
    return head_layout(config.num_attention_heads, config.num_key_value_heads, tp_degree)


def cache_bytes_per_token(config: ModelConfig, tp_degree: int) -> int:
    """BF16 keys and values of one position on one rank: 31,744 for the real model from tp_degree 8
    on.
    """
    width = heads(config, tp_degree).key_value_heads_per_rank * config.head_dim
    return 2 * config.num_hidden_layers * width * BF16_BYTES


def local_shape(
    weight: Weight, config: ModelConfig, deployment: Deployment
) -> tuple[str, tuple[int, ...]]:
    """Which part of RankMemory a weight belongs to, and the shape of a rank's share (all its
    experts, in front).

    Attention is split by whole heads, the embedding along the hidden size, the head along the
    padded vocabulary, experts by expert and intermediate channel, dense MLPs by channel; the rest,
    router included, is on every rank.
    """
    layout = heads(config, deployment.tp_degree)
    tp = deployment.tp_degree
    sizes = schema.dimension_sizes(config)
    split: Mapping[str, int] = {
        "Q": layout.query_heads_per_rank * config.head_dim,
        "K": layout.key_value_heads_per_rank * config.head_dim,
        CHANNELS: sizes["I"] // deployment.moe_tp_degree,
        "F": sizes["F"] // tp,
        "S": sizes["S"] // tp,
    }
    shape = tuple(split.get(symbol, sizes[symbol]) for symbol in weight.dimensions)
    if weight.per_expert:
        return "experts", (held_experts(config, deployment), *shape)
    if weight.module_group == "embedding":
        return "embedding_and_head", (sizes["V"], sizes["H"] // tp)
    if weight.module_group == "head":
        return "embedding_and_head", (ceil_div(sizes["V"], tp), sizes["H"])
    if weight.module_group == "mlp":
        return "mlp", shape
    return ("attention" if set(weight.dimensions) & {"Q", "K"} else "replicated"), shape


def weight_bytes(weight: Weight, shape: tuple[int, ...], block: tuple[int, int] | None) -> int:
    """Bytes of a local shape: FP8 codes with a float32 scale for each `block`, BF16 without one;
    the router in float32, to which NxDI's is widened.
    """
    if weight.module_group == "router":
        return FLOAT32_BYTES * prod(shape)
    if block is None:
        return BF16_BYTES * prod(shape)
    *experts, rows, columns = shape
    blocks = prod(fp8.block_grid((rows, columns), block))
    return FP8_BYTES * prod(shape) + FLOAT32_BYTES * prod(experts) * blocks


def scale_block(
    weight: Weight, layer: int | None, config: ModelConfig, deployment: Deployment
) -> tuple[int, int] | None:
    """Rows and columns that share a scale on a rank; None where the weight is not FP8 there."""
    if not stays_fp8(weight, layer, config, deployment):
        return None
    rows, columns = config.weight_block_size
    scales = settled_scales(deployment.expert_scales, config, deployment.moe_tp_degree)
    if weight.per_expert and scales == EXPANDED_SCALES:
        first, second = weight.dimensions
        return (1 if first == CHANNELS else rows, 1 if second == CHANNELS else columns)
    return rows, columns


def expert_scales(config: ModelConfig, deployment: Deployment) -> str:
    """How a rank holds the scales of its experts, "auto" settled; as blocks where none is FP8."""
    settled = settled_scales(deployment.expert_scales, config, deployment.moe_tp_degree)
    if settled == EXPANDED_SCALES and has_fp8(EXPERT_ROLES, config, deployment):
        return EXPANDED_SCALES
    return BLOCK_SCALES


def settled_scales(chosen: str, config: ModelConfig, moe_tp_degree: int) -> str:
    """One of EXPERT_SCALES, "auto" settled for FP8 experts that so many ranks share."""
    if chosen in (BLOCK_SCALES, EXPANDED_SCALES):
        return chosen
    if not config.family.architecture.has_experts:
        return BLOCK_SCALES
    whole = config.intermediate_size // moe_tp_degree % whole_block(config) == 0
    return BLOCK_SCALES if whole else EXPANDED_SCALES


def whole_block(config: ModelConfig) -> int:
    """What a number of channels is a multiple of where they are whole blocks in both directions:
    those of a gate projection are its rows, those of a down projection its columns.
    """
    return lcm(*config.weight_block_size)


def stays_fp8(
    weight: Weight, layer: int | None, config: ModelConfig, deployment: Deployment
) -> bool:
    """Return whether a weight of a layer is FP8 codes on the device.

    In a converted directory those that `modules_to_not_convert` names are not.
    """
    in_attention = weight.module_group == "attention"
    if not weight.quantized:
        return False
    if not (deployment.fp8_attention if in_attention else deployment.fp8_experts):
        return False
    if CONVERTED_SECTION not in config.raw:
        return True
    module = config.family.module(weight.role).format(l=layer)
    return not any(entry in module for entry in config.modules_to_not_convert)


def has_fp8(roles: Collection[Role], config: ModelConfig, deployment: Deployment) -> bool:
    """Return whether a weight of one of the roles is FP8 on the device in some layer."""
    return any(
        stays_fp8(weight, layer, config, deployment)
        for weight in config.family.weights
        if weight.role in roles
        for layer in config.layers_with(weight)
    )


def fp8_expert_layers(
    config: ModelConfig, is_fp8: Callable[[Role, int], bool]
) -> tuple[list[int], list[int]]:
    """The layers whose experts are FP8 whole, and those where only some of their weights are."""
    whole: list[int] = []
    partly: list[int] = []
    if config.family.architecture.has_experts:
        for layer in config.layers_of(LayerKind.SPARSE):
            found = [is_fp8(role, layer) for role in EXPERT_ROLES]
            if any(found):
                (whole if all(found) else partly).append(layer)
    return whole, partly


def layers_text(layers: Sequence[int]) -> str:
    """The numbers of layers, of many the first."""
    listed = ", ".join(map(str, layers[:LISTED_LAYERS]))
    more = f" and {len(layers) - LISTED_LAYERS} more" if len(layers) > LISTED_LAYERS else ""
    return f"layer{'s' if len(layers) > 1 else ''} {listed}{more}"


def checkpoint_bytes(config: ModelConfig) -> int:
    """Bytes of the published checkpoint, as its config.json declares it; to a part in a thousand
    those of the converted directory. The same as of `schema.declared`, without listing tensors.
    """
    return sum(
        len(config.layers_with(weight))
        * (config.num_local_experts if weight.per_expert else 1)
        * _published_bytes(weight, config)
        for weight in config.family.weights
        if not schema.is_tied(weight, config)
    )


def _published_bytes(weight: Weight, config: ModelConfig) -> int:
    """Bytes of one tensor of a row, and of its scales."""
    shape = schema.shape_of(weight, config)
    if not weight.quantized:
        return DTYPE_BYTES[weight.published_dtype] * prod(shape)
    if not config.declares_fp8:
        return BF16_BYTES * prod(shape)
    blocks = prod(fp8.block_grid(shape, config.weight_block_size))
    return FP8_BYTES * prod(shape) + DTYPE_BYTES[config.family.scale_dtypes[0]] * blocks
