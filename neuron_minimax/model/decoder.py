"""MiniMax-M2 in torch, over the converted checkpoint: Neuron names, Neuron layout, FP8 codes
resident.

Shapes: B batch, T tokens, H hidden, V vocabulary, S cache slots. The oracle is transformers'
MiniMaxM2ForCausalLM.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import CheckpointError, GenerationError
from neuron_minimax.model.attention import Attention
from neuron_minimax.model.cache import KVCache
from neuron_minimax.model.layers import Kernels, Linear, RMSNorm, Weight
from neuron_minimax.model.moe import Router, Routing, SparseMoE
from neuron_minimax.model.rope import rope_table

COMPUTE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
FIRST_CAPACITY = 256


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block_sparse_moe = SparseMoE(config)

    def forward(
        self,
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        cache: KVCache | None,
        rows_B: torch.Tensor | None,
        filled: int,
        real_BT: torch.Tensor | None,
        kernels: Kernels,
    ) -> tuple[torch.Tensor, Routing]:
        normed_BTH = self.input_layernorm(hidden_BTH)
        hidden_BTH = hidden_BTH + self.self_attn(
            normed_BTH, positions_BT, rope, cache, rows_B, filled, kernels
        )
        mixed_BTH, routing = self.block_sparse_moe(
            self.post_attention_layernorm(hidden_BTH), real_BT, kernels
        )
        return hidden_BTH + mixed_BTH, routing


class MiniMaxM2(nn.Module):
    """The model over a converted state dict; its own `state_dict()` has the same names and tensors.

    `state` maps converted names to tensors (FP8 codes as float8_e4m3fn or uint8 with a float32
    `.scale`, or float32, or bfloat16); they are used as they are, without a copy. `compute` is the
    dtype of activations and of the cache. Without a state the model has names and shapes only.
    Raises CheckpointError when a tensor is missing, extra, of the wrong shape, or FP8 without its
    scale. To train: `MiniMaxM2(config, initial_state(config, seed)).requires_grad_()`.
    """

    def __init__(
        self,
        config: ModelConfig,
        state: Mapping[str, torch.Tensor] | None = None,
        *,
        compute: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.compute = compute
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, config.weight_block_size)
        if state is not None:
            self._assign(state)

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        *,
        lengths: torch.Tensor | None = None,
        return_routing: bool = False,
    ) -> Any:
        """Logits [B,T,V] in the compute dtype for `input_ids` [B,T], and the cache (None unless
        used).

        Positions continue from the cache. `lengths` [B] says how many of the T tokens of each
        sequence are real: pad on the right; padding leaves no trace in the cache, and its logits
        mean nothing. With `return_routing` a third value follows: one Routing per layer, tokens
        flattened over the batch.
        """
        batch, tokens = input_ids.shape
        if past_key_values is None and use_cache:
            past_key_values = KVCache.allocate(
                self.config, batch, max(tokens, FIRST_CAPACITY), self.compute
            )
        steps_BT = torch.arange(tokens).expand(batch, tokens)
        real_BT = None if lengths is None else steps_BT < lengths[:, None]
        if past_key_values is None:
            hidden_BTH, routing = self.hidden_states(input_ids, steps_BT, real_BT=real_BT)
            logits_BTV = self.lm_head(hidden_BTH, Kernels())
            return (logits_BTV, None, routing) if return_routing else (logits_BTV, None)
        cache = past_key_values
        if cache.slots != batch:
            raise GenerationError(
                f"the cache holds {cache.slots} sequences, but the batch has {batch}"
            )
        filled = int(cache.lengths.max()) + tokens
        cache.reserve(filled)
        positions_BT = cache.lengths[:, None] + steps_BT
        hidden_BTH, routing = self.hidden_states(
            input_ids, positions_BT, cache=cache, filled=filled, real_BT=real_BT
        )
        cache.lengths = cache.lengths + (tokens if lengths is None else lengths)
        logits_BTV = self.lm_head(hidden_BTH, Kernels())
        return (logits_BTV, cache, routing) if return_routing else (logits_BTV, cache)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        positions_BT: torch.Tensor,
        *,
        cache: KVCache | None = None,
        rows_B: torch.Tensor | None = None,
        filled: int = 0,
        real_BT: torch.Tensor | None = None,
        kernels: Kernels | None = None,
    ) -> tuple[torch.Tensor, list[Routing]]:
        """Everything but the head: [B,T,H] after the last norm, and the routing of every layer.
        Exportable.

        `rows_B` are the cache slots of the batch rows (None: the batch is all slots, in order);
        `filled` is how many cache positions attention reads; tokens that are not `real_BT` reach no
        expert.
        """
        kernels = kernels or Kernels()
        hidden_BTH = F.embedding(input_ids, self.embed_tokens.weight).to(self.compute)
        rope = rope_table(self.config, positions_BT, self.compute)
        routings = []
        for layer in self.layers:
            hidden_BTH, routing = layer(
                hidden_BTH, positions_BT, rope, cache, rows_B, filled, real_BT, kernels
            )
            routings.append(routing)
        return self.norm(hidden_BTH), routings

    def _assign(self, state: Mapping[str, torch.Tensor]) -> None:
        # NxD's rank tensors depend on the tp degree and mean nothing to a model on one device.
        ranks = self.config.family.rank_names(self.config.num_hidden_layers)
        left = {name: tensor for name, tensor in state.items() if name not in ranks}
        for name, module in self.named_modules():
            if isinstance(module, Weight):
                weight = left.pop(f"{name}.weight", None)
                if weight is None:
                    raise CheckpointError(
                        f"{name}.weight is missing from the state dict; convert the checkpoint "
                        "again"
                    )
                module.assign(name, weight, left.pop(f"{name}.scale", None))
            elif isinstance(module, Router):
                for buffer, _ in module.named_buffers(name, recurse=False):
                    module.assign_bias(buffer, left.pop(buffer, None))
        if left:
            raise CheckpointError(
                f"the state dict holds {len(left)} tensors that this model has no place for, such "
                f"as {min(left)}; expected the converted names of a checkpoint with this "
                "config.json"
            )


def load_model(directory: str | Path, *, compute: torch.dtype = torch.float32) -> MiniMaxM2:
    """The model over a converted directory, its weights mmapped, not read. Errors: CheckpointError,
    ConfigError.
    """
    from neuron_minimax.checkpoint.reader import TensorDirectory

    tensors = TensorDirectory(directory)
    state = {name: tensors.tensor(name) for name in tensors.entries}
    return MiniMaxM2(ModelConfig.from_dir(directory), state, compute=compute)


def initial_state(
    config: ModelConfig, seed: int, standard_deviation: float = 0.02
) -> dict[str, torch.Tensor]:
    """A fresh float32 state dict of converted names: normal weights, unit norms, zero router
    bias.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in _shapes(config).items():
        if len(shape) > 1:
            state[name] = torch.empty(shape).normal_(0.0, standard_deviation, generator=generator)
        else:
            state[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    return state


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Converted name to shape of every weight, without scales."""
    return {name: tuple(tensor.shape) for name, tensor in MiniMaxM2(config).state_dict().items()}
