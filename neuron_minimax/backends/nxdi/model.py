"""The decoder of every family on NxDI: its layers, the model NxDI traces, and the application class
that loads and compiles it. It reads `Architecture`; no family has a class of its own.

Shapes: B batch, T tokens, H hidden.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuron_minimax.backends.nxdi import coverage, imports
from neuron_minimax.backends.nxdi.attention import NeuronAttention
from neuron_minimax.backends.nxdi.config import NeuronModelConfig
from neuron_minimax.backends.nxdi.mlp import NeuronMLP
from neuron_minimax.backends.nxdi.moe import build_moe
from neuron_minimax.backends.nxdi.norms import WholeRMSNorm
from neuron_minimax.backends.nxdi.options import float32_endings, rounded_weights, rounding_note
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.convert.layout import AttentionPrecision, Layout
from neuron_minimax.convert.state_dict import convert_hf_to_neuron_state_dict
from neuron_minimax.errors import CheckpointError
from neuron_minimax.families import Family, Role
from neuron_minimax.planner.memory import NEURON_E4M3_MAX, largest_code
from neuron_minimax.planner.placement import Placement

logger = logging.getLogger(__name__)


def hidden_norm(config: NeuronModelConfig) -> WholeRMSNorm:
    """An RMSNorm over the hidden size."""
    model = config.model_config
    return WholeRMSNorm(model.hidden_size, model.rms_norm_eps, config.neuron_config.torch_dtype)


def mlp_name(family: Family) -> str:
    """What the family's layout calls the MLP of a layer, dense or a mixture of experts."""
    role = Role.EXPERT_DOWN if family.architecture.has_experts else Role.MLP_DOWN
    return family.rule_of(role).target.split(".")[2]


class NeuronDecoderLayer(nn.Module):
    """Pre-norm attention, then a pre-norm MLP or mixture of experts, each added to the residual
    stream.
    """

    def __init__(self, config: NeuronModelConfig, layer: int) -> None:
        super().__init__()
        model = config.model_config
        quantized = config.quantizes(Role.QUERY, layer)
        self.self_attn = NeuronAttention(config, quantized=quantized)
        self.mlp_name = mlp_name(model.family)
        width = config.dense_width(layer)
        mlp = build_moe(config, layer) if width is None else NeuronMLP(config, layer, width)
        self.add_module(self.mlp_name, mlp)
        self.input_layernorm = hidden_norm(config)
        self.post_attention_layernorm = hidden_norm(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_value: Any = None,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple:
        """[B,T,H] to (hidden [B,T,H], key and value of this call, cosine, sine, no separate
        residual).
        """
        # The markers tell the compiler where layers end; on a CPU they would call it.
        hidden_BTH = (
            hidden_states
            if imports.cpu_mode()
            else imports.ModuleMarkerStartWrapper()(hidden_states)
        )
        attended_BTH, present_key_value, cosine, sine = self.self_attn(
            hidden_states=self.input_layernorm(hidden_BTH),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            **kwargs,
        )
        hidden_BTH = hidden_BTH + attended_BTH
        normed_BTH = self.post_attention_layernorm(hidden_BTH)
        mlp = self.get_submodule(self.mlp_name)
        if isinstance(mlp, NeuronMLP):
            mixed_BTH = mlp(normed_BTH)
        else:
            mixed_BTH = mlp(normed_BTH, padding_mask)[0]
        hidden_BTH = hidden_BTH + mixed_BTH
        if not imports.cpu_mode():
            hidden_BTH = imports.ModuleMarkerEndWrapper()(hidden_BTH)
        return hidden_BTH, present_key_value, cosine, sine, None


class NeuronDecoderModel(imports.NeuronBaseModel):
    """The module that NxDI traces per submodel and bucket."""

    def setup_attr_for_model(self, config: NeuronModelConfig) -> None:
        options = config.neuron_config
        model = config.model_config
        self.on_device_sampling = options.on_device_sampling_config is not None
        self.tp_degree = options.tp_degree
        self.hidden_size = model.hidden_size
        self.num_attention_heads = model.num_attention_heads
        self.num_key_value_heads = model.num_key_value_heads
        self.max_batch_size = options.max_batch_size
        self.buckets = options.buckets

    def init_model(self, config: NeuronModelConfig) -> None:
        options = config.neuron_config
        model = config.model_config
        self.padding_idx = config.pad_token_id
        self.embed_tokens = imports.ParallelEmbedding(
            model.vocab_size,
            model.hidden_size,
            None,
            dtype=options.torch_dtype,
            shard_across_embedding=True,
        )
        self.layers = nn.ModuleList(
            NeuronDecoderLayer(config, layer) for layer in range(model.num_hidden_layers)
        )
        self.norm = hidden_norm(config)
        self.lm_head = imports.ColumnParallelLinear(
            model.hidden_size,
            model.vocab_size,
            bias=False,
            pad=True,
            gather_output=not self.on_device_sampling,
            # NxDI masks as many logits at the end as there are padded rows: they have to be there.
            keep_padded_output=True,
            dtype=options.torch_dtype,
        )

    def preshard_hook(self, model_state_dict: dict, prefix: str) -> bool:
        """NxD calls this before it shards: run every module's own hook, pad the experts and expand
        their scales where the ranks hold them so, then insist on full coverage.
        """
        for name, child in self.named_children():
            imports.invoke_preshard_hook(child, model_state_dict, f"{name}.")
        self.config.pad_experts(model_state_dict)
        self.config.expand_scales(model_state_dict)
        coverage.check_checkpoint(
            coverage.parameters_of(self), model_state_dict, self.config.padding.held
        )
        return True

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load as torch does, but a parameter without a value or a value without a parameter raises
        CheckpointError.
        """
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        coverage.check_loaded(coverage.parameters_of(self), state_dict.keys())
        return result


class NeuronForCausalLM(imports.CausalLM):
    """The application of every family: `compile`, `load`, `to_cpu` and `forward` are NxDI's."""

    _model_cls = NeuronDecoderModel

    @classmethod
    def get_config_cls(cls) -> type:
        return NeuronModelConfig

    @classmethod
    def get_state_dict(cls, model_name_or_path: str, config: NeuronModelConfig) -> dict:
        """The state dict of a converted directory or of a Hugging Face checkpoint, lazily
        mapped.
        """
        if not Path(model_name_or_path).is_dir():
            raise CheckpointError(
                f"{model_name_or_path} is no directory; expected a converted checkpoint"
            )
        tensors = TensorDirectory(model_name_or_path)
        tensors.require_usable()
        state = {name: tensors.tensor(name) for name in tensors.entries}
        converted = cls.convert_hf_to_neuron_state_dict(state, config)
        return with_a_head(converted, config.model_config.family)

    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict: dict, config: NeuronModelConfig) -> dict:
        """Hugging Face names become the converted ones by the project's rules; converted names
        pass.

        The rank tensors, which depend on the tensor-parallel degree, are added to both.
        """
        options = config.neuron_config
        if any(name.startswith("model.") for name in state_dict):
            projections = f".{config.model_config.family.attention_module}."
            # BF16 is a choice against FP8 only; what is stored otherwise stays as it is.
            stored_fp8 = any(
                coverage.is_fp8(tensor)
                for name, tensor in state_dict.items()
                if projections in name
            )
            to_bf16 = stored_fp8 and not config.quantizes(Role.QUERY)
            attention = AttentionPrecision.BF16 if to_bf16 else AttentionPrecision.FP8
            layout = Layout(attention=attention, tp_degree=options.tp_degree)
            return convert_hf_to_neuron_state_dict(state_dict, config.model_config, layout)
        model = config.model_config
        names = model.family.rank_names(model.num_hidden_layers)
        # Each its own tensor: a rank's weights are saved to a file, which refuses shared memory.
        return state_dict | {
            name: torch.arange(options.tp_degree, dtype=torch.int32) for name in names
        }

    @classmethod
    def save_quantized_state_dict(cls, model_path: str, config: NeuronModelConfig) -> None:
        """vllm-neuron asks for quantized weights before it compiles: they have to be there, this
        class rounds none.

        Raises CheckpointError when quantized_checkpoints_path holds no FP8 weights.
        """
        directory = config.neuron_config.quantized_checkpoints_path
        if not any(
            entry.dtype == "F8_E4M3" for entry in TensorDirectory(directory).entries.values()
        ):
            raise CheckpointError(
                f"{directory} has no FP8 weights; quantized_checkpoints_path has to be a converted "
                "directory"
            )

    def checkpoint_loader_fn(self, mmap: bool = False) -> dict:
        """The tensors that NxDI shards: dense weights in `torch_dtype`, FP8 codes and scales as
        stored, the router float32.
        """
        options = self.config.neuron_config
        directory = options.quantized_checkpoints_path if options.quantized else self.model_path
        state = self.get_state_dict(str(directory), self.config)
        family = self.config.model_config.family
        if self.config.expert_placement:
            # Renumbered experts are copies in host memory, 3.6 GB per layer of the real model.
            state = (
                Placement.load(self.config.expert_placement)
                .for_ranks(options.moe_ep_degree)
                .apply(state, family)
            )
        rounded = rounded_weights(
            ((name, tensor.dtype == torch.float32) for name, tensor in state.items()), family
        )
        if rounded and options.torch_dtype == torch.bfloat16:
            logger.warning("%s", rounding_note(rounded))
        kept = float32_endings(family)
        return {
            name: tensor.to(torch.float32)
            if name.endswith(kept)
            else cast_for(tensor, options.torch_dtype)
            for name, tensor in state.items()
        }

    def enable_context_encoding(self, **model_init_kwargs: Any) -> None:
        self.compile_tag = imports.CONTEXT_ENCODING_MODEL_TAG
        super().enable_context_encoding(**model_init_kwargs)
        self._read_fp8_as_the_chip_does()

    def enable_token_generation(
        self, enable_wlt_optimization: bool = True, **model_init_kwargs: Any
    ) -> None:
        self.compile_tag = imports.TOKEN_GENERATION_MODEL_TAG
        super().enable_token_generation(enable_wlt_optimization, **model_init_kwargs)
        self._read_fp8_as_the_chip_does()

    def _read_fp8_as_the_chip_does(self) -> None:
        """Take the compiler's FP8 switch away for codes up to 448, of which it would read those
        above 240 as infinity.

        NxDI adds it on every chip; it is for trn1 and trn2 (compiler error page NCC_EVRF051).
        """
        if largest_code(self.config.model_config) > NEURON_E4M3_MAX:
            wrapper = self.models[-1]
            wrapper.compiler_args = wrapper.compiler_args.replace(imports.READ_FP8_AS_IEEE, "")

    def get_compiler_args(self) -> str:
        """neuronx-cc options of the submodel being enabled. NxDI adds the FP8 one when the config
        is quantized.

        `--auto-cast=none` keeps the router and the norms in float32. Context encoding takes -O1,
        whose modular flow compiles one layer and reuses it. Gathers and scatters take their
        addresses on the device.
        """
        options = self.neuron_config
        context_encoding = self.compile_tag == imports.CONTEXT_ENCODING_MODEL_TAG
        tiling = options.cc_pipeline_tiling_factor if context_encoding else 1
        parts = [
            "--model-type=transformer",
            "--auto-cast=none",
            "--enable-saturate-infinity",
            "--enable-mixed-precision-accumulation",
            f"--lnc={options.logical_nc_config}",
            "--tensorizer-options='--enable-ccop-compute-overlap "
            f"--cc-pipeline-tiling-factor={tiling}'",
            "--internal-enable-dge-levels vector_dynamic_offsets",
            "-O1" if context_encoding or options.moe_ep_degree == 1 else "-O3",
        ]
        if options.scratchpad_page_size:
            parts.append(f"--hbm-scratchpad-page-size={options.scratchpad_page_size}")
        return " ".join(parts)


def with_a_head(state: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """The state dict, its head made of the embedding where none is stored.

    A copy, as NxDI makes one of tied weights: ranks share the embedding along the hidden size and
    the head along the vocabulary.
    """
    head = family.rule_of(Role.HEAD).target
    if head in state:
        return state
    return state | {head: state[family.rule_of(Role.EMBEDDING).target].clone()}


def cast_for(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A dense tensor in `dtype`; FP8 codes and whole numbers as they are."""
    if tensor.is_floating_point() and tensor.dtype != torch.float8_e4m3fn:
        return tensor.to(dtype)
    return tensor
