"""The decoding loop over a backend's slot: a prompt goes in, tokens come out as a generator.

Shapes: T prompt tokens, N new tokens, S slots, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from neuron_minimax.backends.base import Backend, Capabilities
from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.sampling import GREEDY, Sampler, SamplingOptions
from neuron_minimax.generation.tokenizer import StreamDecoder, TextTokenizer


@dataclass(frozen=True)
class Step:
    """One new token, the logits [V] that chose it, and whether it ends the answer ("stop" or
    "length").
    """

    token: int
    logits: torch.Tensor
    finish_reason: str | None


@dataclass(frozen=True)
class Answer:
    """A finished answer: the new tokens, a stop token included, their text, and why it ended."""

    token_ids: list[int]
    text: str
    finish_reason: str


def room_for_answer(
    can: Capabilities, prompt_length: int, max_new_tokens: int | None = None
) -> int:
    """How many tokens may be generated after a prompt of that many tokens.

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
            f"{prompt_length} prompt tokens and {max_new_tokens} new ones do not fit seq_len "
            f"{can.seq_len}; ask for at most {room} new tokens or compile with a larger --seq-len"
        )
    return max_new_tokens


def check_tokens(can: Capabilities, ids: Sequence[int]) -> None:
    """Raise GenerationError when a token is outside of the vocabulary."""
    outside = next((token for token in ids if not 0 <= token < can.vocab_size), None)
    if outside is not None:
        raise GenerationError(
            f"token {outside} is not in the vocabulary; expected 0 to {can.vocab_size - 1}"
        )


def generate(
    backend: Backend,
    prompt_ids: Sequence[int],
    *,
    options: SamplingOptions = GREEDY,
    stop_token_ids: Collection[int] = (),
    max_new_tokens: int | None = None,
    slot: int = 0,
    prefill: list[torch.Tensor] | None = None,
) -> Iterator[Step]:
    """Generate after `prompt_ids` in one slot; the other slots are left alone, and this one is
    empty afterwards.

    Ends with a stop token (which is yielded), after `max_new_tokens`, or when the slot is full.
    `prefill` receives the prompt's logits: [T,V], or [1,V] where the backend has the last position
    only. Raises GenerationError, at once, when the request does not fit.
    """
    room = room_for_answer(backend.capabilities, len(prompt_ids), max_new_tokens)
    check_tokens(backend.capabilities, prompt_ids)
    sampler = Sampler(options, prompt_ids)
    return _generate(
        backend, list(prompt_ids), sampler, frozenset(stop_token_ids), room, slot, prefill
    )


def _generate(
    backend: Backend,
    prompt_ids: list[int],
    sampler: Sampler,
    stops: frozenset[int],
    room: int,
    slot: int,
    prefill: list[torch.Tensor] | None,
) -> Iterator[Step]:
    tokens = torch.zeros(backend.capabilities.slots, dtype=torch.int64)
    positions = tokens.clone()
    active = tokens.bool()
    active[slot] = True
    try:
        logits = _encode(backend, slot, prompt_ids, prefill)
        for number in range(room):
            token = sampler.choose(logits)
            reason = "stop" if token in stops else "length" if number + 1 == room else None
            yield Step(token, logits, reason)
            if reason:
                return
            tokens[slot] = token
            positions[slot] = len(prompt_ids) + number
            logits = backend.step(tokens, positions, active)[slot]
    finally:
        backend.reset(slot)


def _encode(
    backend: Backend, slot: int, ids: list[int], prefill: list[torch.Tensor] | None
) -> torch.Tensor:
    if prefill is None:
        return backend.encode(slot, ids)
    if backend.capabilities.all_position_logits:
        prefill.append(backend.encode(slot, ids, all_positions=True))
    else:
        prefill.append(backend.encode(slot, ids)[None])
    return prefill[0][-1]


def stream_text(steps: Iterator[Step], tokenizer: TextTokenizer) -> Iterator[tuple[str, Step]]:
    """Each step with the text it completes; whatever is left comes with the last one."""
    decoder = StreamDecoder(tokenizer)
    for step in steps:
        text = decoder.push(step.token)
        yield text + (decoder.finish() if step.finish_reason else ""), step


def answer(
    backend: Backend,
    prompt_ids: Sequence[int],
    *,
    tokenizer: TextTokenizer | None = None,
    options: SamplingOptions = GREEDY,
    stop_token_ids: Collection[int] = (),
    max_new_tokens: int | None = None,
    dump_logits: str | Path | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Generate a whole answer, up to one of `stop_token_ids`; without a tokenizer it has no text.

    `on_text` is called with the text as it appears. `dump_logits` names a safetensors file to
    write: float32 `prefill_logits` ([T,V], or [1,V] where the backend has the last position only)
    and `step_logits` [N,V], row i being the logits that chose new token i. Raises GenerationError
    when the request does not fit, or the file cannot be written there.
    """
    if dump_logits and not Path(dump_logits).absolute().parent.is_dir():
        raise GenerationError(f"{dump_logits} cannot be written: its directory does not exist")
    prefill: list[torch.Tensor] | None = [] if dump_logits else None
    steps = generate(
        backend,
        prompt_ids,
        options=options,
        stop_token_ids=stop_token_ids,
        max_new_tokens=max_new_tokens,
        prefill=prefill,
    )
    token_ids = []
    rows = []
    reason = "length"
    decoder = StreamDecoder(tokenizer) if tokenizer and on_text else None
    for step in steps:
        token_ids.append(step.token)
        reason = step.finish_reason or reason
        if decoder and on_text:
            on_text(decoder.push(step.token) + (decoder.finish() if step.finish_reason else ""))
        if dump_logits:
            rows.append(step.logits.to(torch.float32).clone())
    if dump_logits and prefill:
        logits = {
            "prefill_logits": prefill[0].to(torch.float32).contiguous(),
            "step_logits": torch.stack(rows),
        }
        save_file(logits, Path(dump_logits))
    return Answer(token_ids, tokenizer.decode(token_ids) if tokenizer else "", reason)
