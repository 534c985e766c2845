"""How right a checkpoint answers, by kind of question, and what each way of storing or computing it
changes.

Shapes: T tokens, V vocabulary, R rows, C columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.plan import Layout
from neuron_minimax.convert.state_dict import convert_hf_to_neuron_state_dict
from neuron_minimax.errors import TrainingError
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.training.answering import Graded, answer_all, prompt_ids
from neuron_minimax.training.data import KINDS, Conversation, held_out
from neuron_minimax.training.tokenizer import load_tokenizer

State = dict[str, torch.Tensor]
HELD_OUT_SEED = 2026
OCP = Layout(fp8_range="ocp")  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to store or compute the same checkpoint: published tensors to a model."""

    name: str
    change: Callable[[State, ModelConfig], State] = lambda published, config: published
    layout: Layout = OCP
    compute: torch.dtype = torch.float32

    def model(self, published: State, config: ModelConfig) -> Decoder:
        changed = self.change(published, config)
        return Decoder(
            config,
            convert_hf_to_neuron_state_dict(changed, config, self.layout),
            compute=self.compute,
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """Exact answers by kind as (right, asked), and how far a variant is from the stored checkpoint
    in float32.

    `logit_error` is the relative RMS difference of logits over all prompts; `same_replies` the
    share of questions whose whole greedy reply, reasoning included, has the same tokens.
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
class QualityReport:
    scores: Sequence[Score]

    def render(self) -> str:
        """Two Markdown tables: accuracy of the first score by kind, and all scores."""
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
    checkpoint: str | Path, questions: int = 500, variants: Sequence[Variant] | None = None
) -> QualityReport:
    """Ask `questions` held-out questions of each variant (default: all that the checkpoint's
    precision has).

    The first variant is what the others are held to.

    Raises CheckpointError when the checkpoint cannot be used, TrainingError when its tokenizer is
    not the demo's.
    """
    opened = Checkpoint(checkpoint)
    opened.require_usable()
    published = {name: opened.tensor(name) for name in opened.entries}
    tokenizer = load_tokenizer(checkpoint)
    conversations = held_out(questions, HELD_OUT_SEED)
    reference: tuple[list[torch.Tensor], list[Graded]] | None = None
    scores = []
    quantized = any(entry.dtype == "F8_E4M3" for entry in opened.entries.values())
    for variant in variants or (VARIANTS if quantized else DENSE_VARIANTS):
        model = variant.model(published, opened.config)
        logits = prompt_logits(model, tokenizer, conversations)
        graded = answer_all(model, tokenizer, conversations)
        reference = reference or (logits, graded)
        scores.append(_score(variant.name, logits, graded, *reference))
    return QualityReport(scores=scores)


@torch.inference_mode()
def prompt_logits(
    model: Decoder, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> list[torch.Tensor]:
    """Float32 logits [V] behind each prompt: what the reply begins with."""
    if len(tokenizer) > model.config.vocab_size:
        raise TrainingError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}"
        )
    prompts = [prompt_ids(tokenizer, conversation) for conversation in conversations]
    return [model(torch.tensor([prompt]))[0][0].float() for prompt in prompts]


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
    """The documented way to Neuron's range: codes times 240/448, rounded to FP8 again, scales times
    448/240.
    """
    changed = dict(published)
    for weight, scale in _quantized(config):
        codes = fp8.encode(
            fp8.decode(_bytes(published[weight])) * np.float32(fp8.NEURON_MAX / fp8.OCP_MAX)
        )
        changed[weight] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        changed[scale] = published[scale] * (fp8.OCP_MAX / fp8.NEURON_MAX)
    return changed


def scale_per_row(published: State, config: ModelConfig) -> State:
    """One scale per output row: dequantized, quantized again, and expanded, as a dense weight."""
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
    """What casting every float parameter to the compute dtype does to the router's bias."""
    kind = "e_score_correction_bias"
    return {
        n: t.to(torch.bfloat16).float() if n.endswith(kind) else t for n, t in published.items()
    }


def invert_scales(published: State, config: ModelConfig) -> State:
    """`scale = 1 / weight_scale_inv`, read literally."""
    return {**published, **{scale: 1 / published[scale] for _, scale in _quantized(config)}}


def _quantized(config: ModelConfig) -> list[tuple[str, str]]:
    return [
        (w.name, schema.scale_name(w.name))
        for w in schema.expected(config)
        if w.weight.quantized and not w.is_scale
    ]


def _bytes(codes: torch.Tensor) -> np.ndarray:
    return codes.view(torch.uint8).numpy()


MULTIPLIER = Layout(fp8_range="ocp", scale_convention="multiplier")  # type: ignore[arg-type]
VARIANTS = (
    Variant(name="FP8 as stored"),
    Variant(name="converted (codes halved, scales doubled)", layout=Layout()),
    Variant(name="attention in BF16", layout=Layout(attention="bf16")),  # type: ignore[arg-type]
    Variant(name="compute in BF16", layout=Layout(), compute=torch.bfloat16),
    Variant(name="rescaled by 240/448 (rounds again)", change=rescale_to_240),
    Variant(name="one scale per row (rounds again)", change=scale_per_row),
    Variant(name="router bias cast to BF16", change=round_router_bias),
    Variant(name="scale read as 1 / weight_scale_inv", change=invert_scales, layout=MULTIPLIER),
)
DENSE_VARIANTS = (
    Variant(name="as stored"),
    Variant(name="compute in BF16", compute=torch.bfloat16),
)
