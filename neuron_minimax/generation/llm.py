"""LLM: a compiled directory that completes prompts and answers messages, for Python programs."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuron_minimax.backends import load
from neuron_minimax.generation.conversation import Turn, as_history
from neuron_minimax.generation.engine import Engine, NewToken, Request
from neuron_minimax.generation.events import Content, Event, Message, ToolCall, collect
from neuron_minimax.generation.generate import Answer, answer, answer_room, dumped
from neuron_minimax.generation.reader import AnswerReader
from neuron_minimax.generation.sampling import SamplingParams
from neuron_minimax.generation.template import Scalar
from neuron_minimax.generation.tokenizer import TextTokenizer, read_stop_tokens
from neuron_minimax.progress import SILENT, Progress

Messages = str | Sequence[Mapping[str, Any]]
STOPPED = "stopped"  # the finish reason of a turn that was ended from outside


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An assistant turn: its parts, its tokens, and why it ended ("stop" or "length"; "stopped"
    when whoever listened to it ended it).

    `as_message` is what goes behind the messages to go on with the conversation.
    """

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    token_ids: tuple[int, ...]
    finish_reason: str

    def as_message(self) -> dict[str, Any]:
        """Return the turn in OpenAI's form, arguments of tool calls as objects."""
        return as_history(Message(self.reasoning, self.text, list(self.tool_calls)))


@dataclass(kw_only=True)
class Heard:
    """What has been said of a turn so far."""

    events: list[Event] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, step: NewToken) -> None:
        """Take the next token."""
        self.events += step.events
        self.token_ids.append(step.token)
        self.finish_reason = step.finish_reason or ""

    def reply(self) -> Reply:
        """Return it as a turn, cut off where it has come to."""
        message = collect(self.events)
        return Reply(
            text=message.content,
            reasoning=message.reasoning,
            tool_calls=tuple(message.tool_calls),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason or STOPPED,
        )


class LLM:
    """A compiled model, loaded: `generate` completes a prompt, `chat` and `stream` answer messages.

    Messages are a text, taken as the user's, or a list in OpenAI's form. Nothing is remembered
    between two calls but the caches: a prompt that begins as an earlier one did starts from there.
    Where no sampling parameters are given, the checkpoint's own apply. Several streams may be open
    at once, one per slot of the compiled model; a call of the others takes a slot as well. One
    thread at a time.

    >>> llm = LLM("traced_model/demo")
    >>> llm.chat("What is the capital of France?").text
    'The capital of France is Paris.'
    >>> messages = [{"role": "user", "content": "What is 45 + 36?"}]
    >>> for event in llm.stream(messages, SamplingParams(temperature=0)):
    ...     print(event)
    Reasoning(text='5')
    Reasoning(text='+')
    ...
    """

    def __init__(self, traced: str | Path, *, progress: Progress = SILENT) -> None:
        """Load a compiled directory. Raises BackendError or GenerationError."""
        self.backend = load(traced, progress)
        directory = self.backend.model_directory
        self.engine = Engine(self.backend)
        self._tokenizer = (
            TextTokenizer.from_dir(directory) if (directory / "tokenizer.json").is_file() else None
        )

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer. Raises GenerationError when the compiled directory has none."""
        return self._tokenizer or TextTokenizer.from_dir(self.backend.model_directory)

    @property
    def sampling(self) -> SamplingParams:
        """The sampling parameters that apply where none are given."""
        return self._tokenizer.sampling if self._tokenizer else SamplingParams()

    def turn(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Scalar] | None = None,
    ) -> Turn:
        """Return the prompt that `chat` gives the model, with its default sampling parameters.

        Raises GenerationError when the messages cannot be rendered.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return Turn.after(messages, self.tokenizer, tools, chat_template_kwargs)

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        max_new_tokens: int | None = None,
        on_text: Callable[[str], None] = lambda text: None,
        dump_logits: str | Path | None = None,
    ) -> Answer:
        """Complete a prompt, given as text or as tokens and taken as it is (no chat template).

        Prompt tokens need no tokenizer: without one the answer has no text. `on_text` is called
        with the text as it appears; `dump_logits` names a safetensors file to write (see
        generate.dumped). Raises GenerationError when the request does not fit.

        >>> llm.generate([1, 2, 3], SamplingParams(temperature=0), max_new_tokens=3).token_ids
        [15, 198, 15]
        """
        prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        can = self.backend.capabilities
        stops = (
            self._tokenizer.stop_token_ids
            if self._tokenizer
            else read_stop_tokens(self.backend.model_directory, can.vocab_size)
        )
        params = params or self.sampling
        request = Request(
            prompt_ids=prompt_ids,
            params=params,
            max_new_tokens=answer_room(can, prompt_ids, max_new_tokens),
            stop_token_ids=frozenset(stops),
            reader=AnswerReader(self.tokenizer, stops=params.stop) if params.stop else None,
        )
        with closing(self.engine.run(request)) as run:
            steps: Iterator[NewToken] = (
                run if dump_logits is None else dumped(run, request, dump_logits)
            )
            if request.reader is not None:
                return _read_answer(steps, on_text)
            return answer(steps, self._tokenizer, on_text)

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        max_new_tokens: int | None = None,
        chat_template_kwargs: Mapping[str, Scalar] | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        dump_logits: str | Path | None = None,
    ) -> Reply:
        """Answer messages. Raises GenerationError when they do not fit, or cannot be rendered.

        `tools` are the functions that the model may call, in OpenAI's form. `chat_template_kwargs`
        are arguments of the checkpoint's chat template, such as {"enable_thinking": False} for
        Qwen3; one that it lacks is refused by name. `on_event` is called with the events of the
        turn as they appear; `dump_logits`: see `generate`.

        >>> messages = [{"role": "user", "content": "What is the capital of France?"}]
        >>> reply = llm.chat(messages)
        >>> question = {"role": "user", "content": "What is the capital of Norway?"}
        >>> llm.chat([*messages, reply.as_message(), question]).text
        'The capital of Norway is Oslo.'
        """
        turn = self.turn(messages, tools, chat_template_kwargs)
        request = turn.request(self.backend, params, max_new_tokens)
        heard = Heard()
        with closing(self.engine.run(request)) as run:
            steps: Iterator[NewToken] = (
                run if dump_logits is None else dumped(run, request, dump_logits)
            )
            for step in steps:
                heard.add(step)
                for event in step.events:
                    on_event(event)
        return heard.reply()

    def stream(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        max_new_tokens: int | None = None,
        chat_template_kwargs: Mapping[str, Scalar] | None = None,
    ) -> Generator[Event, None, None]:
        """Answer messages as `chat` does, and yield the events of the turn as they appear.

        The generator may be closed, or dropped, at any time: the slot is free then. Raises
        GenerationError, at once, when the messages do not fit, or cannot be rendered.
        """
        turn = self.turn(messages, tools, chat_template_kwargs)
        return self._events(turn.request(self.backend, params, max_new_tokens))

    def _events(self, request: Request) -> Generator[Event, None, None]:
        with closing(self.engine.run(request)) as steps:
            for step in steps:
                yield from step.events


def _read_answer(steps: Iterator[NewToken], on_text: Callable[[str], None]) -> Answer:
    """Run the steps to their end; the text is what the request's reader lets through."""
    heard = Heard()
    for step in steps:
        heard.add(step)
        for event in step.events:
            if isinstance(event, Content):
                on_text(event.text)
    reply = heard.reply()
    return Answer(list(reply.token_ids), reply.text, reply.finish_reason)
