"""What a run says while it trains: a line now and then, and samples of the model's replies."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from neuron_minimax.model.decoder import Decoder
from neuron_minimax.progress import duration
from neuron_minimax.training.trainer import StepReport

SAMPLE_TOKENS = 64
FIRST_LINE = 3  # steps
FIRST_PAUSE = 20.0  # seconds
SHORTEST_PAUSE = 5.0  # seconds between lines
LONGEST_PAUSE = 60.0


class Meter:
    """Turns step reports into a line now and then: mean loss, rate, time taken and left.

    The first line comes after FIRST_LINE steps or FIRST_PAUSE seconds, the others ever farther
    apart. The time left is that of the steps so far and whatever came between them, without the
    first, which also warms up.
    """

    def __init__(self, steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.steps = steps
        self.clock = clock
        self.taken = 0
        self._begin = clock()
        self._second = self._begin  # when the second step began
        self._last_line = self._begin
        self._waiting: list[StepReport] = []

    def lines(self, report: StepReport) -> Iterator[str]:
        """Yield what is to be said after a step: of one that was skipped or evaluated, at once."""
        now = self.clock()
        self.taken += 1
        self._waiting.append(report)
        if self.taken == 1:
            self._second = now
        if report.skipped is not None:
            yield f"step {report.step}/{self.steps}  skipped: {report.skipped}"
        pause = min(LONGEST_PAUSE, max(SHORTEST_PAUSE, (now - self._begin) / 10))
        if self.taken < FIRST_LINE:
            pause = FIRST_PAUSE
        is_time = now - self._last_line >= pause
        if is_time or self.taken == FIRST_LINE or report.step == self.steps:
            yield self._line(report, now)
            self._last_line = now
            self._waiting = []
        if report.evaluation is not None:
            yield f"step {report.step}/{self.steps}  held-out loss {report.evaluation:.4f}"

    def _line(self, report: StepReport, now: float) -> str:
        taken = [step.loss for step in self._waiting if step.skipped is None]
        seconds = sum(step.seconds for step in self._waiting)
        parts = [f"step {report.step}/{self.steps}"]
        parts += [f"loss {sum(taken) / len(taken):.4f}" if taken else "no loss"]
        if report.balance is not None:
            parts.append(f"balance {report.balance:.3f}")
            parts.append(f"busiest expert {report.busiest_expert_share:.0%}")
        parts += [
            f"gradient norm {report.gradient_norm:.2f}",
            f"learning rate {report.learning_rate:.2e}",
            f"{sum(step.tokens for step in self._waiting) / seconds:.0f} tokens/s",
            f"{duration(now - self._begin)} so far",
        ]
        left = self.steps - report.step
        if left:
            after_first = (now - self._second) / max(1, self.taken - 1)
            a_step = after_first if self.taken > 1 else now - self._begin
            parts[-1] += f", about {duration(left * a_step)} left"
        return "  ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Greedy replies to the same prompts, every so many steps and after the last, to see what a
    model has learned.

    A prompt is a user's message where the tokenizer has a chat template, else the begin of a text.
    """

    tokenizer: PreTrainedTokenizerBase
    every: int
    last: int
    prompts: Sequence[str] = ()
    tokens: int = SAMPLE_TOKENS

    def lines(self, model: Decoder, step: int) -> Iterator[str]:
        """Yield a line for each prompt after a step that has samples."""
        if step % self.every and step != self.last:
            return
        for prompt in self.prompts:
            text = self.tokenizer.decode(self.reply(model, prompt), skip_special_tokens=True)
            yield f"step {step}  sample {prompt!r} -> {text!r}"

    def reply(self, model: Decoder, prompt: str) -> list[int]:
        """Return the most likely next tokens of a prompt, without its end of turn."""
        text = prompt
        if self.tokenizer.chat_template:
            asked = [{"role": "user", "content": prompt}]
            text = str(
                self.tokenizer.apply_chat_template(
                    asked, tokenize=False, add_generation_prompt=True
                )
            )
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        found: list[int] = []
        while len(found) < self.tokens:
            token = _most_likely(model, [*ids, *found])
            if token == self.tokenizer.eos_token_id:
                break
            found.append(token)
        return found


@torch.no_grad()
def _most_likely(model: Decoder, ids: Sequence[int]) -> int:
    """Return the most likely next token. No cache is needed for a few tokens, on any device."""
    ids_BT = torch.tensor([ids], device=model.embed_tokens.weight.device)
    positions_BT = torch.arange(len(ids), device=ids_BT.device)[None]
    hidden_BTH, _ = model.hidden_states(ids_BT, positions_BT)
    return int(model.logits(hidden_BTH[:, -1]).argmax())
