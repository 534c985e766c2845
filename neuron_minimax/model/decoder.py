"""The decoder of every family, over converted weights: Neuron's names and layout, FP8 as stored.

It reads `Architecture`, the family's switches, and `ModelConfig`; no family has a file of its own.
Shapes: B batch, T tokens, H hidden, V vocabulary, S cache slots.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from neuron_minimax.checkpoint.reader import Checkpoint, TensorDirectory
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.layout import Layout
from neuron_minimax.convert.plan import Converted
from neuron_minimax.convert.state_dict import convert_hf_to_neuron_state_dict
from neuron_minimax.errors import CheckpointError, GenerationError, counted
from neuron_minimax.fp8 import ScaleConvention
from neuron_minimax.kernels.reference import attend
from neuron_minimax.model.attention import Attention
from neuron_minimax.model.cache import Cache, KVCache, as_cache, heads_of
from neuron_minimax.model.layers import Kernels, Linear, RMSNorm, Step, StoredWeight
from neuron_minimax.model.masks import checked_lengths, checked_mask, checked_positions
from neuron_minimax.model.moe import DenseMLP, Router, Routing, SparseMoE
from neuron_minimax.model.parallel import Shard
from neuron_minimax.model.rope import rope_table

if TYPE_CHECKING:
    from transformers import DynamicCache

COMPUTE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
FIRST_CAPACITY = 256


class DecoderLayer(nn.Module):
    """Attention and an MLP, each behind a norm and beside a residual."""

    def __init__(self, shard: Shard, layer: int) -> None:
        super().__init__()
        config = shard.config
        self.shard = shard
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(shard, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # The family's layout names the MLP: what else its rules put into a layer.
        in_layers = {rule.target.split(".")[2] for rule in config.family.rules if rule.per_layer}
        [self.mlp_name] = in_layers - self._modules.keys()
        self.add_module(self.mlp_name, _mlp(shard, layer))

    @property
    def moe(self) -> SparseMoE:
        """The mixture of experts, which a dense layer does not have."""
        moe = self.get_submodule(self.mlp_name)
        assert isinstance(moe, SparseMoE)
        return moe

    def forward(self, hidden_BTH: torch.Tensor, step: Step) -> tuple[torch.Tensor, Routing | None]:
        """[B,T,H] to [B,T,H], and the routing where there are experts."""
        hidden_BTH = hidden_BTH + self.self_attn(self.input_layernorm(hidden_BTH), step)
        normed_BTH = self.post_attention_layernorm(hidden_BTH)
        mlp = self.get_submodule(self.mlp_name)
        if isinstance(mlp, DenseMLP):
            return hidden_BTH + self.shard.sum(mlp(normed_BTH, step)), None
        mixed_BTH, routing = mlp(normed_BTH, step)
        return hidden_BTH + self.shard.sum(mixed_BTH), routing


def _mlp(shard: Shard, layer: int) -> nn.Module:
    config = shard.config
    if not config.family.architecture.has_experts:
        return DenseMLP(shard, config.intermediate_size)
    if layer in config.dense_layers:
        return DenseMLP(shard, config.dense_intermediate_size)
    return SparseMoE(shard)


class Decoder(nn.Module):
    """The model over a converted state dict; its own `state_dict()` has the same names and tensors.

    `state` maps converted names to tensors (FP8 codes as float8_e4m3fn or uint8 with a float32
    `.scale`, or float32, or bfloat16); they are used as they are, without a copy. `compute` is the
    dtype of activations, and of the cache unless `cache_dtype` is another (KV_CACHE_DTYPES).
    Without a state the model has names and shapes only.
    Raises CheckpointError when a tensor is missing, extra, of the wrong shape, or FP8 without its
    scale. To train: `Decoder(config, initial_state(config, seed)).requires_grad_()`.

    With a `shard` it is the part of one rank, over that rank's slices; every rank of the group has
    to call it with the same tokens, and gets all logits.
    """

    def __init__(
        self,
        config: ModelConfig,
        state: Mapping[str, torch.Tensor] | None = None,
        *,
        compute: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        shard: Shard | None = None,
    ) -> None:
        super().__init__()
        shard = shard or Shard(config=config)
        self.config = config
        self.compute = compute
        self.cache_dtype = cache_dtype or compute
        self.shard = shard
        self.embed_tokens = StoredWeight(shard.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(shard, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: Linear | None = None
        if not config.tie_word_embeddings:
            block = shard.block(rows=shard.vocab_size)
            self.lm_head = Linear(config.hidden_size, shard.vocab_size, block)
        if state is not None:
            self.assign(state)

    @property
    def routers(self) -> list[Router]:
        """The router of every layer that has experts."""
        return [module for module in self.modules() if isinstance(module, Router)]

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        layout: Layout | None = None,
        *,
        config: ModelConfig | None = None,
        scale_convention: ScaleConvention | None = None,
        compute: torch.dtype = torch.float32,
    ) -> "Decoder":
        """Build the model over a published checkpoint, arranged in memory by the rules.

        `config` replaces the checkpoint's own, to change RoPE, and `scale_convention` its own
        reading of the scales. Raises ConversionError when a tensor is missing, unused or unscaled.
        """
        config = config or checkpoint.config
        convention = scale_convention or checkpoint.convention
        tensors = {name: checkpoint.tensor(name) for name in checkpoint.entries}
        state = convert_hf_to_neuron_state_dict(tensors, config, layout, convention)
        return cls(config, state, compute=compute)

    @classmethod
    def from_converted(
        cls,
        converted: str | Path | Converted,
        *,
        compute: torch.dtype = torch.float32,
        byte_codes: bool = False,
    ) -> "Decoder":
        """Build the model over a converted directory, its weights mmapped, not read.

        With `byte_codes` FP8 codes are seen as uint8, which every compiler takes. Raises
        CheckpointError or ConfigError when the directory cannot be used.
        """
        if isinstance(converted, Converted):
            tensors = converted.tensors
            config = converted.config
        else:
            tensors = TensorDirectory(converted)
            config = ModelConfig.from_dir(converted)
        state = {name: tensors.tensor(name) for name in tensors.entries}
        if byte_codes:
            state = {
                name: tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
                for name, tensor in state.items()
            }
        return cls(config, state, compute=compute)

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: "Cache | DynamicCache | None" = None,
        use_cache: bool | None = None,
        *,
        mask: str | torch.Tensor = "causal",
        position_ids: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        return_routing: bool = False,
    ) -> Any:
        """Logits [B,T,V] in the compute dtype for `input_ids` [B,T], and the cache, or None.

        `past_key_values` is a KVCache, FullCache or BatchingCache, or a DynamicCache of
        transformers; it is extended in place and returned. Without one, `use_cache=True` makes a
        KVCache. With `use_cache=False` a past is read and left as it was, and None is returned.

        Positions continue from the cache; `position_ids` [B,T] are others, for RoPE alone. `mask`
        is "causal", or says for C = past + T positions what each token sees: [T,C] or [B,T,C],
        bool, or floats that are added to scores; docs/cache.md has its rules. `lengths` [B] says
        how many of the T tokens of each sequence are real: pad on the right; padding leaves no
        trace in the cache, and its logits mean nothing. With `return_routing` a third value
        follows: one Routing per layer, tokens flattened over the batch.

        Raises GenerationError when one does not fit the others, before the cache is changed.
        """
        batch, tokens = input_ids.shape
        past = past_key_values
        if past is None and use_cache:
            capacity = max(tokens, FIRST_CAPACITY)
            past = KVCache.allocate(self.shard.own_heads, batch, capacity, self.cache_dtype)
        heads = heads_of(self.shard.own_heads, self.cache_dtype)
        cache = None if past is None else as_cache(past, batch, heads)
        before_B = torch.zeros(batch, dtype=torch.int64) if cache is None else cache.lengths
        if len(before_B) != batch:
            raise GenerationError(
                f"the cache holds {len(before_B)} sequences, but the batch has {batch}"
            )
        real_B = checked_lengths(lengths, batch, tokens)
        filled = tokens if cache is None else cache.reserve(tokens, real_B)
        steps_BT = torch.arange(tokens).expand(batch, tokens)
        positions_BT = before_B[:, None] + steps_BT
        kernels = Kernels()
        if not (isinstance(mask, str) and mask == "causal"):
            mask_BTC = checked_mask(mask, positions_BT, real_B, filled)
            kernels = Kernels(attend=partial(attend, mask_BTC=mask_BTC))
        turned_BT = checked_positions(position_ids, positions_BT)
        step = Step(
            positions_BT=positions_BT,
            rope=rope_table(self.config, turned_BT, self.compute),
            cache=cache,
            filled=filled,
            real_BT=None if lengths is None else steps_BT < real_B[:, None],
            kernels=kernels,
        )
        after_B = before_B
        try:
            hidden_BTH, routing = self.through_layers(input_ids, step)
            logits_BTV = self.logits(hidden_BTH)
            if use_cache is not False:
                after_B = before_B + real_B
        finally:
            if cache is not None:
                cache.lengths = after_B  # what a pass has written that failed is not there
        kept = None if use_cache is False else past
        return (logits_BTV, kept, routing) if return_routing else (logits_BTV, kept)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        positions_BT: torch.Tensor,
        *,
        cache: Cache | None = None,
        rows_B: torch.Tensor | None = None,
        filled: int = 0,
        real_BT: torch.Tensor | None = None,
        kernels: Kernels | None = None,
    ) -> tuple[torch.Tensor, list[Routing]]:
        """Everything but the head: [B,T,H] after the last norm, and the routing of every layer.

        Exportable. The arguments are those of `Step`; tokens that are not `real_BT` reach no
        expert. The list is empty where there are no experts.
        """
        step = Step(
            positions_BT=positions_BT,
            rope=rope_table(self.config, positions_BT, self.compute),
            cache=cache,
            rows_B=rows_B,
            filled=filled,
            real_BT=real_BT,
            kernels=kernels or Kernels(),
        )
        return self.through_layers(input_ids, step)

    def through_layers(
        self, input_ids: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, list[Routing]]:
        """What `hidden_states` returns, of a step that is made elsewhere."""
        hidden_BTH = self.embed(input_ids, step.rank).to(self.compute)
        routings = []
        for layer in self.layers:
            hidden_BTH, routing = layer(hidden_BTH, step)
            if routing is not None:
                routings.append(routing)
        return self.norm(hidden_BTH), routings

    def embed(self, ids: torch.Tensor, rank: torch.Tensor | None = None) -> torch.Tensor:
        """[...] to [...,H] in the dtype of the embedding; `rank` is that of `Step`."""
        weight_VH = self.embed_tokens.weight
        if self.shard.tp_degree == 1:
            return F.embedding(ids, weight_VH)
        first_row = (self.shard.rank if rank is None else rank) * self.shard.vocab_size
        rows = ids - first_row
        here = (rows >= 0) & (rows < self.shard.vocab_size)
        embedded = F.embedding(torch.where(here, rows, 0), weight_VH)
        return self.shard.sum(torch.where(here[..., None], embedded, 0))

    def logits(self, hidden: torch.Tensor, kernels: Kernels | None = None) -> torch.Tensor:
        """Logits [...,V] of final hidden states [...,H]; a tied head is the embedding."""
        kernels = kernels or Kernels()
        if self.lm_head is not None:
            logits = self.lm_head(hidden, kernels)
        else:
            block = self.config.weight_block_size
            logits = kernels.linear(hidden, self.embed_tokens.weight, None, block)
        if self.shard.tp_degree == 1:
            return logits
        return self.shard.concatenate(logits)[..., : self.config.vocab_size]

    def assign(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take every tensor of a state dict; CheckpointError as when the model is made."""
        # NxD's rank tensors depend on the tp degree and mean nothing to a model on one device.
        ranks = self.config.family.rank_names(self.config.num_hidden_layers)
        left = {name: tensor for name, tensor in state.items() if name not in ranks}
        for name, module in self.named_modules():
            if isinstance(module, (StoredWeight, Router)):
                module.assign(name, left)
        if left:
            raise CheckpointError(
                f"the state dict holds {counted(len(left), 'tensor')} that this model has no "
                f"place for, such as {min(left)}; expected the converted names of a checkpoint "
                "with this config.json"
            )


def initial_state(
    config: ModelConfig, seed: int, standard_deviation: float = 0.02
) -> dict[str, torch.Tensor]:
    """A fresh float32 state dict of converted names: normal weights, unit norms, zero biases."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in Decoder(config).state_dict().items():
        shape = tuple(tensor.shape)
        if len(shape) > 1:
            state[name] = torch.empty(shape).normal_(0.0, standard_deviation, generator=generator)
        else:
            state[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    return state
