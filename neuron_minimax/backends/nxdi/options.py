"""Options of a Neuron compile: checked by the planner first, and turned into NxDI's settings and
environment.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from neuron_minimax.backends.base import given_options
from neuron_minimax.config import CONVERTED_SECTION, ModelConfig
from neuron_minimax.errors import BackendError
from neuron_minimax.families import FAMILIES, Family, Role
from neuron_minimax.planner import blockwise, instances
from neuron_minimax.planner.memory import (
    EXPERT_KERNELS,
    EXPERT_SCALES,
    NEURON_E4M3_MAX,
    expert_scales,
    largest_code,
)
from neuron_minimax.planner.report import plan_case
from neuron_minimax.planner.settings import (
    DEFAULT_INSTANCE,
    DEFAULT_SEQ_LEN,
    DeploymentSettings,
    check_buckets,
    default_buckets,
    deployment_case,
    moe_degrees,
)

# NxDI's settings for weights with a scale per block; the axes are those of the experts' [E, in,
# out].
BLOCKWISE = {
    "quantization_type": "blockwise_symmetric",
    "quantization_dtype": "f8e4m3",
    "quantization_block_axis": [1, 2],
}
# NxDI's switches that other mixtures of experts set on devices: padding takes no place in the
# blocks of experts, and collectives take no extra addition and product from the token that
# torch_xla threads through them.
MOE_SETTINGS = {"moe_mask_padded_tokens": True, "disable_numeric_cc_token": True}
FP8_CASTS = {"XLA_HANDLE_SPECIAL_SCALAR": "1", "UNSAFE_FP8FNCAST": "1"}
PARAMETERS_NAME = "parameters.json"  # what a compile expects of each rank's weights


@dataclass(frozen=True, kw_only=True)
class NeuronOptions:
    """The options of a Neuron compile; lengths in tokens. `fp8` is read off config.json, not
    asked.
    """

    instance: str
    tp_degree: int
    moe_tp_degree: int
    moe_ep_degree: int
    slots: int
    seq_len: int
    buckets: tuple[int, ...]
    blockwise_matmul: str = (
        blockwise.DEFAULT
    )  # experts in context encoding, a name of planner/blockwise.py
    expert_kernel: str = EXPERT_KERNELS[0]
    expert_scales: str = EXPERT_SCALES[0]  # of each rank; `check` settles "auto"
    expert_placement: str | None = (
        None  # a file of `neuron-minimax experts --placement`, for moe_ep_degree ranks
    )
    expert_placement_sha256: str | None = None  # of that file's contents, filled in by `check`
    compiler_cache: str | None = (
        None  # a directory for compiles that run one after another; default: their own
    )

    def __post_init__(self) -> None:
        for name, known in (("expert_kernel", EXPERT_KERNELS), ("expert_scales", EXPERT_SCALES)):
            if getattr(self, name) not in known:
                raise BackendError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}",
                    usage=True,
                )
        if self.expert_kernel == "nki" and not instances.instance(self.instance).nki_kernels:
            raise BackendError(
                f"expert_kernel='nki' needs trn2 or later; {self.instance} has no such NKI: use "
                "'torch'",
                usage=True,
            )
        blockwise.blockwise_matmul(self.blockwise_matmul)
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise BackendError(
                    f"{name} is {getattr(self, name)}; expected at least {least}", usage=True
                )
        check_buckets(self.buckets, self.seq_len)


# The least of each size; `slots` is the batch size.
LEAST = {"slots": 1, "tp_degree": 1, "moe_tp_degree": 1, "moe_ep_degree": 1, "seq_len": 2}


def parse(options: Mapping[str, Any]) -> NeuronOptions:
    """Options from a manifest or a caller. Raises BackendError naming one that does not exist."""
    try:
        return NeuronOptions(**{**options, "buckets": tuple(options["buckets"])})
    except (TypeError, KeyError) as error:
        raise BackendError(f"the neuron backend does not take these options: {error}") from None


def check(config: ModelConfig, options: Mapping[str, Any], force: bool) -> dict[str, Any]:
    """Fill in defaults and let the planner judge; None counts as absent.

    The layout of expert scales is settled. Raises BackendError with the plan when it refuses,
    unless `force`, for a family without a class for Neuron, and for an option of another backend.
    """
    if not config.family.neuron_class:
        raise BackendError(
            f"{config.family.title} has no class for Neuron; use --backend cpu, or one of "
            f"{', '.join(family.title for family in FAMILIES.values() if family.neuron_class)}"
        )
    taken = [field.name for field in fields(NeuronOptions)]
    given = given_options(options, taken, "neuron")
    given.setdefault("instance", DEFAULT_INSTANCE)
    machine = instances.instance(given["instance"])
    tp = given.setdefault("tp_degree", max(machine.tp_degrees, default=machine.logical_cores))
    given["moe_tp_degree"], given["moe_ep_degree"] = moe_degrees(
        config, tp, given.get("moe_tp_degree"), given.get("moe_ep_degree")
    )
    given.setdefault("slots", 1)
    seq_len = given.setdefault("seq_len", min(DEFAULT_SEQ_LEN, config.max_position_embeddings))
    given["buckets"] = tuple(given.get("buckets") or default_buckets(seq_len))
    if "expert_placement" in given:
        given["expert_placement_sha256"] = _digest(Path(given["expert_placement"]))
    checked = parse(given)
    plan = plan_case(
        deployment_case(
            config,
            DeploymentSettings(
                instance=checked.instance,
                tp_degree=checked.tp_degree,
                moe_tp_degree=checked.moe_tp_degree,
                moe_ep_degree=checked.moe_ep_degree,
                batch_size=checked.slots,
                seq_len=checked.seq_len,
                context_lengths=checked.buckets,
                blockwise_matmul=checked.blockwise_matmul,
                expert_kernel=checked.expert_kernel,
                expert_scales=checked.expert_scales,
            ),
        )
    )
    if plan.refused and not force:
        raise BackendError(
            f"{plan.render()}\nthis cannot work; change the settings, or compile with --force"
        )
    return {
        **asdict(checked),
        "buckets": list(checked.buckets),
        "expert_scales": expert_scales(config, plan.deployment),
    }


def _digest(placement: Path) -> str:
    """Hash a placement, so that other contents under the same name make another compile."""
    try:
        return hashlib.sha256(placement.read_bytes()).hexdigest()
    except OSError as error:
        raise BackendError(
            f"--expert-placement {placement} cannot be read ({error.strerror}); expected a file "
            "that `neuron-minimax experts --placement` wrote"
        ) from None


def neuron_config_fields(options: NeuronOptions) -> dict[str, Any]:
    """NeuronConfig's fields but for dtype and quantization: one prompt at a time is encoded, all
    slots take steps.
    """
    machine = instances.instance(options.instance)
    return {
        "tp_degree": options.tp_degree,
        "moe_tp_degree": options.moe_tp_degree,
        "moe_ep_degree": options.moe_ep_degree,
        "batch_size": options.slots,
        "max_batch_size": options.slots,
        "tkg_batch_size": options.slots,
        "ctx_batch_size": 1,
        "is_continuous_batching": True,
        "seq_len": options.seq_len,
        "max_context_length": options.buckets[-1],
        "enable_bucketing": True,
        "context_encoding_buckets": list(options.buckets),
        "token_generation_buckets": list(default_buckets(options.seq_len)),
        "padding_side": "right",
        "logical_nc_config": machine.logical_nc_config,
        "save_sharded_checkpoint": True,
        **MOE_SETTINGS,
        # NxD's default number of cores is that of the chip it finds when it is imported; with a
        # wrong one it leaves a kernel out with no more than a warning.
        "blockwise_matmul_config": blockwise.blockwise_matmul(options.blockwise_matmul).settings
        | {"logical_nc_config": machine.logical_nc_config},
    }


def float32_endings(family: Family) -> tuple[str, ...]:
    """Ends of the converted names of parameters that are float32 in every compile: the router, to
    which a BF16 gate is widened, and scales.
    """
    roles = (role for role in (Role.ROUTER, Role.ROUTER_BIAS) if family.has(role))
    routing = (family.rule_of(role).target.rpartition("{l}")[2] for role in roles)
    return tuple(dict.fromkeys((*routing, *family.float32_endings)))


def rounded_weights(weights: Iterable[tuple[str, bool]], family: Family) -> list[str]:
    """Names of the weights that a BF16 compile rounds, of (name, is it float32?)."""
    kept = float32_endings(family)
    return [name for name, is_float32 in weights if is_float32 and not name.endswith(kept)]


def rounding_note(rounded: Sequence[str]) -> str:
    return (
        f"{len(rounded)} float32 weights are rounded to BF16 for this compile, the first "
        f"{rounded[0]}"
    )


def environment(model: Path, graphs: Path, options: NeuronOptions) -> dict[str, str]:
    """Variables to set before the Neuron packages are imported; work and cache directories are this
    compile's own.

    FP8 codes up to 240 need the two cast switches (NxDI's MoE FP8 guide): the compiler reads OCP
    bytes as its own E4M3.
    """
    machine = instances.instance(options.instance)
    variables = {
        "DISABLE_NUMERIC_CC_TOKEN": "1",
        "NEURON_LOGICAL_NC_CONFIG": str(machine.logical_nc_config),
        "NEURON_RT_NUM_CORES": str(options.tp_degree),
        "NEURON_COMPILE_CACHE_URL": options.compiler_cache
        or str(graphs.resolve() / "compiler_cache"),
        "BASE_COMPILE_WORK_DIR": str(graphs.resolve() / "compiler_work") + "/",
    }
    if largest_code(ModelConfig.from_dir(model)) == NEURON_E4M3_MAX:
        variables |= FP8_CASTS
    if (
        machine.family != "inf2"
    ):  # NxD 0.17 takes that name for a chip it does not know; the instance itself tells it
        variables["NEURON_PLATFORM_TARGET_OVERRIDE"] = machine.family
    return variables


def quantization_options(directory: str | Path) -> dict[str, Any]:
    """The NeuronConfig fields for the tensors of a converted directory or Hugging Face checkpoint;
    {} when dense.

    Only a converted config.json lists modules_to_not_convert in NxDI's names; for a checkpoint they
    are computed.
    """
    model = ModelConfig.from_dir(directory)
    if not model.declares_fp8:
        return {}
    listed = model.modules_to_not_convert
    if CONVERTED_SECTION not in model.raw:
        from neuron_minimax.checkpoint.reader import Checkpoint
        from neuron_minimax.convert.plan import plan_conversion

        listed = plan_conversion(Checkpoint(directory)).modules_to_not_convert
    return BLOCKWISE | {
        "quantized": True,
        "quantized_checkpoints_path": str(directory),
        "quantization_block_size": list(model.weight_block_size),
        "modules_to_not_convert": list(listed),
    }
