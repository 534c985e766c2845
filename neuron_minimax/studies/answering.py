"""Greedy replies to many conversations at once, and whether they are right.

Shapes: B sequences, V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from neuron_minimax.generation.chat_formats.minimax_m2 import parse
from neuron_minimax.generation.events import Message
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.progress import Advance, nothing
from neuron_minimax.training.data.conversations import Conversation


@dataclass(frozen=True)
class Graded:
    """A conversation, the new tokens of the reply (end of turn included), and if it is exact."""

    conversation: Conversation
    tokens: tuple[int, ...]
    right: bool


def answer_all(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    max_new_tokens: int = 96,
    batch_size: int = 128,
    advance: Advance = nothing,
) -> list[Graded]:
    """Answer all prompts greedily, in the order given, and check each against its own reply.
    `advance` is called with how many have been answered together.
    """
    prompts = [prompt_ids(tokenizer, conversation) for conversation in conversations]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    replies: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        decoded = greedy(
            model, [prompts[index] for index in chosen], int(tokenizer.eos_token_id), max_new_tokens
        )
        replies.update(zip(chosen, decoded, strict=True))
        advance(len(chosen))
    return [
        Graded(
            conversation, replies[index], is_right(conversation, _text(tokenizer, replies[index]))
        )
        for index, conversation in enumerate(conversations)
    ]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """Return the tokens of everything before the reply, and the template's generation prompt."""
    tools: list[Any] | None = conversation.tools or None
    text = tokenizer.apply_chat_template(
        conversation.prompt, tools=tools, tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text, add_special_tokens=False)


@torch.inference_mode()
def greedy(
    model: Decoder, prompts: Sequence[list[int]], end_of_turn: int, max_new_tokens: int
) -> list[tuple[int, ...]]:
    """Return the most likely next tokens of each prompt, up to its end of turn.

    This loop is not the engine's: the model is a decoder that no backend holds, and the prompts are
    of one length nearly, so a batch padded on the right decodes them together with no slots,
    buckets or sampling.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    logits, cache = model(ids, use_cache=True, lengths=lengths)
    next_B = logits[torch.arange(len(prompts)), lengths - 1].argmax(-1)
    replies = [next_B]
    ended_B = next_B == end_of_turn
    while len(replies) < max_new_tokens and not bool(ended_B.all()):
        logits, cache = model(next_B[:, None], cache, use_cache=True)
        next_B = logits[:, -1].argmax(-1)
        replies.append(next_B)
        ended_B |= next_B == end_of_turn
    rows = torch.stack(replies, dim=1).tolist()
    return [tuple(row[: row.index(end_of_turn) + 1] if end_of_turn in row else row) for row in rows]


def is_right(conversation: Conversation, text: str) -> bool:
    """Say whether the answer, or the tool call, is exactly the expected one; reasoning is free."""
    message = parse(text, in_reasoning=True, tools=conversation.tools or None)
    return _answer(message) == _expected(conversation)


def _text(tokenizer: PreTrainedTokenizerBase, reply: tuple[int, ...]) -> str:
    ended = bool(reply) and reply[-1] == tokenizer.eos_token_id
    return str(tokenizer.decode(list(reply[:-1] if ended else reply)))


def _answer(message: Message) -> tuple[str, list[tuple[str, object]]]:
    return message.content.strip(), [
        (call.name, json.loads(call.arguments)) for call in message.tool_calls
    ]


def _expected(conversation: Conversation) -> tuple[str, list[tuple[str, object]]]:
    calls = [call["function"] for call in conversation.reply.get("tool_calls", ())]
    return conversation.reply["content"], [(call["name"], call["arguments"]) for call in calls]
