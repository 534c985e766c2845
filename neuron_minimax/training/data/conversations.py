"""The demo's conversations: seeded and unlimited, and split so that no held-out question is ever
trained.
"""

import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from neuron_minimax.errors import TrainingError
from neuron_minimax.training.data import questions
from neuron_minimax.training.data.questions import GENERATORS, Question
from neuron_minimax.training.data.world import SMALL_TALK, ToolUse, offered, tool_use

HELD_OUT_SHARE = 10  # one key in ten is held out
KINDS = (*GENERATORS, "chat", "tool call", "tool answer")
# Shares of training conversations; the rest are single questions.
CHAT_SHARE = 0.5
TOOL_CALL_SHARE = 0.06
TOOL_ANSWER_SHARE = 0.06
SMALL_TALK_SHARE = 0.03
# How often a kind is drawn, by how much practice it takes.
PRACTICE = {
    "capital": 1.5, "currency": 1.5, "continent": 1.5, "sum": 3, "difference": 3, "sort": 4,
    "reverse": 3,
    "compare": 2.5, "count": 2, "python": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """Messages as `apply_chat_template` takes them, the last one the reply that is graded.

    `tools` are JSON schemas; `keys` identify what is asked, turn by turn.
    """

    kind: str
    keys: tuple[str, ...]
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """The key of the question that is graded, the last one."""
        return self.keys[-1]

    @property
    def prompt(self) -> list[dict[str, Any]]:
        return self.messages[:-1]

    @property
    def reply(self) -> dict[str, Any]:
        return self.messages[-1]


def is_held_out(key: str) -> bool:
    """True when the question belongs to the held-out set; the CRC-32 of its key alone decides."""
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def require_kinds(focus: Sequence[str]) -> None:
    """Raise TrainingError when one is no kind of conversation."""
    for kind in focus:
        if kind not in KINDS:
            raise TrainingError(
                f"there is no kind of question {kind!r}; expected {', '.join(KINDS)}", usage=True
            )


def demo_conversation(seed: int, index: int, focus: Sequence[str] = ()) -> Conversation:
    """Return item `index` of the unlimited training set of a seed; it depends on nothing else.

    With `focus`, every other conversation is of one of these kinds. Raises TrainingError on an
    unknown kind.
    """
    rng = random.Random(f"{seed}:{index}")
    require_kinds(focus)
    if focus and rng.random() < 0.5:
        return _of_kind(rng, rng.choice(focus), held_out=False)
    return training_conversation(rng)


def training_conversation(rng: random.Random) -> Conversation:
    """Draw a conversation of the training split: a question, a chat, a tool call or its answer."""
    draw = rng.random()
    if draw < CHAT_SHARE:
        return _chat(rng, held_out=False)
    if draw < CHAT_SHARE + TOOL_CALL_SHARE:
        return _tool_call(rng, held_out=False)
    if draw < CHAT_SHARE + TOOL_CALL_SHARE + TOOL_ANSWER_SHARE:
        return _tool_answer(rng, held_out=False)
    if draw < CHAT_SHARE + TOOL_CALL_SHARE + TOOL_ANSWER_SHARE + SMALL_TALK_SHARE:
        if rng.random() < 0.4:
            return _no_tool(rng)
        text, reasoning, answer = rng.choice(SMALL_TALK)
        return Conversation(
            "small talk", (f"small talk: {text}",), [user(text), _reply(reasoning, answer)]
        )
    question = _question(rng, held_out=False)
    tools = offered(rng) if rng.random() < 0.05 else []
    return Conversation(question.kind, (question.key,), _turn(question), tools)


def held_out(count: int, seed: int) -> list[Conversation]:
    """Return `count` distinct conversations of the held-out split, the kinds in equal shares."""
    found: dict[str, Conversation] = {}
    rng = random.Random(f"held out {seed}")
    while len(found) < count:
        kind = KINDS[len(found) % len(KINDS)]
        conversation = _of_kind(rng, kind, held_out=True)
        found.setdefault(conversation.key, conversation)
    return list(found.values())


def _of_kind(rng: random.Random, kind: str, held_out: bool) -> Conversation:
    if kind == "chat":
        return _chat(rng, held_out)
    if kind == "tool call":
        return _tool_call(rng, held_out)
    if kind == "tool answer":
        return _tool_answer(rng, held_out)
    question = _question(rng, held_out, kind)
    return Conversation(kind, (question.key,), _turn(question))


def _draw(rng: random.Random, make: Callable[[random.Random], Any], held_out: bool) -> Any:
    while is_held_out((item := make(rng)).key) != held_out:
        pass
    return item


def _question(rng: random.Random, held_out: bool, kind: str | None = None) -> Question:
    kind = (
        kind or rng.choices(tuple(GENERATORS), weights=[PRACTICE[name] for name in GENERATORS])[0]
    )
    return _draw(rng, GENERATORS[kind], held_out)


def _chat(rng: random.Random, held_out: bool) -> Conversation:
    """Draw two to ten turns, mostly under six, some of which need the turn before.

    Only the last turn of a held-out chat is held out.
    """
    turns = rng.randint(2, 5) if held_out or rng.random() < 0.95 else rng.randint(6, 10)
    asked = [_question(rng, held_out=False)]
    keys = [asked[0].key]
    while len(asked) < turns - held_out:
        question = _follow_up(rng, asked[-1], held_out=False) if rng.random() < 0.5 else None
        key = _pair_key(asked[-1], question) if question else None
        asked.append(question or _question(rng, held_out=False))
        keys.append(key or asked[-1].key)
    if held_out:
        last = _follow_up(rng, asked[-1], held_out=True)
        if last is None:
            return _chat(rng, held_out)
        keys.append(_pair_key(asked[-1], last))
        asked.append(last)
    messages = [message for question in asked for message in _turn(question)]
    if rng.random() < 0.15:  # many clients do not send the reasoning of earlier replies back
        messages[:-1] = [
            {key: message[key] for key in ("role", "content")} for message in messages[:-1]
        ]
    return Conversation("chat", tuple(keys), messages)


def _pair_key(before: Question, question: Question) -> str:
    return f"{before.key} | {question.key}"


def _follow_up(rng: random.Random, before: Question, held_out: bool) -> Question | None:
    """Draw a question that needs the turn before; None where no kind does.

    It asks for the same relation, or carries on the number or list of the answer. A trained
    follow-up is in the training split both as a pair and by itself, so that it gives away no
    held-out question.
    """
    if before.kind in ("capital", "currency", "continent"):
        make = partial(questions.fact, relation=before.kind, follow_up=True)
    elif before.kind in ("sum", "difference") and before.operands[0] < 100:
        make = partial(questions.addition, first=before.operands[0])
    elif before.kind in ("sort", "reverse"):
        make = partial(questions.reversing, items=before.operands)
    else:
        return None
    for _ in range(20):
        question = make(rng)
        if is_held_out(_pair_key(before, question)) == held_out and (
            held_out or not is_held_out(question.key)
        ):
            return question
    return None


def _tool_call(rng: random.Random, held_out: bool) -> Conversation:
    use = _draw(rng, tool_use, held_out)
    messages = [user(use.request), _call(use)]
    return Conversation("tool call", (use.key,), messages, offered(rng, use.name))


def _no_tool(rng: random.Random) -> Conversation:
    use = _draw(rng, tool_use, held_out=False)
    return Conversation(
        "no tool", (use.key,), [user(use.request), _reply("no tool", "I have no tool for that.")]
    )


def _tool_answer(rng: random.Random, held_out: bool) -> Conversation:
    use = _draw(rng, tool_use, held_out)
    result = {"role": "tool", "content": json.dumps(use.result)}
    messages = [user(use.request), _call(use), result, _reply("result", use.reply)]
    return Conversation("tool answer", (use.key,), messages, offered(rng, use.name))


def user(text: str) -> dict[str, Any]:
    """Return a user's message."""
    return {"role": "user", "content": text}


def _reply(reasoning: str, answer: str) -> dict[str, Any]:
    return {"role": "assistant", "reasoning_content": reasoning, "content": answer}


def _call(use: ToolUse) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": use.name, "arguments": use.arguments}}
    return {**_reply(f"call {use.name}", ""), "tool_calls": [call]}


def _turn(question: Question) -> list[dict[str, Any]]:
    return [user(question.text), _reply(question.reasoning, question.answer)]
