"""The NxDI config of every family: read from any style of its config.json, its settings checked
before anything runs.
"""

import json
import os
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

import torch

from neuron_minimax.backends.nxdi import imports
from neuron_minimax.backends.nxdi.moe import ACTIVATIONS
from neuron_minimax.backends.nxdi.options import BLOCKWISE, FP8_CASTS
from neuron_minimax.backends.nxdi.padding import Padding
from neuron_minimax.backends.nxdi.scales import expand_scales
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import ConfigError
from neuron_minimax.families import Role
from neuron_minimax.families.family import LayerKind
from neuron_minimax.planner import blockwise, instances
from neuron_minimax.planner.memory import (
    BLOCK_SCALES,
    EXPANDED_SCALES,
    EXPERT_KERNELS,
    EXPERT_SCALES,
    KERNEL_TOKENS,
    NEURON_E4M3_MAX,
    fp8_expert_layers,
    largest_code,
    layers_text,
    settled_scales,
    whole_block,
)
from neuron_minimax.planner.sdks import SDKS

QUANTIZED_MLP = (
    "quantized_mlp_kernel_enabled is a switch of NxDI's dense MLP that forces per-channel scales; "
    "no expert layer reads it, and this checkpoint has 128 x 128 block scales. Use quantized=True, "
    "quantization_dtype='f8e4m3', quantization_type='blockwise_symmetric', "
    "quantization_block_axis=[1, 2], quantization_block_size=[128, 128]"
)
# Settings of NxDI that this model class does not serve: field, the one value it has, and why.
UNSERVED: tuple[tuple[str, Any, str], ...] = (
    ("quantized_mlp_kernel_enabled", False, QUANTIZED_MLP),
    ("mlp_kernel_enabled", False, "NxDI's MLP kernel belongs to its own dense MLP"),
    ("padding_side", "right", "with left padding every prompt gives the same garbage"),
    (
        "ep_degree",
        1,
        "it multiplies the world size beyond the cores; experts are spread with moe_ep_degree",
    ),
    ("fused_qkv", False, "query, key and value are separate projections, each with its own scales"),
    ("qkv_kernel_enabled", False, "NxDI's fused QKV kernel knows neither these scales nor norms"),
    (
        "attn_block_tkg_nki_kernel_enabled",
        False,
        "NxDI's fused attention kernel knows neither these scales nor norms",
    ),
    ("sequence_parallel_enabled", False, "it has not been run with this model"),
    ("vocab_parallel", False, "the embedding is shared along the hidden size"),
    ("flash_decoding_enabled", False, "it has not been run with this model"),
    ("cp_degree", 1, "context parallelism has not been run with this model"),
    ("attention_dp_degree", 1, "data-parallel attention has not been run with this model"),
    ("speculation_length", 0, "speculation has not been run with this model"),
    ("enable_fused_speculation", False, "speculation has not been run with this model"),
    ("is_medusa", False, "there are no Medusa heads for this model"),
    ("moe_fused_nki_kernel_enabled", None, "the fused kernel has a router of its own"),
)
DENSE_SIZE = "the intermediate size of dense layers,"
FEW_SEQUENCES = 4
TORCH = blockwise.BLOCKWISE_MATMULS[blockwise.DEFAULT]


class NeuronModelConfig(imports.InferenceConfig):
    """InferenceConfig of every family, whose `model_config` is the parsed config.json. Raises
    ConfigError for a setting that this model class does not serve.
    """

    def add_derived_config(self) -> None:
        super().add_derived_config()
        model = self.model_config
        self.head_dim = model.head_dim
        self.hidden_act = "silu"
        if getattr(self, "pad_token_id", None) is None:
            self.pad_token_id = model.eos_token_ids[0] if model.eos_token_ids else 0
        if not hasattr(self, "expert_kernel"):
            self.expert_kernel = EXPERT_KERNELS[0]
        if not hasattr(self, "expert_scales"):
            self.expert_scales = EXPERT_SCALES[0]
        if not hasattr(self, "expert_placement"):
            self.expert_placement = None
        for name in ("output_attentions", "output_hidden_states"):
            setattr(self, name, getattr(self, name, False))
        options = self.neuron_config
        if isinstance(options.torch_dtype, str):
            raise ConfigError(
                f"torch_dtype is the string {options.torch_dtype!r}; expected a torch.dtype"
            )
        if options.quantized and model.tie_word_embeddings:
            # A tied head is no weight of the checkpoint, whose list does not name it.
            head = model.family.module(Role.HEAD)
            listed = options.modules_to_not_convert or ()
            options.modules_to_not_convert = list(dict.fromkeys((*listed, head)))
        options.router_config.dtype = torch.float32
        if model.family.architecture.has_experts:
            options.router_config.act_fn = ACTIVATIONS[model.family.architecture.router]
        # The router scores, and divides by the sum of the chosen, itself, in float32.
        options.normalize_top_k_affinities = False

    def validate_config(self) -> None:
        super().validate_config()
        options = self.neuron_config
        for field, served, reason in UNSERVED:
            found = getattr(options, field, served)
            if found != served and not (served in (None, False) and not found):
                raise ConfigError(
                    f"{field}={found!r} is refused for {self.model_config.family.title} (expected "
                    f"{served!r}): {reason}"
                )
        self._validate_shares()
        if options.quantized:
            self._validate_quantization()
            self._validate_code_range()
        self._validate_expert_scales()
        self._validate_expert_kernel()
        if not options.on_cpu:
            if self.model_config.family.architecture.has_experts:
                self._validate_blockwise_matmul()
            self._validate_sampling()

    def _validate_shares(self) -> None:
        """Every rank needs one share, alike, of the experts, the hidden size and dense MLPs."""
        options = self.neuron_config
        model = self.model_config
        if model.family.architecture.shared_expert:
            raise ConfigError(
                f"{model.family.title} has an expert that every token takes, which this class does "
                "not serve on Neuron; use --backend cpu"
            )
        if not model.family.architecture.has_experts:
            if options.moe_ep_degree != 1:
                raise ConfigError(
                    f"moe_ep_degree is {options.moe_ep_degree}, and {model.family.title} has no "
                    "experts to spread; expected 1"
                )
        elif options.moe_ep_degree > model.num_local_experts:
            raise ConfigError(
                f"moe_ep_degree {options.moe_ep_degree} is more than the {model.num_local_experts} "
                "experts; choose one that is not"
            )
        elif options.moe_tp_degree * options.moe_ep_degree != options.tp_degree:
            raise ConfigError(
                f"moe_tp_degree {options.moe_tp_degree} * moe_ep_degree {options.moe_ep_degree} is "
                f"not tp_degree {options.tp_degree}; every rank needs one share of the experts"
            )
        shared = [("hidden_size", model.hidden_size, "tp_degree", options.tp_degree)]
        if model.family.architecture.has_experts:
            degree = options.moe_tp_degree
            shared.append(("intermediate_size", model.intermediate_size, "moe_tp_degree", degree))
        widths = sorted(set(self._dense_widths.values()))
        shared += [(DENSE_SIZE, width, "tp_degree", options.tp_degree) for width in widths]
        for name, size, degree_name, degree in shared:
            if size % degree:
                raise ConfigError(
                    f"{name} {size} cannot be shared by {degree_name} {degree} ranks; choose a "
                    f"divisor of {size}"
                )

    def dense_width(self, layer: int) -> int | None:
        """The intermediate size of a layer's dense MLP; None where the layer has experts."""
        model = self.model_config
        if not model.family.architecture.has_experts:
            return model.intermediate_size
        return model.dense_intermediate_size if layer in model.dense_layers else None

    @property
    def _dense_widths(self) -> dict[int, int]:
        """Layer to intermediate size, of the layers with a dense MLP."""
        layers = self.model_config.layers_of(LayerKind.DENSE)
        return {layer: width for layer in layers if (width := self.dense_width(layer))}

    def _validate_expert_kernel(self) -> None:
        options = self.neuron_config
        rows = self.model_config.weight_block_size
        if self.expert_kernel not in EXPERT_KERNELS:
            raise ConfigError(
                f"expert_kernel is {self.expert_kernel!r}; expected one of "
                f"{', '.join(EXPERT_KERNELS)}"
            )
        if self.expert_kernel == "nki" and not (self._fp8_layers and rows == (128, 128)):
            raise ConfigError(
                "expert_kernel='nki' takes FP8 experts with 128 x 128 block scales; use 'torch' "
                "for others"
            )
        sparse = self.model_config.layers_of(LayerKind.SPARSE)
        kept = [layer for layer in sparse if layer not in self._expert_layers[0]]
        if self.expert_kernel == "nki" and kept:
            raise ConfigError(
                "expert_kernel='nki' takes experts whose weights are all FP8, and in "
                f"{layers_text(kept)} modules_to_not_convert keeps some in BF16; use 'torch'"
            )
        if self.expert_kernel == "nki" and options.max_batch_size > KERNEL_TOKENS:
            raise ConfigError(
                f"expert_kernel='nki' takes batches of at most {KERNEL_TOKENS}, not "
                f"{options.max_batch_size}"
            )

    def _validate_expert_scales(self) -> None:
        if self.expert_scales not in EXPERT_SCALES:
            raise ConfigError(
                f"expert_scales is {self.expert_scales!r}; expected one of "
                f"{', '.join(EXPERT_SCALES)}"
            )
        if self.expert_scales == EXPANDED_SCALES and not self._fp8_layers:
            raise ConfigError(
                f"expert_scales is {EXPANDED_SCALES!r}, and there are no FP8 experts whose scales "
                f"could be; use {EXPERT_SCALES[0]!r}"
            )
        partly = self._expert_layers[1]
        if self._expert_scales == EXPANDED_SCALES and partly:
            raise ConfigError(
                "expanded expert_scales take experts whose weights are all FP8, and in "
                f"{layers_text(partly)} modules_to_not_convert keeps some in BF16; convert with "
                "all of them or none kept in BF16, or split experts by whole blocks"
            )

    @property
    def _expert_scales(self) -> str:
        """The layout of the scales of FP8 experts, settled."""
        degree = self.neuron_config.moe_tp_degree
        return settled_scales(self.expert_scales, self.model_config, degree)

    @property
    def _expert_layers(self) -> tuple[list[int], list[int]]:
        """The layers whose experts are FP8 whole, and those where some of their weights are."""
        return fp8_expert_layers(self.model_config, self.quantizes)

    @property
    def _fp8_layers(self) -> list[int]:
        """The layers with FP8 experts, whole or in part."""
        whole, partly = self._expert_layers
        return sorted((*whole, *partly))

    def expands_scales(self, layer: int) -> bool:
        """Return whether the ranks hold the scales of a layer's experts expanded."""
        return self._expert_scales == EXPANDED_SCALES and layer in self._fp8_layers

    @property
    def padding(self) -> Padding:
        """That of the experts, where the ranks do not divide them."""
        return Padding(self.model_config.num_local_experts, self.neuron_config.moe_ep_degree)

    def pad_experts(self, state: MutableMapping[str, torch.Tensor]) -> None:
        """Pad the experts in full checkpoint tensors."""
        self.padding.pad_experts(
            state, self.model_config, self.model_config.layers_of(LayerKind.SPARSE)
        )

    def expand_scales(self, state: MutableMapping[str, torch.Tensor]) -> None:
        """Expand the scales in full checkpoint tensors of the layers that hold them so."""
        if self._expert_scales == EXPANDED_SCALES:
            expand_scales(state, self.model_config, self._fp8_layers)

    def _validate_quantization(self) -> None:
        options = self.neuron_config
        model = self.model_config
        wanted = BLOCKWISE | {"quantization_block_size": list(model.weight_block_size)}
        for field, value in wanted.items():
            found = getattr(options, field)
            if found != value:
                raise ConfigError(
                    f"{field} is {found!r}; the block-scaled FP8 checkpoint needs {value!r}"
                )
        rows = whole_block(model)
        has_experts = model.family.architecture.has_experts
        if has_experts and self._expert_scales == BLOCK_SCALES and self._fp8_layers:
            degree = options.moe_tp_degree
            if model.intermediate_size // degree % rows:
                raise ConfigError(
                    f"intermediate_size {model.intermediate_size} over moe_tp_degree {degree} "
                    f"leaves {model.intermediate_size // degree} channels per rank, not whole "
                    f"blocks of {rows}; let their scales be expanded (expert_scales 'auto'), or "
                    "lower moe_tp_degree and raise moe_ep_degree"
                )
        for layer, width in self._dense_widths.items():
            if self.quantizes(Role.MLP_GATE, layer) and width // options.tp_degree % rows:
                raise ConfigError(
                    f"{DENSE_SIZE} {width} over tp_degree {options.tp_degree} leaves "
                    f"{width // options.tp_degree} channels per rank, not whole blocks of {rows}; "
                    "lower tp_degree, or convert with these projections kept in BF16 "
                    "(--keep-in-bf16)"
                )
        if model.hidden_size % rows:
            raise ConfigError(
                f"hidden_size {model.hidden_size} is not whole blocks of {rows}; NxD's scales need "
                "them"
            )
        if self.quantizes(Role.QUERY) and model.head_dim % rows:
            raise ConfigError(
                f"head_dim {model.head_dim} is not whole blocks of {rows}, so a rank's share of "
                "FP8 attention is not either; convert with --attention bf16"
            )

    def _validate_code_range(self) -> None:
        """Codes up to 448 (`convert --fp8-range ocp`) only where they are native."""
        largest = largest_code(self.model_config)
        if largest == NEURON_E4M3_MAX:
            return
        family = imports.get_platform_target()
        readable = instances.chip(family)["e4m3_max"]
        if largest > readable:
            raise ConfigError(
                f"the checkpoint has FP8 codes up to {largest}, and {family} reads those above "
                f"{readable} as infinity or NaN; convert with --fp8-range neuron"
            )
        casts = sorted(FP8_CASTS.keys() & os.environ.keys())
        if casts:
            raise ConfigError(
                f"the checkpoint has FP8 codes up to {largest}, and {' and '.join(casts)} would "
                f"have them read up to {NEURON_E4M3_MAX}; unset them, or convert with --fp8-range "
                "neuron"
            )

    def _validate_sampling(self) -> None:
        """SDK 2.29 names an accuracy issue at batches up to 4 where its top-k kernel is off (NxDI
        release notes).
        """
        sampling = self.neuron_config.on_device_sampling_config
        batch = self.neuron_config.max_batch_size
        if (
            sampling is None
            or not sampling.do_sample
            or getattr(sampling, "top_k_kernel_enabled", False)
        ):
            return
        if batch <= FEW_SEQUENCES and imports.get_platform_target() in SDKS["2.29"].families:
            raise ConfigError(
                f"on-device sampling with top_k_kernel_enabled=False and batch {batch}: SDK 2.29 "
                f"has a known accuracy issue at batches up to {FEW_SEQUENCES}; leave the kernel "
                "on, or sample on the host"
            )

    def _validate_blockwise_matmul(self) -> None:
        """One of NxD's ways has to be chosen: its default for two cores per rank is a kernel that
        SDK 2.29 lacks.
        """
        found = self.neuron_config.blockwise_matmul_config
        chosen = [
            way
            for way in blockwise.BLOCKWISE_MATMULS.values()
            if any(getattr(found, name) for name, value in way.settings.items() if value is True)
        ]
        if len(chosen) != 1:
            known = "; ".join(
                f"{json.dumps(way.settings)} ({way.name})"
                for way in blockwise.BLOCKWISE_MATMULS.values()
            )
            raise ConfigError(
                f"blockwise_matmul_config chooses {len(chosen)} ways to multiply blocks of tokens "
                f"with their experts; expected one of {known}: NxD's default raises "
                "NotImplementedError while context encoding is traced"
            )
        (way,) = chosen
        if way.is_kernel and self.neuron_config.logical_nc_config != 2:
            raise ConfigError(
                f"blockwise_matmul_config chooses {way.name}, a kernel for logical_nc_config 2, "
                f"not {self.neuron_config.logical_nc_config}; use {json.dumps(TORCH.settings)}"
            )
        if int(found.logical_nc_config) != self.neuron_config.logical_nc_config:
            raise ConfigError(
                f"blockwise_matmul_config has logical_nc_config {int(found.logical_nc_config)}, "
                f"the model {self.neuron_config.logical_nc_config}: NxD would leave its kernels "
                "out with only a warning; set both alike, or NEURON_LOGICAL_NC_CONFIG before "
                "anything is imported"
            )
        strategy = way.settings.get("block_sharding_strategy")
        if strategy is not None and found.block_sharding_strategy.name != strategy:
            raise ConfigError(
                f"block_sharding_strategy is {found.block_sharding_strategy.name}; {way.name} "
                f"takes {strategy} only"
            )

    @property
    def model_config(self) -> ModelConfig:
        """The model's dimensions, parsed from the same fields."""
        return ModelConfig.from_dict(vars(self))

    def quantizes(self, role: Role, layer: int = 0) -> bool:
        """Return whether NxD's rule leaves the module with the weight of this role to be
        quantized: no listed name is a substring of its dotted path.
        """
        options = self.neuron_config
        module = self.model_config.family.module(role).format(l=layer)
        return bool(options.quantized) and not names_module(
            options.modules_to_not_convert or (), module
        )

    @classmethod
    def get_neuron_config_cls(cls) -> type:
        return imports.MoENeuronConfig


def names_module(listed: Iterable[str], module: str) -> bool:
    """NxD's own rule for modules_to_not_convert (quantization/quantize.py): the last name, or any
    substring.
    """
    return any(name in module for name in listed)


def read_config(directory: str | Path) -> Callable[[Any], None]:
    """A `load_config` for InferenceConfig that takes the fields of a checkpoint's config.json.

    NxDI's own reader asks transformers, whose 4.57 has no minimax_m2.
    """
    model = ModelConfig.from_dir(directory)

    def load(config: Any) -> None:
        vars(config).update(
            {name: value for name, value in model.raw.items() if name != "torch_dtype"}
        )
        vars(config).setdefault("rope_theta", model.rope_theta)

    return load
