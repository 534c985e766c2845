"""The models in the form that vLLM-Neuron's runner calls (0.21 and later), and the entry point of
`vllm.general_plugins`, which leaves earlier ones, over NxDI, to backends/nxdi.

Source of the form: "How to onboard a model to vLLM Neuron" and the runner's own source, of 0.24.
Shapes: T tokens of a step, B sequences, M blocks of a sequence, R sampled positions, V vocabulary,
H hidden, C candidates of sampling.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from neuron_minimax.backends.torch_neuron.caches import BlockCache
from neuron_minimax.backends.torch_neuron.graphs import RankGraph
from neuron_minimax.backends.torch_neuron.weights import load_rank, shard_of
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.plan import Converted
from neuron_minimax.errors import BackendError, ConfigError, shown
from neuron_minimax.model.parallel import Shard

# Of config.json, what --hf-overrides may clear: whether weights are FP8 is read off the directory.
CLEARED = ("raw", "declares_fp8", "modules_to_not_convert")
COMPUTE_DTYPES = (torch.bfloat16, torch.float32)
# Settings of vLLM-Neuron that change what a model computes, and what they are without being set;
# versions differ in which they have.
NEURON_SETTINGS: Mapping[str, Any] = {
    "attention_dp_size": 1,
    "embedding_dp_size": 1,
    "lm_head_dp_size": 1,
    "mlp_dp_size": 1,
    "quantization": None,
    "modules_to_not_convert": None,
    "tensor_replacement": None,
    "fp8_packed_kv": False,
}
SAMPLING_SETTINGS: Mapping[str, Any] = {
    "deterministic": False,
    "sampling_dp_degree": 1,
    "capture_topk": False,
}
MAX_TOP_K = 256  # vLLM-Neuron's own default
# What config.json names. vLLM-Neuron registers its own classes after every plugin and so keeps a
# name that is among them; the last is ours alone, for `--hf-overrides`, and takes every family.
ARCHITECTURES = ("MiniMaxM2ForCausalLM", "Qwen3MoeForCausalLM", "NeuronMinimaxForCausalLM")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OnDeviceSampling:
    """The likeliest token alone, or one of the `max_top_k` likeliest."""

    all_greedy: bool = False
    max_top_k: int = MAX_TOP_K


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """One rank of a model in vLLM's group. Without `sampling` logits are returned, and vLLM samples
    on the host; with it, tokens, and logits too where `returns_logits`.
    """

    shard: Shard
    compute: torch.dtype = torch.bfloat16
    sampling: OnDeviceSampling | None = None
    returns_logits: bool = False

    @classmethod
    def from_configs(cls, hf_config: Any, neuron_config: Any = None) -> Self:
        """Read vLLM's config.json, vLLM-Neuron's settings and this process's place in vLLM's
        groups.

        Raises ConfigError when the model cannot be divided so, and BackendError for a setting that
        it does not serve.
        """
        raw = hf_config.to_dict()
        if not (raw.get("quantization_config") or {}).get("quant_method"):
            raw.pop("quantization_config", None)  # what vLLM leaves of one that is cleared
        _require_defaults(neuron_config, NEURON_SETTINGS, "neuron_config")
        return cls(
            shard=_shard_in_vllm(ModelConfig.from_dict(raw)),
            compute=_compute_dtype(raw),
            sampling=_sampling(getattr(neuron_config, "on_device_sampling_config", None)),
            returns_logits=bool(
                getattr(neuron_config, "max_logprobs", 0)
                or getattr(neuron_config, "debug_logits_dir", None)
            ),
        )


class ConvertedForCausalLM(nn.Module):
    """A converted model of any family for vLLM-Neuron's runner, which makes it under
    `torch.device("meta")`, loads its weights, moves it to the device, binds the cache, and compiles
    `forward` for each bucket.
    """

    graph: RankGraph

    def __init__(self, config: RankConfig, vllm_config: object = None, prefix: str = "") -> None:
        """vLLM takes a class for a generating model that has `vllm_config`, `embed_input_ids` and
        `compute_logits`; its Neuron runner uses none of them.
        """
        super().__init__()
        self.config = config

    @classmethod
    def from_configs(cls, hf_config: Any, neuron_config: Any = None) -> Self:
        return cls(RankConfig.from_configs(hf_config, neuron_config))

    @property
    def layer_names(self) -> list[str]:
        """The keys of `attn_metadata` and of the caches."""
        layers = range(self.config.shard.config.num_hidden_layers)
        return [f"layers.{layer}.self_attn" for layer in layers]

    def load_weights(
        self, checkpoint_path: str | Path, device: object = None, cache_dir: object = None
    ) -> None:
        """Read this rank's slices of a converted directory into host memory; the runner moves them.

        Raises ConversionError, naming the command, when it is no converted directory, ConfigError
        when vLLM has changed its config.json, and CheckpointError as `load_rank` does.
        """
        converted = Converted.open(checkpoint_path, read_shards=False)
        _require_same(self.config.shard.config, converted.config, converted.directory)
        with converted.reading():
            rank = load_rank(converted.directory, self.config.shard, self.config.compute)
        self.graph = RankGraph(rank.model)

    def load_weights_lite(
        self, checkpoint_path: str | Path, device: object = None, cache_dir: object = None
    ) -> None:
        """Refuse what VLLM_NEURON_CPU_COMPILE asks for: a graph depends on the stored dtypes."""
        raise BackendError(
            "the graphs of converted weights cannot be compiled without them; unset "
            "VLLM_NEURON_CPU_COMPILE and start vLLM on the instance"
        )

    def get_kv_spec(self) -> Any:
        """The cache of every layer, of this rank's heads."""
        from vllm_neuron.model.kv_cache import KVSpec, LayerSpec

        shard = self.config.shard
        return KVSpec(
            layers=[
                LayerSpec(
                    name=name,
                    num_kv_heads=shard.key_value_heads,
                    head_size=shard.config.head_dim,
                    dtype=self.config.compute,
                )
                for name in self.layer_names
            ]
        )

    def bind_kv_cache(self, kv_caches: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Take keys and values [blocks, heads, block size, head_dim] of every layer, in place.

        Raises BackendError when a layer's are missing or otherwise.
        """
        shard = self.config.shard
        wanted = (shard.key_value_heads, shard.config.head_dim, self.config.compute)
        for name in self.layer_names:
            pair = kv_caches.get(name, ())
            for cache in pair:
                found = (*cache.shape[1::2], cache.dtype)
                if cache.dim() != 4 or found != wanted:
                    raise BackendError(
                        f"the cache of {name} is {list(cache.shape)} in {cache.dtype}; expected "
                        f"[blocks, {wanted[0]}, block size, {wanted[1]}] in {wanted[2]}: leave "
                        "--kv-cache-dtype at auto"
                    )
            if len(pair) != 2:
                raise BackendError(f"the cache of {name} has {len(pair)} tensors; expected 2")
        keys, values = zip(*(kv_caches[name] for name in self.layer_names), strict=True)
        self.graph.bind(keys, values)

    @torch.no_grad()
    def forward(  # noqa: PLR0913, the runner's arguments
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        attn_metadata: Mapping[str, Mapping[str, Any]],
        sampling_positions: torch.Tensor,
        sampling_params: torch.Tensor | None = None,
        spec_decode_metadata: object = None,
        logit_mask: torch.Tensor | None = None,
        rank: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_token_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [R,V] float32, or with on-device sampling tokens [R] int32 and logits or None.

        The T tokens are B sequences of T/B each: a chunk of one prompt, or one token of each
        sequence. A slot of -1 is padding; a block of 0 or -1 holds nothing of a sequence.
        `sampling_positions` [R] are places among the T, `sampling_params` [R,3] top-k, top-p and
        temperature, `logit_mask` [R,V] which tokens may be sampled, `rank` this rank's number.
        """
        if spec_decode_metadata is not None or inputs_embeds is not None:
            raise BackendError(
                "speculative decoding and prompt embeddings are not served; start vLLM without "
                "--speculative-config and --enable-prompt-embeds"
            )
        step = attn_metadata[self.layer_names[0]]  # all layers are of one kind: one group of blocks
        table_BM = step["block_table_tensor"].clamp(min=0)
        slots_BT = step["slot_mapping"].unflatten(0, (len(table_BM), -1))
        keys = self.graph.cached("keys")
        cache = BlockCache(keys, self.graph.cached("values"), table_BM, slots_BT)
        hidden_BTH = self.graph.hidden_states(
            input_ids.view_as(slots_BT),
            positions.view_as(slots_BT),
            slots_BT >= 0,
            cache,
            table_BM.shape[1] * keys[0].shape[2],
            rank=rank,
        )
        sampled_RH = hidden_BTH.flatten(0, 1).index_select(0, sampling_positions)
        logits_RV = self.compute_logits(sampled_RH)
        if self.config.sampling is None:
            return logits_RV
        allowed_RV = logits_RV
        if logit_mask is not None:
            allowed_RV = logits_RV.masked_fill(~logit_mask, float("-inf"))
        tokens_R = self._sampled(allowed_RV, sampling_params, rank)
        return tokens_R, logits_RV if self.config.returns_logits else None

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[...,H] of tokens."""
        return self.graph.model.embed(input_ids)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[...,V] float32 on every rank of hidden states after the last norm."""
        return self.graph.logits(hidden_states)

    def _sampled(
        self,
        logits_RV: torch.Tensor,
        params_R3: torch.Tensor | None,
        rank: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens [R] int32, the same on every rank."""
        sampling = self.config.sampling
        assert sampling is not None
        if sampling.all_greedy or params_R3 is None:
            return first_largest(logits_RV)
        candidates = min(sampling.max_top_k, logits_RV.shape[1])
        noise_RC = torch.rand(len(logits_RV), candidates, device=logits_RV.device)
        shard = self.config.shard
        if shard.tp_degree > 1:
            # Each rank draws for itself: all take what the first has drawn.
            own = torch.full_like(params_R3[:1, :1], shard.rank) if rank is None else rank
            noise_RC = shard.sum(torch.where(own == 0, noise_RC, 0.0))
        return sampled_tokens(logits_RV, params_R3, noise_RC)


def register() -> bool:
    """Register the models with the vLLM-Neuron that is installed; True when done, False (and one
    log line) where there is none. Calling it again changes nothing.
    """
    if not has_own_models():
        from neuron_minimax.backends.nxdi import vllm_plugin

        return vllm_plugin.register()
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, ConvertedForCausalLM)
    return True


def has_own_models() -> bool:
    """Whether the vLLM-Neuron that is installed has models of its own form, as from 0.21 on, and
    not NxDI's. Nothing of it is imported.
    """
    found = find_spec("vllm_neuron")
    places = (found and found.submodule_search_locations) or ()
    return any(Path(place, "model", "kv_cache.py").is_file() for place in places)


def first_largest(values: torch.Tensor) -> torch.Tensor:
    """[R] int32, the first place of the largest of [R,N], N up to 2^24: two plain reductions, where
    argmax is one of pairs, which vLLM-Neuron has a kernel of its own for. Of a row with NaN, which
    has no largest, it is the last: a place that there is.
    """
    places = torch.arange(values.shape[1], device=values.device, dtype=torch.float32)
    largest = values == values.amax(1, keepdim=True)
    return torch.where(largest, places, float(values.shape[1] - 1)).amin(1).to(torch.int32)


def sampled_tokens(
    logits_RV: torch.Tensor, params_R3: torch.Tensor, noise_RC: torch.Tensor
) -> torch.Tensor:
    """Tokens [R] int32 of the C likeliest, by top-k (below 1: all), then top-p, then temperature
    (0: the likeliest), in vLLM's order: temperature, top-k, top-p.

    `noise_RC` is uniform in [0, 1); its Gumbel transform makes the largest sum a sample (Gumbel,
    1954; Maddison et al. 2014, arXiv 1411.0030).
    """
    top_k_R1, top_p_R1, temperature_R1 = params_R3.float().split(1, dim=1)
    values_RC, index_RC = logits_RV.topk(noise_RC.shape[1], dim=1)
    greedy_R1 = temperature_R1 <= 0
    scaled_RC = values_RC / torch.where(greedy_R1, 1.0, temperature_R1)
    places_C = torch.arange(noise_RC.shape[1], device=logits_RV.device, dtype=torch.float32)
    within_RC = (top_k_R1 < 1) | (places_C < top_k_R1)
    shares_RC = scaled_RC.masked_fill(~within_RC, float("-inf")).softmax(1)
    likelier_RC = shares_RC.cumsum(1) - shares_RC
    kept_RC = within_RC & (likelier_RC < top_p_R1)
    gumbel_RC = -torch.log(-torch.log(noise_RC.clamp(min=torch.finfo(torch.float32).tiny)))
    drawn_RC = torch.where(greedy_R1, scaled_RC, scaled_RC + gumbel_RC)
    chosen_R = first_largest(drawn_RC.masked_fill(~kept_RC, float("-inf")))
    return index_RC.gather(1, chosen_R[:, None].long())[:, 0].to(torch.int32)


def _shard_in_vllm(config: ModelConfig) -> Shard:
    """This process's share: heads, channels and vocabulary by vLLM's tensor-parallel group, experts
    in the same group by vLLM-Neuron's degree.
    """
    from vllm.distributed import parallel_state
    from vllm_neuron.parallel.neuron_parallel_state import get_neuron_ep_degree

    others = {
        "--pipeline-parallel-size": parallel_state.get_pp_group(),
        "--decode-context-parallel-size": parallel_state.get_dcp_group(),
    }
    for option, other in others.items():
        if other.world_size > 1:
            raise BackendError(f"{option} is {other.world_size}; expected 1")
    group = parallel_state.get_tp_group()
    name = group.device_group.group_name
    return shard_of(config, group.rank_in_group, group.world_size, get_neuron_ep_degree(), name)


def _sampling(given: Any) -> OnDeviceSampling | None:
    if given is None:
        return None
    _require_defaults(given, SAMPLING_SETTINGS, "on_device_sampling_config")
    return OnDeviceSampling(all_greedy=given.all_greedy, max_top_k=given.max_top_k)


def _require_defaults(given: Any, settings: Mapping[str, Any], name: str) -> None:
    for setting, default in settings.items():
        value = getattr(given, setting, default)
        if value != default:
            raise BackendError(
                f"{name} has {setting} {shown(value)}, which this model does not serve; leave it "
                "out"
            )


def _compute_dtype(raw: Mapping[str, Any]) -> torch.dtype:
    """The dtype of activations and of the cache: config.json's, or bfloat16."""
    given = raw.get("dtype") or raw.get("torch_dtype") or torch.bfloat16
    name = str(given).removeprefix("torch.")
    for dtype in COMPUTE_DTYPES:
        if str(dtype) == f"torch.{name}":
            return dtype
    raise ConfigError(
        f"config.json: dtype is {shown(name)}; expected bfloat16 or float32: set it with "
        """--hf-overrides '{"dtype": "bfloat16"}'"""
    )


def _require_same(given: ModelConfig, stored: ModelConfig, directory: Path) -> None:
    """Raise ConfigError when what vLLM made of config.json is another model than the one there."""
    for field in fields(ModelConfig):
        if field.name in CLEARED:
            continue
        found = getattr(given, field.name)
        expected = getattr(stored, field.name)
        if found != expected:
            raise ConfigError(
                f"vLLM's config has {field.name} {shown(found)}; {directory} was converted with "
                f"{shown(expected)}: leave it out of --hf-overrides"
            )
