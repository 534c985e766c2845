"""The sequences that a chat is learned from: what the tokenizer's own template writes, and which
parts of it the model is to write.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from neuron_minimax.errors import TrainingError
from neuron_minimax.generation.chat_formats import CHAT_FORMATS

Message = dict[str, Any]
ASKS = ("user", "tool")  # roles that a reply answers
END_REASONING = tuple({form.reasoning_tags[1] for form in CHAT_FORMATS.values()})
PROBE = "Probe."


class Part(NamedTuple):
    """A part of a rendered chat, and whether the model learns to write it."""

    text: str
    learned: bool


@dataclass(frozen=True, kw_only=True)
class WrittenChat:
    """The sequences of a chat. The numbers count replies that are in them as context alone.

    `unanswering` have nobody's message before them, `without_reasoning` no reasoning in a chat
    where others have it, though their prompt leaves room for one: what they reasoned was not kept.
    `unwritten` replies are learned, but without their reasoning: the template writes none.
    """

    sequences: list[list[Part]]
    replies: int = 0
    unanswering: int = 0
    without_reasoning: int = 0
    unwritten: int = 0


class Reply(NamedTuple):
    """A reply as the model has to write it: `text` behind `prompt`. `lost` says that the reply
    reasons and that the template writes nothing of it.
    """

    prompt: str
    text: str
    reasons: bool
    lost: bool


class ChatWriter:
    """Writes chats with a tokenizer's chat template.

    A reply is learned as the model has to write it: from behind the template's generation prompt to
    the end of turn. Where the template writes the reply so within the whole chat, it is learned
    there, else in a sequence of its own that ends with it, behind the prompt that the messages
    before it make: some templates drop the reasoning of earlier replies, even an empty one, and
    some open the reasoning in the prompt even of a reply that has none, which then closes it at
    once.

    `ends` are the spellings of tokens that may end a turn. Raises TrainingError when the tokenizer
    has no chat template, or one without generation prompt or end of turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        self.ends = tuple(ends)
        self._end = ""

    def write(self, messages: Sequence[Message], tools: Any) -> WrittenChat:
        """Return the sequences of a chat: the whole one first, if a reply is learned in it."""
        if not self.tokenizer.chat_template:
            raise TrainingError(
                "the tokenizer has no chat template, which training on messages needs"
            )
        whole = self._render(messages, tools)
        end_of_turn = self._end or self._find_end()
        spans: list[tuple[int, int]] = []
        apart: list[list[Part]] = []
        places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        answering = [n for n in places if any(m["role"] in ASKS for m in messages[:n])]
        replies = [self._reply(messages[: n + 1], tools, end_of_turn) for n in answering]
        any_reasoning = any(reply.reasons and not reply.lost for reply in replies)
        without_reasoning = 0
        for reply in replies:
            start = len(reply.prompt)
            end = start + len(reply.text)
            if any_reasoning and not reply.reasons and not _closes_reasoning(reply.prompt):
                without_reasoning += 1
            elif whole.startswith(reply.prompt) and whole[start:end] == reply.text:
                spans.append((start, end))
            else:
                apart.append([Part(reply.prompt, False), Part(reply.text, True)])
        return WrittenChat(
            sequences=([_parts(whole, spans)] if spans else []) + apart,
            replies=len(places),
            unanswering=len(places) - len(replies),
            without_reasoning=without_reasoning,
            unwritten=sum(reply.lost for reply in replies),
        )

    def _reply(self, messages: Sequence[Message], tools: Any, end_of_turn: str) -> Reply:
        """Return the last of the messages as the model has to write it."""
        prompt = self._render(messages[:-1], tools, add_generation_prompt=True)
        reasons = has_reasoning(messages[-1])
        if reasons:
            # A prompt that closes the reasoning leads to the reply as far as it opens it.
            prompt = _common(prompt, self._render(messages, tools))
        behind = self._behind(prompt, messages, tools)
        text = behind[: _end_of(behind, end_of_turn)]
        lost = reasons and not _has_reasoning_of(messages[-1], text)
        return Reply(prompt=prompt, text=text, reasons=reasons, lost=lost)

    def _behind(self, prompt: str, messages: Sequence[Message], tools: Any) -> str:
        """Return what the model has to write behind a prompt for the last of the messages."""
        turn = self._render(messages, tools)
        if turn.startswith(prompt):
            return turn[len(prompt) :]
        reply = messages[-1]
        reasoned = self._render([*messages[:-1], {**reply, "reasoning_content": PROBE}], tools)
        if not has_reasoning(reply) and reasoned.startswith(prompt + PROBE):
            return reasoned[len(prompt) + len(PROBE) :]
        # The prompt has more in it than a reply's turn begins with.
        shown = {"role": "assistant", "content": PROBE}
        header = _common(prompt, self._render([*messages[:-1], shown], tools))
        if not turn.startswith(header):
            raise TrainingError(
                "the tokenizer's chat template writes a reply in no place that its generation "
                "prompt leads to; expected the prompt to begin as a chat with the reply does"
            )
        return turn[len(header) :]

    def _find_end(self) -> str:
        """Return what ends a reply, having seen that the template has a generation prompt."""
        asked = {"role": "user", "content": PROBE}
        without = self._render([asked], None)
        prompt = self._render([asked], None, add_generation_prompt=True)
        if not prompt.startswith(without) or len(prompt) == len(without):
            raise TrainingError(
                "the chat template has no generation prompt; expected add_generation_prompt to "
                "append one"
            )
        turn = self._render([asked, {"role": "assistant", "content": PROBE}], None)
        _, _, behind = turn[len(without) :].rpartition(PROBE)
        found = [(behind.index(end), end) for end in self.ends if end in behind]
        if not found:
            raise TrainingError(
                f"the chat template ends no reply with {' or '.join(map(repr, self.ends))}: the "
                "model would not learn to stop; name its end of turn as eos_token in "
                "tokenizer_config.json"
            )
        self._end = min(found)[1]
        return self._end

    def _render(
        self, messages: Sequence[Message], tools: Any, add_generation_prompt: bool = False
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
            return str(text)
        except Exception as error:  # whatever a template does with messages that it does not expect
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise TrainingError(
                f"the tokenizer's chat template cannot render the messages ({first}); change the "
                "row or the template"
            ) from None


def has_reasoning(message: Message) -> bool:
    """Say whether a message is a reply that reasons: in a field of its own, or in its text."""
    content = message["content"]
    return message["role"] == "assistant" and (
        bool(message.get("reasoning_content"))
        or (isinstance(content, str) and any(tag in content for tag in END_REASONING))
    )


def _has_reasoning_of(reply: Message, written: str) -> bool:
    """Say whether a text has what a reply reasons in it."""
    given = reply.get("reasoning_content")
    return given.strip() in written if given else any(tag in written for tag in END_REASONING)


def _closes_reasoning(prompt: str) -> bool:
    """Say whether a prompt asks for a reply without reasoning."""
    return prompt.rstrip().endswith(END_REASONING)


def _end_of(text: str, end: str) -> int:
    """Return the place behind the first `end`; without one, that of the text."""
    place = text.find(end)
    return len(text) if place < 0 else place + len(end)


def _common(one: str, other: str) -> str:
    """Return what two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return one[: sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))]


def _parts(text: str, spans: Iterable[tuple[int, int]]) -> list[Part]:
    """Divide a text into the spans that are learned and what is between them."""
    parts = []
    done = 0
    for start, end in spans:
        parts += [Part(text[done:start], False), Part(text[start:end], True)]
        done = end
    return [*parts, Part(text[done:], False)]
