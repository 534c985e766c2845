"""One request over a backend's slot: a prompt goes in, tokens come out as a generator.

Shapes: T prompt tokens, N new tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from neuron_minimax.backends.base import Backend, Capabilities
from neuron_minimax.checkpoint.writer import replacing
from neuron_minimax.errors import GenerationError, counted
from neuron_minimax.generation.engine import Engine, NewToken, Request
from neuron_minimax.generation.reader import StreamDecoder
from neuron_minimax.generation.sampling import GREEDY, SamplingParams
from neuron_minimax.generation.tokenizer import TextTokenizer

LOGITS = ("prefill_logits", "step_logits")  # what a file of them holds


@dataclass(frozen=True)
class Answer:
    """A finished answer: the new tokens, a stop token included, their text, and why it ended."""

    token_ids: list[int]
    text: str
    finish_reason: str


def answer_room(
    can: Capabilities, prompt_ids: Sequence[int], max_new_tokens: int | None = None
) -> int:
    """Return how many tokens may be generated after a prompt: `max_new_tokens`, else what fits.

    Raises GenerationError when the request does not fit the compiled model.
    """
    room = room_for_answer(can, len(prompt_ids), max_new_tokens)
    outside = next((token for token in prompt_ids if not 0 <= token < can.vocab_size), None)
    if outside is not None:
        raise GenerationError(
            f"token {outside} is not in the vocabulary; expected 0 to {can.vocab_size - 1}"
        )
    return room


def room_for_answer(
    can: Capabilities, prompt_length: int, max_new_tokens: int | None = None
) -> int:
    """Return how many tokens may be generated after a prompt of that many tokens.

    The last token needs no place of its own, since nothing is computed from it. Raises
    GenerationError when the prompt is empty or too long, or when `max_new_tokens` is given and does
    not fit.
    """
    if prompt_length < 1:
        raise GenerationError("the prompt has no tokens; expected at least one")
    if prompt_length > min(can.longest_prompt, can.seq_len):
        limit = (
            "seq_len"
            if can.chunked_encoding or can.longest_prompt >= can.seq_len
            else "the largest bucket"
        )
        raise GenerationError(
            f"the prompt has {prompt_length} tokens, but this model is compiled for at most "
            f"{min(can.longest_prompt, can.seq_len)} ({limit}); shorten it or compile for more"
        )
    room = can.seq_len - prompt_length + 1
    if max_new_tokens is None:
        return room
    if (
        not isinstance(max_new_tokens, int)
        or isinstance(max_new_tokens, bool)
        or max_new_tokens < 1
    ):
        raise GenerationError(
            f"the number of new tokens is {max_new_tokens!r}; expected a positive integer"
        )
    if max_new_tokens > room:
        raise GenerationError(
            f"{counted(prompt_length, 'prompt token')} and {max_new_tokens} new do not fit seq_len "
            f"{can.seq_len}; ask for at most {counted(room, 'new token')} or compile with a larger "
            "--seq-len"
        )
    return max_new_tokens


def generate(
    backend: Backend,
    prompt_ids: Sequence[int],
    params: SamplingParams = GREEDY,
    *,
    stop_token_ids: Collection[int] = (),
    max_new_tokens: int | None = None,
    slot: int = 0,
    dump_logits: str | Path | None = None,
) -> Iterator[NewToken]:
    """Generate after `prompt_ids` in one slot; the other slots are left alone.

    The slot is empty afterwards. The steps end with a stop token (which is yielded), after
    `max_new_tokens`, or when the slot is full. `dump_logits`: see dumped. Raises GenerationError,
    at once, when the request does not fit, or the file cannot be written there.
    """
    request = Request(
        prompt_ids=list(prompt_ids),
        params=params,
        max_new_tokens=answer_room(backend.capabilities, prompt_ids, max_new_tokens),
        stop_token_ids=frozenset(stop_token_ids),
    )
    steps = _emptied(backend, slot, request)
    return steps if dump_logits is None else dumped(steps, request, dump_logits)


def _emptied(backend: Backend, slot: int, request: Request) -> Iterator[NewToken]:
    try:
        with closing(Engine(backend, [slot]).run(request)) as steps:
            yield from steps
    finally:
        backend.reset(slot)


def dumped(steps: Iterator[NewToken], request: Request, path: str | Path) -> Iterator[NewToken]:
    """Pass on the steps of a request that is not yet under way; write its logits when they end.

    The safetensors file holds float32 `prefill_logits` ([T,V], or [1,V] where the backend has the
    last position only) and `step_logits` [N,V], row i being the logits that chose new token i.
    Raises GenerationError, at once, when the directory does not exist, or something else than
    logits is there.
    """
    if not Path(path).absolute().parent.is_dir():
        raise GenerationError(f"{path} cannot be written: its directory does not exist")
    if Path(path).is_dir():
        raise GenerationError(f"{path} is a directory; name the file that the logits go to")
    if Path(path).exists() and not _may_be_replaced(Path(path)):
        raise GenerationError(f"{path} exists and holds no logits; name another file")
    prompt_logits: list[torch.Tensor] = []
    request.prompt_logits = prompt_logits

    def run() -> Iterator[NewToken]:
        rows = []
        for step in steps:
            rows.append(step.logits.to(torch.float32).clone())
            yield step
        prefill = torch.cat(prompt_logits).to(torch.float32).contiguous()
        logits = dict(zip(LOGITS, (prefill, torch.stack(rows)), strict=True))
        with replacing(Path(path)) as file:
            file.write(serialize(logits))

    return run()


def _may_be_replaced(path: Path) -> bool:
    """Return whether a file is empty or holds logits, as an earlier run leaves them."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys()) == set(LOGITS)
    except (OSError, SafetensorError):
        return path.stat().st_size == 0


def stream_text(
    steps: Iterator[NewToken], tokenizer: TextTokenizer
) -> Iterator[tuple[str, NewToken]]:
    """Yield each step with the text it completes; whatever is left comes with the last one."""
    decoder = StreamDecoder(tokenizer)
    for step in steps:
        text = decoder.push(step.token)
        yield text + (decoder.finish() if step.finish_reason else ""), step


def answer(
    steps: Iterator[NewToken],
    tokenizer: TextTokenizer | None = None,
    on_text: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Run the steps to their end and join them; without a tokenizer the answer has no text.

    `on_text` is called with the text as it appears.
    """
    token_ids = []
    reason = "length"
    shown = stream_text(steps, tokenizer) if tokenizer else (("", step) for step in steps)
    for text, step in shown:
        on_text(text)
        token_ids.append(step.token)
        reason = step.finish_reason or reason
    return Answer(token_ids, tokenizer.decode(token_ids) if tokenizer else "", reason)
