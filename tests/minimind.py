"""MiniMind written out slowly, one token and one expert at a time, as an oracle.

It follows the definition in words: a decoder with grouped attention, rotary positions (YaRN where
`inference_rope_scaling` says so), a gated MLP or experts chosen by a softmax, and a tied head.
Releases before the third have no norms of queries and keys, and a shared expert.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

State = Mapping[str, torch.Tensor]


def logits(raw: Mapping[str, Any], state: State, ids: Sequence[int]) -> torch.Tensor:
    """Logits [T, V] of one sequence in float32, from published names and a config.json."""
    hidden = [state["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(raw["num_hidden_layers"]):
        weights = _within(state, f"model.layers.{layer}.")
        normed = [norm(h, weights["input_layernorm.weight"], raw) for h in hidden]
        attended = attention(raw, _within(weights, "self_attn."), normed)
        hidden = [h + a for h, a in zip(hidden, attended, strict=True)]
        normed = [norm(h, weights["post_attention_layernorm.weight"], raw) for h in hidden]
        mlp = experts if raw["use_moe"] else gated
        changed = [mlp(raw, _within(weights, "mlp."), n) for n in normed]
        hidden = [h + c for h, c in zip(hidden, changed, strict=True)]
    final = [norm(h, state["model.norm.weight"], raw) for h in hidden]
    return torch.stack([state["model.embed_tokens.weight"] @ h for h in final])


def attention(
    raw: Mapping[str, Any], weights: State, hidden: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    heads = raw["num_attention_heads"]
    shared_by = heads // raw["num_key_value_heads"]
    size = raw.get("head_dim") or raw["hidden_size"] // heads

    def project(name: str, token: int) -> list[torch.Tensor]:
        found = list((weights[f"{name}_proj.weight"] @ hidden[token]).split(size))
        if name == "v":
            return found
        if f"{name}_norm.weight" in weights:
            found = [norm(head, weights[f"{name}_norm.weight"], raw) for head in found]
        return [turned(head, token, raw) for head in found]

    tokens = range(len(hidden))
    queries = [project("q", token) for token in tokens]
    keys = [project("k", token) for token in tokens]
    values = [project("v", token) for token in tokens]
    result = []
    for token in tokens:
        mixed = []
        for head in range(heads):
            group = head // shared_by
            scores = torch.stack(
                [queries[token][head] @ keys[t][group] / math.sqrt(size) for t in range(token + 1)]
            )
            shares = torch.softmax(scores, dim=0)
            mixed.append(sum(shares[t] * values[t][group] for t in range(token + 1)))
        result.append(weights["o_proj.weight"] @ torch.cat(mixed))
    return result


def turned(head: torch.Tensor, position: int, raw: Mapping[str, Any]) -> torch.Tensor:
    """A head rotated by its position: channel i with channel i + size / 2."""
    size = len(head)
    pairs = size // 2
    result = head.clone()
    for pair in range(pairs):
        frequency = raw["rope_theta"] ** (-2 * pair / size)
        if raw.get("inference_rope_scaling"):
            frequency *= yarn_factor(pair, size, raw["rope_theta"])
        angle = position * frequency
        a = head[pair]
        b = head[pair + pairs]
        result[pair] = a * math.cos(angle) - b * math.sin(angle)
        result[pair + pairs] = b * math.cos(angle) + a * math.sin(angle)
    return result


def yarn_factor(pair: int, size: int, base: float) -> float:
    """1 for channels that turn often within the 2048 trained positions, 1/16 for those that hardly
    do.
    """

    def channel(rotations: float) -> float:
        return size * math.log(2048 / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(channel(32)), 0)
    high = min(math.ceil(channel(1)), size // 2 - 1)
    ramp = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
    return 1 - ramp + ramp / 16


def gated(raw: Mapping[str, Any], weights: State, hidden: torch.Tensor) -> torch.Tensor:
    gate = weights["gate_proj.weight"] @ hidden
    return weights["down_proj.weight"] @ (
        gate * torch.sigmoid(gate) * (weights["up_proj.weight"] @ hidden)
    )


def experts(raw: Mapping[str, Any], weights: State, hidden: torch.Tensor) -> torch.Tensor:
    older = "n_routed_experts" in raw
    count = raw["num_experts_per_tok"]
    scores = torch.softmax(weights["gate.weight"] @ hidden, dim=0).tolist()
    chosen = sorted(range(len(scores)), key=lambda expert: -scores[expert])[:count]
    total = 1.0
    if raw["norm_topk_prob"] and (count > 1 or not older):
        total = sum(scores[expert] for expert in chosen)
    result = sum(
        scores[expert] / total * gated(raw, _within(weights, f"experts.{expert}."), hidden)
        for expert in chosen
    )
    if older:
        result = result + gated(raw, _within(weights, "shared_experts.0."), hidden)
    return result


def norm(values: torch.Tensor, weight: torch.Tensor, raw: Mapping[str, Any]) -> torch.Tensor:
    return weight * values * torch.rsqrt((values * values).mean() + raw["rms_norm_eps"])


def _within(state: State, prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
