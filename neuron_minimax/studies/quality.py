"""Quality of a checkpoint: exact answers by kind of question, and perplexity by position.

Both compare ways of storing or computing the same weights: scales, precisions, RoPE scaling.

Shapes: T tokens, V vocabulary, R rows, C columns.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.layout import AttentionPrecision, FP8Range, Layout
from neuron_minimax.convert.state_dict import convert_hf_to_neuron_state_dict
from neuron_minimax.errors import TrainingError
from neuron_minimax.families import Role
from neuron_minimax.families.fields import BESIDE_ROPE
from neuron_minimax.fp8 import ConventionChoice
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.kernels.reference import KV_CACHE_DTYPES
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.progress import SILENT, Advance, Progress, nothing
from neuron_minimax.studies.answering import Graded, answer_all, prompt_ids
from neuron_minimax.training.data.conversations import KINDS, Conversation, held_out
from neuron_minimax.training.data.encoding import Encoder, Example
from neuron_minimax.training.data.tokenizer import load_tokenizer

State = dict[str, torch.Tensor]
HELD_OUT_SEED = 2026
OCP = Layout(fp8_range=FP8Range.OCP)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to store or compute the same checkpoint: published tensors to a model."""

    name: str
    change: Callable[[State, ModelConfig], State] = lambda published, config: published
    layout: Layout = OCP
    scale_convention: ConventionChoice = ConventionChoice.AUTO
    compute: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None

    def model(self, published: State, config: ModelConfig) -> Decoder:
        changed = self.change(published, config)
        return Decoder(
            config,
            convert_hf_to_neuron_state_dict(changed, config, self.layout, self.scale_convention),
            compute=self.compute,
            cache_dtype=self.cache_dtype,
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """Exact answers by kind as (right, asked), and the distance from the stored checkpoint.

    That is taken in float32. `logit_error` is the relative RMS difference of logits over all
    prompts, `same_replies` the share of questions whose whole greedy reply, reasoning included, has
    the same tokens.
    """

    name: str
    by_kind: Mapping[str, tuple[int, int]]
    logit_error: float
    same_replies: float

    @property
    def accuracy(self) -> float:
        return sum(right for right, _ in self.by_kind.values()) / sum(
            asked for _, asked in self.by_kind.values()
        )


@dataclass(frozen=True, kw_only=True)
class QualityReport(Rendered):
    scores: Sequence[Score]

    def render(self) -> str:
        """Render two Markdown tables: accuracy of the first score by kind, and all scores."""
        lines = ["| kind | exact answers |", "|---|---|"]
        for kind, (right, asked) in self.scores[0].by_kind.items():
            lines.append(f"| {kind} | {right} of {asked} |")
        lines += [
            "",
            "| variant | exact answers | logit error (relative RMS) | same replies |",
            "|---|---|---|---|",
        ]
        for score in self.scores:
            lines.append(
                f"| {score.name} | {score.accuracy:.1%} | {score.logit_error:.2e} | "
                f"{score.same_replies:.1%} |"
            )
        return "\n".join(lines)


def measure_quality(
    checkpoint: str | Path,
    questions: int = 500,
    variants: Sequence[Variant] | None = None,
    progress: Progress = SILENT,
) -> QualityReport:
    """Ask `questions` held-out questions of each variant.

    The first variant is what the others are held to. The default are all variants that the
    checkpoint's precision has. Raises CheckpointError when the checkpoint cannot be used,
    TrainingError when its tokenizer is not the demo's.
    """
    opened = Checkpoint.open(checkpoint, progress=progress)
    opened.require_usable()
    published = {name: opened.tensor(name) for name in opened.entries}
    tokenizer = load_tokenizer(opened.directory)
    conversations = held_out(questions, HELD_OUT_SEED)
    reference: tuple[list[torch.Tensor], list[Graded]] | None = None
    scores = []
    quantized = any(entry.dtype == "F8_E4M3" for entry in opened.entries.values())
    for variant in variants or (VARIANTS if quantized else DENSE_VARIANTS):
        with progress.stage(variant.name, questions, "questions") as advance:
            advance(doing="arranging weights")
            model = variant.model(published, opened.config)
            advance(doing="reading prompts")
            logits = prompt_logits(model, tokenizer, conversations)
            advance(doing="answering")
            graded = answer_all(model, tokenizer, conversations, advance=advance)
        reference = reference or (logits, graded)
        scores.append(_score(variant.name, logits, graded, *reference))
    return QualityReport(scores=scores)


@torch.inference_mode()
def prompt_logits(
    model: Decoder, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> list[torch.Tensor]:
    """Return the float32 logits [V] behind each prompt, with which the reply begins."""
    if len(tokenizer) > model.config.vocab_size:
        raise TrainingError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}"
        )
    prompts = [prompt_ids(tokenizer, conversation) for conversation in conversations]
    return [model(torch.tensor([prompt]), use_cache=True)[0][0].float() for prompt in prompts]


def _score(
    name: str,
    logits: Sequence[torch.Tensor],
    graded: Sequence[Graded],
    reference_logits: Sequence[torch.Tensor],
    reference: Sequence[Graded],
) -> Score:
    asked = {kind: [g.right for g in graded if g.conversation.kind == kind] for kind in KINDS}
    found = torch.cat(list(logits))
    wanted = torch.cat(list(reference_logits))
    return Score(
        name=name,
        by_kind={kind: (sum(right), len(right)) for kind, right in asked.items() if right},
        logit_error=float((found - wanted).norm() / wanted.norm()),
        same_replies=sum(a.tokens == b.tokens for a, b in zip(graded, reference, strict=True))
        / len(graded),
    )


def rescale_to_240(published: State, config: ModelConfig) -> State:
    """Rescale codes by 240/448, rounded to FP8 again, and scales by 448/240, as documented."""
    changed = dict(published)
    for weight, scale in _quantized(config):
        codes = fp8.encode(
            fp8.decode(_bytes(published[weight])) * np.float32(fp8.NEURON_MAX / fp8.OCP_MAX)
        )
        changed[weight] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        changed[scale] = published[scale] * (fp8.OCP_MAX / fp8.NEURON_MAX)
    return changed


def scale_per_row(published: State, config: ModelConfig) -> State:
    """Quantize again with one scale per output row, and expand to a dense weight."""
    changed = dict(published)
    for weight, scale in _quantized(config):
        dense = fp8.dequantize(
            _bytes(published[weight]), published[scale].numpy(), config.weight_block_size
        )
        row = (1, dense.shape[1])
        changed[weight] = torch.from_numpy(fp8.dequantize(*fp8.quantize(dense, row), row))
        del changed[scale]
    return changed


def round_router_bias(published: State, config: ModelConfig) -> State:
    """Round the router's bias, as casting every float parameter to the compute dtype does."""
    rounded = {
        w.name: published[w.name].to(torch.bfloat16).float()
        for w in schema.expected(config)
        if w.weight.role is Role.ROUTER_BIAS
    }
    return {**published, **rounded}


def invert_scales(published: State, config: ModelConfig) -> State:
    """Invert the scales: `scale = 1 / weight_scale_inv`, read literally."""
    return {**published, **{scale: 1 / published[scale] for _, scale in _quantized(config)}}


def _quantized(config: ModelConfig) -> list[tuple[str, str]]:
    return [
        (w.name, schema.scale_name(w.name))
        for w in schema.expected(config)
        if w.weight.quantized and not w.is_scale
    ]


def _bytes(codes: torch.Tensor) -> np.ndarray:
    return codes.view(torch.uint8).numpy()


VARIANTS = (
    Variant(name="FP8 as stored"),
    Variant(name="converted (codes halved, scales doubled)", layout=Layout()),
    Variant(name="attention in BF16", layout=Layout(attention=AttentionPrecision.BF16)),
    Variant(name="compute in BF16", layout=Layout(), compute=torch.bfloat16),
    Variant(name="keys and values in BF16", layout=Layout(), cache_dtype=torch.bfloat16),
    Variant(name="keys and values in FP8", layout=Layout(), cache_dtype=KV_CACHE_DTYPES["fp8"]),
    Variant(name="rescaled by 240/448 (rounds again)", change=rescale_to_240),
    Variant(name="one scale per row (rounds again)", change=scale_per_row),
    Variant(name="router bias cast to BF16", change=round_router_bias),
    Variant(
        name="scale read as 1 / weight_scale_inv",
        change=invert_scales,
        scale_convention=ConventionChoice.MULTIPLIER,
    ),
)
DENSE_VARIANTS = (
    Variant(name="as stored"),
    Variant(name="compute in BF16", compute=torch.bfloat16),
)


SINGLE_TURN = (
    "capital",
    "currency",
    "continent",
    "sum",
    "difference",
    "sort",
    "reverse",
    "compare",
    "count",
    "python",
)


@dataclass(frozen=True, kw_only=True)
class LengthReport(Rendered):
    """Perplexity per learned token by RoPE setting, for the positions up to each bound."""

    bounds: tuple[int, ...]
    rows: Mapping[str, tuple[float, ...]]

    def render(self) -> str:
        """Render a Markdown table."""
        starts = (0, *self.bounds[:-1])
        heads = [f"{start} to {end}" for start, end in zip(starts, self.bounds, strict=True)]
        lines = ["| RoPE | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        lines += [
            f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |"
            for name, row in self.rows.items()
        ]
        return "\n".join(lines)


def measure_lengths(
    checkpoint: str | Path,
    chats: int = 8,
    bounds: Sequence[int] = (512, 1024, 2048),
    factor: float = 4.0,
    progress: Progress = SILENT,
) -> LengthReport:
    """Measure the perplexity of the assistant's tokens in chats as long as the last bound.

    The chats are of held-out questions. RoPE is as trained, and scaled by `factor`, linearly and by
    YaRN. Raises CheckpointError on an unusable checkpoint.
    """
    opened = Checkpoint.open(checkpoint, progress=progress)
    opened.require_usable()
    published = {name: opened.tensor(name) for name in opened.entries}
    encoder = Encoder(load_tokenizer(opened.directory), bounds[-1])
    examples = [long_chat(encoder, seed) for seed in range(chats)]
    trained = opened.config.max_position_embeddings
    settings: dict[str, dict[str, Any] | None] = {
        "as trained": None,
        f"linear, factor {factor:g}": {"rope_type": "linear", "factor": factor},
        f"YaRN, factor {factor:g}": {
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained,
        },
    }  # fmt: skip
    rows = {}
    for name, scaling in settings.items():
        config = ModelConfig.from_dict(with_rope(opened.config.raw, scaling or {}))
        with progress.stage(f"perplexity, RoPE {name}", chats, "chats") as advance:
            model = Decoder(config, convert_hf_to_neuron_state_dict(published, config))
            rows[name] = perplexities(model, examples, bounds, advance)
    return LengthReport(bounds=tuple(bounds), rows=rows)


def with_rope(raw: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of either style with this scaling in place of its own."""
    stored = raw.get("rope_parameters") or {}
    kept = {name: stored[name] for name in BESIDE_ROPE if name in stored}
    return {**raw, "rope_parameters": None, "rope_scaling": {**kept, **scaling}}


def long_chat(encoder: Encoder, seed: int) -> Example:
    """Join held-out questions of one turn until the encoder's `max_tokens` are full."""
    conversations = [c for c in held_out(500, 10_000 + seed) if c.kind in SINGLE_TURN]
    random.Random(seed).shuffle(conversations)
    return encoder({"messages": [message for c in conversations for message in c.messages]})


@torch.inference_mode()
def perplexities(
    model: Decoder,
    examples: Sequence[Example],
    bounds: Sequence[int],
    advance: Advance = nothing,
) -> tuple[float, ...]:
    """Return exp of the mean -log p of learned tokens, by ranges of positions up to each bound.
    `advance` is called for each example.
    """
    sums = [0.0] * len(bounds)
    counts = [0] * len(bounds)
    for example in examples:
        ids = torch.tensor([example.ids])
        learned = torch.tensor(example.learned)[1:]
        loss = F.cross_entropy(model(ids)[0][0, :-1].float(), ids[0, 1:], reduction="none")
        start = 0
        for number, bound in enumerate(bounds):
            part = slice(start, bound - 1)
            sums[number] += float(loss[part][learned[part]].sum())
            counts[number] += int(learned[part].sum())
            start = bound - 1
        advance(1)
    return tuple(math.exp(total / max(1, count)) for total, count in zip(sums, counts, strict=True))
