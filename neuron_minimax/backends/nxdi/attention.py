"""NxDI attention for every family: the QK norm and biases that its `Architecture` names, RoPE over
its rotary channels, block-scaled FP8 projections.

Shapes: B batch, T tokens, H hidden, W a rank's width of the query or key projection, N heads of a
rank, D head_dim.
"""

from collections.abc import Mapping
from typing import Any

import torch

from neuron_minimax.backends.nxdi import imports
from neuron_minimax.backends.nxdi.heads import rearrange
from neuron_minimax.backends.nxdi.mlp import BlockQuantization
from neuron_minimax.backends.nxdi.norms import FullWidthRMSNorm, WholeRMSNorm
from neuron_minimax.errors import BackendError
from neuron_minimax.families import Family, Role
from neuron_minimax.families.family import QKNorm
from neuron_minimax.model.rope import rope_table, rotate
from neuron_minimax.planner.sharding import HeadLayout, head_layout


class NeuronQKVProjection(imports.GroupQueryAttention_QKV):
    """The three projections; heads are placed by `HeadLayout`, scales and biases together with
    their weights.
    """

    def __init__(
        self,
        layout: HeadLayout,
        quantization: BlockQuantization | None,
        family: Family,
        **options: Any,
    ) -> None:
        super().__init__(gather_output=False, **options)
        self.layout = layout
        self.family = family
        require_layout(self, layout)
        if quantization is not None:
            query = self.num_attention_heads * self.head_dim
            key_value = self.num_key_value_heads * self.head_dim
            self.q_proj = quantization.column(self.hidden_size, query, self.bias)
            self.k_proj = quantization.column(self.hidden_size, key_value, self.bias)
            self.v_proj = quantization.column(self.hidden_size, key_value, self.bias)

    def preshard_hook(self, model_state_dict: dict, prefix: str) -> bool:
        """Before sharding: full checkpoint tensors become the padded, replicated ones. NxD's own
        hook refuses block scales and renames, which the project's conversion has done.
        """
        module = prefix.removesuffix(".weight")
        queries = self._src_num_attention_heads
        keys = self._src_num_key_value_heads
        for role, heads, slots in (
            (Role.QUERY, queries, self.layout.query_slots),
            (Role.KEY, keys, self.layout.key_value_slots),
            (Role.VALUE, keys, self.layout.key_value_slots),
        ):
            name = self.family.module_name(role)
            rearrange(model_state_dict, f"{module}.{name}", 0, heads, slots)
        return True


class NeuronOutputProjection(imports.GroupQueryAttention_O):
    """The output projection; its columns follow the padded query heads."""

    def __init__(
        self,
        layout: HeadLayout,
        quantization: BlockQuantization | None,
        family: Family,
        **options: Any,
    ) -> None:
        super().__init__(input_is_parallel=True, **options)
        self.layout = layout
        self.family = family
        require_layout(self, layout)
        if quantization is not None:
            self.o_proj = quantization.row(
                self.num_attention_heads * self.head_dim, self.hidden_size
            )

    def preshard_hook(self, model_state_dict: dict, prefix: str) -> bool:
        """Do what `NeuronQKVProjection.preshard_hook` does, along the input dimension."""
        module = prefix.removesuffix(".weight")
        rearrange(
            model_state_dict,
            f"{module}.{self.family.module_name(Role.OUTPUT)}",
            1,
            self._src_num_attention_heads,
            self.layout.query_slots,
        )
        return True


def require_layout(projection: Any, layout: HeadLayout) -> None:
    """Raise BackendError unless this NxDI version counts heads as `head_layout` does."""
    found = (projection.num_attention_heads, projection.num_key_value_heads)
    wanted = (len(layout.query_slots), len(layout.key_value_slots))
    if found != wanted:
        raise BackendError(
            f"NxDI {imports.versions()['neuronx-distributed-inference']} pads to {found} query and "
            f"key/value heads at tp_degree {layout.tp_degree}; expected {wanted}: this version "
            "shards attention in a way not known here"
        )


class NeuronAttention(imports.NeuronAttentionBase):
    """Attention of one layer. `quantized` chooses block-scaled FP8 projections; else they are
    `torch_dtype`.
    """

    def __init__(self, config: Any, *, quantized: bool) -> None:
        self.model_config = config.model_config
        self.block_quantized = quantized
        model = self.model_config
        super().__init__(
            config,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            rms_norm_eps=model.rms_norm_eps,
        )

    def init_gqa_properties(self) -> None:
        """Build what the base class builds here, with this project's projections and norms."""
        model = self.model_config
        group = self.tensor_model_parallel_group
        layout = head_layout(model.num_attention_heads, model.num_key_value_heads, self.tp_degree)
        quantization = (
            BlockQuantization(model.weight_block_size, self.torch_dtype, group)
            if self.block_quantized
            else None
        )
        shared: Mapping[str, Any] = {
            "hidden_size": self.hidden_size,
            "head_dim": self.head_dim,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_key_value_heads,
            "tp_degree": self.tp_degree,
            "dtype": self.torch_dtype,
            "tensor_model_parallel_group": group,
            "logical_nc_config": self.logical_nc_config,
        }
        self.qkv_proj = NeuronQKVProjection(
            layout,
            quantization,
            model.family,
            bias=model.family.architecture.qkv_bias,
            rms_norm_eps=model.rms_norm_eps,
            **shared,
        )
        self.o_proj = NeuronOutputProjection(
            layout, quantization, model.family, rpl_reduce_dtype=self.rpl_reduce_dtype, **shared
        )
        self._init_norms(layout)
        self.learned_sinks = None
        self.num_heads = layout.query_heads_per_rank
        self._src_num_key_value_heads = model.num_key_value_heads
        self.num_key_value_heads = layout.key_value_heads_per_rank
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.qkv_sharding_strategy = self.qkv_proj.sharding_strategy

    def _init_norms(self, layout: HeadLayout) -> None:
        """The norms of queries and keys that the family has; NONE leaves both out."""
        model = self.model_config
        self.norms = model.family.architecture.qk_norm
        if self.norms is QKNorm.PER_HEAD:
            self.q_norm = WholeRMSNorm(self.head_dim, model.rms_norm_eps, self.torch_dtype)
            self.k_norm = WholeRMSNorm(self.head_dim, model.rms_norm_eps, self.torch_dtype)
        elif self.norms is QKNorm.FULL_WIDTH:
            norm = {
                "head_dim": self.head_dim,
                "eps": model.rms_norm_eps,
                "group": self.tensor_model_parallel_group,
                "dtype": self.torch_dtype,
            }
            self.q_norm = FullWidthRMSNorm(
                heads=model.num_attention_heads, slots=layout.query_slots, copies=1, **norm
            )
            self.k_norm = FullWidthRMSNorm(
                heads=model.num_key_value_heads,
                slots=layout.key_value_slots,
                copies=layout.key_value_copies,
                **norm,
            )

    def prep_qkv_tensors(  # noqa: PLR0913 (NxDI calls it)
        self,
        position_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        past_key_value: Any,
        adapter_ids: Any = None,
        cos_cache: Any = None,
        sin_cache: Any = None,
        rmsnorm: Any = None,
        skip_rope: bool = False,
        residual: Any = None,
        use_polar_compatible_rope: bool = False,
    ) -> tuple:
        """Query, key and value [B,N,T,D], the first two normed as the family does, then rotated in
        float32.
        """
        batch, tokens, _ = hidden_states.shape
        query_BTW, key_BTW, value_BTW, residual = self.qkv_proj(
            hidden_states=hidden_states, residual=residual
        )
        if self.norms is QKNorm.FULL_WIDTH:
            query_BTW = self.q_norm(query_BTW)
            key_BTW = self.k_norm(key_BTW)
        per_head = self.norms is QKNorm.PER_HEAD
        query, key, value = (
            imports.move_heads_front(projected, batch, tokens, heads, self.head_dim, layernorm=norm)
            for projected, heads, norm in (
                (query_BTW, self.num_heads, self.q_norm if per_head else None),
                (key_BTW, self.num_key_value_heads, self.k_norm if per_head else None),
                (value_BTW, self.num_key_value_heads, None),
            )
        )
        if not skip_rope:
            if cos_cache is None or sin_cache is None:
                # The angles are made where the positions are: a constant moved to the device would
                # become an input.
                with position_ids.device:
                    cosine, sine = rope_table(self.model_config, position_ids, torch.float32)
                cos_cache = cosine.transpose(1, 2)
                sin_cache = sine.transpose(1, 2)
            query = rotate(query.float(), (cos_cache, sin_cache)).to(query.dtype)
            key = rotate(key.float(), (cos_cache, sin_cache)).to(key.dtype)
        return query, key, value, cos_cache, sin_cache, residual
