"""The last check: the full model's first tokens on the device, each held against the CPU after the
same tokens.

Shapes: P prompts, T tokens of each answer, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from neuron_minimax.backends.cpu.backend import EagerBackend
from neuron_minimax.backends.cpu.options import CPUOptions
from neuron_minimax.device_check.verdicts import (
    ROUNDING_ERRORS,
    ProbeMeasurement,
    Status,
    Verdict,
    tool_failure,
    unusable_logits,
)
from neuron_minimax.errors import counted

CHECK = "first tokens"
TOKENS = 16
TEXTS = (
    "What is the capital of France?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Count from one to ten in German.",
    "Why is the sky blue? Answer in one sentence.",
)


def read_prompts(model: Path) -> list[list[int]]:
    """The tokens of a few questions. Raises GenerationError when the directory has no usable
    tokenizer.
    """
    from neuron_minimax.generation.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.from_dir(model)
    return [tokenizer.encode(text) for text in TEXTS]


def cpu_logits(
    model: Path, prompts: Sequence[Sequence[int]], answers_PT: torch.Tensor, compute: str
) -> torch.Tensor:
    """Logits [P,T,V] of the eager model after each prompt and the device's tokens before: one
    pass per prompt.
    """
    count = answers_PT.shape[1]
    longest = max(len(prompt) for prompt in prompts) + count
    options = CPUOptions(
        slots=1, seq_len=longest, buckets=(longest,), compute=compute, engine="eager"
    )
    backend = EagerBackend(model, options)
    found = []
    for prompt, answer in zip(prompts, answers_PT.tolist(), strict=True):
        logits_TV = backend.encode(0, [*prompt, *answer[:-1]], all_positions=True)
        found.append(logits_TV[len(prompt) - 1 :])
    return torch.stack(found)


def judge_tokens(
    found_PTV: torch.Tensor, expected_PTV: torch.Tensor, float32_PTV: torch.Tensor
) -> Verdict:
    """Every token of the device has to be the CPU's first choice, or so near to it that rounding
    may decide.
    """
    unusable = unusable_logits(CHECK, found_PTV.flatten(0, 1), expected_PTV.flatten(0, 1))
    if unusable is not None:
        return unusable
    answers_PT = found_PTV.argmax(-1)
    best_PT = expected_PTV.amax(-1)
    margin_PT = best_PT - expected_PTV.gather(-1, answers_PT[..., None])[..., 0]
    rounding = float((expected_PTV - float32_PTV).abs().max())
    tolerance = max(ROUNDING_ERRORS * rounding, 1e-4)
    spread_PT = best_PT - expected_PTV.mean(-1)
    if float(spread_PT.median()) <= tolerance:
        return tool_failure(
            CHECK,
            f"the CPU's first choices stand out by {float(spread_PT.median()):.3g}, no more than "
            f"rounding may move ({tolerance:.3g}): any token would pass",
            "check a trained model",
        )
    measured = ProbeMeasurement(
        what="largest margin of the CPU's choice over the device's",
        difference=float(margin_PT.max()),
        tolerance=tolerance,
        source=f"{ROUNDING_ERRORS} times what the CPU's logits differ from those in float32",
    )
    apart = (margin_PT > 0).nonzero().tolist()
    equal = margin_PT.numel() - len(apart)
    if not apart:
        finding = f"all {equal} tokens are the CPU's"
        return Verdict(check=CHECK, status=Status.PASS, finding=finding, measured=measured)
    prompt, place = apart[0]
    finding = (
        f"{equal} of {margin_PT.numel()} tokens are the CPU's; the first other one is token "
        f"{place + 1} of prompt {prompt + 1}, behind the CPU's choice by "
        f"{float(margin_PT[prompt, place]):.3g}"
    )
    if float(margin_PT.max()) <= tolerance:
        return Verdict(
            check=CHECK, status=Status.PASS, finding=f"{finding}: near-ties", measured=measured
        )
    in_steps = int((margin_PT[:, 1:] > tolerance).sum())
    in_prompts = int((margin_PT[:, 0] > tolerance).sum())
    where = "token generation" if not in_prompts else "context encoding"
    return Verdict(
        check=CHECK,
        status=Status.FAIL,
        finding=finding,
        measured=measured,
        meaning=f"{where} of the full model goes wrong ({counted(in_prompts, 'first token')}, "
        f"{in_steps} later) where one layer is right: another layer, the embedding, the "
        "head, or the cache over many layers",
        next_step="check more layers with --layer; compare the first token's logits by `generate "
        "--dump-logits`",
    )
