"""What limited processes make of a request's body: the request without its texts, and its tokens.

Everything whose cost grows with what a client has sent is here, and nothing here imports torch.
"""

import json
import pickle
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from neuron_minimax.errors import GenerationError
from neuron_minimax.generation import template
from neuron_minimax.generation.chat_formats import ChatFormat
from neuron_minimax.generation.plain_text import ChatPrompt
from neuron_minimax.serving.fields import Extras
from neuron_minimax.serving.grammars import Wish
from neuron_minimax.serving.messages import template_messages
from neuron_minimax.serving.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    NamedToolChoice,
    RequestError,
    ResponseFormat,
    TokenizeRequest,
    Tool,
    parse_request,
)
from neuron_minimax.serving.schemas import check_depth, check_schema

Asked = TypeVar("Asked", ChatRequest, CompletionRequest)
Result = TypeVar("Result")
CHARACTERS_OF_TOKEN = 64  # a token stands for at most a few dozen
ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """`length` tokens, of which `ids` holds no more than a sequence can have; their text, where
    the answer shall begin with it.
    """

    ids: "array[int]"
    length: int
    echoed: str = ""


@dataclass(frozen=True, kw_only=True)
class Prepared(Generic[Asked]):
    """A request that has been read: `asked` without its messages, prompts and tools, which are here
    as tokens and, for the reader of the answer, as objects.

    The prompt of a chat ends `in_reasoning`, or says with `without_reasoning` that there will be
    none. `wish` is a pickled Wish: the server's own process passes it on as it is.
    """

    asked: Asked
    prompts: Sequence[Prompt]
    in_reasoning: bool = False
    without_reasoning: bool = False
    tools: list[dict[str, Any]] | None = None
    wish: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What a process needs to prepare requests: the tokenizer, and the facts of what is served."""

    hugging_face: Any
    chat_format: ChatFormat
    model_name: str
    seq_len: int
    vocab_size: int
    strict: bool = False

    def check_model_name(self, name: str | None) -> None:
        check_model_name(name, self.model_name)

    def encode(self, text: str, param: str) -> list[int]:
        """Return the tokens of a text, which is refused before it is made into tokens when it is
        far too long. Raises RequestError, also for half a surrogate pair, which arguments of calls
        can spell.
        """
        limit = self.seq_len * CHARACTERS_OF_TOKEN
        if len(text) > limit:
            raise RequestError(
                f"the prompt has {len(text)} characters; at most {limit} can fit", param=param
            )
        try:
            return template.encode(self.hugging_face, text)
        except GenerationError as error:
            raise RequestError(str(error), param=param) from None

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: list[dict[str, Any]] | None,
        arguments: Mapping[str, template.Scalar] | None,
    ) -> ChatPrompt:
        """Render the prompt of a chat.

        Raises RequestError when the messages cannot be rendered, or the template lacks an argument.
        """
        try:
            return template.render(
                self.hugging_face,
                template_messages(messages, self.hugging_face),
                tools,
                arguments,
                self.chat_format.tags,
            )
        except template.TemplateArgumentError as error:
            raise RequestError(
                f"chat_template_kwargs.{error}",
                param=f"chat_template_kwargs.{error.name}",
                code="unsupported_parameter",
            ) from None
        except GenerationError as error:
            raise RequestError(str(error), param="messages") from None

    def prompt(self, ids: Sequence[int], echoed: str = "") -> Prompt:
        return Prompt(ids=array("q", ids[: self.seq_len]), length=len(ids), echoed=echoed)

    def check_stop_tokens(self, asked: ChatRequest | CompletionRequest) -> None:
        check_tokens(asked.stop_token_ids or (), self.vocab_size, "stop_token_ids")


def with_ignored(
    known: Preparation, function: Callable[..., Result], *texts: bytes
) -> tuple[Result, list[str]]:
    """Return `function(known, extras, *texts)`, and the names of the fields that it passed over.

    Raises RequestError.
    """
    extras = Extras(strict=known.strict)
    return function(known, extras, *texts), extras.ignored


def emptied(asked: Asked) -> Asked:
    """Return a request without its texts."""
    texts: dict[str, Any] = {"messages": [], "tools": None, "prompt": ""}
    known = type(asked).model_fields
    return asked.model_copy(update={k: v for k, v in texts.items() if k in known})


def prepare_chat(known: Preparation, extras: Extras, body: bytes) -> Prepared[ChatRequest]:
    """Prepare a chat completion. Raises RequestError."""
    asked = parse_request(ChatRequest, body, extras)
    known.check_model_name(asked.model)
    asked.stops()
    asked.top()
    known.check_stop_tokens(asked)
    tools = None if asked.tool_choice == "none" else tool_objects(asked.tools)
    wish = _wish(asked, tools)
    arguments = _template_arguments(known, asked, extras)
    prompt = known.render(asked.messages, tools, arguments)
    form = known.chat_format
    in_reasoning = form.opens_reasoning(prompt)
    without_reasoning = form.closes_reasoning(prompt)
    if wish is not None:
        opens = form.model_opens_reasoning and not without_reasoning
        otherwise: Literal["possible", "none"] = "possible" if opens else "none"
        wish = replace(wish, reasoning="open" if in_reasoning else otherwise)
    return Prepared(
        asked=emptied(asked),
        prompts=[known.prompt(known.encode(prompt, "messages"))],
        in_reasoning=in_reasoning,
        without_reasoning=without_reasoning,
        tools=tools,
        wish=None if wish is None else pickle.dumps(wish),
    )


def _template_arguments(
    known: Preparation, asked: ChatRequest, extras: Extras
) -> dict[str, template.Scalar]:
    """Return the arguments of the chat template, with its switch for thinking turned as is wished
    elsewhere in the request; a template without one reasons, or not, as it does.
    """
    arguments = dict(asked.chat_template_kwargs or {})
    wanted = asked.wants_thinking()
    switches = {*template.THINKING_SWITCHES}
    if wanted is None or arguments.keys() & switches:
        return arguments
    if not template.known_arguments(known.hugging_face) & switches:
        extras.ignored.append("whether to reason")
        return arguments
    return arguments | {"enable_thinking": wanted}


def prepare_completion(
    known: Preparation, extras: Extras, body: bytes
) -> Prepared[CompletionRequest]:
    """Prepare plain completions of one or more prompts. Raises RequestError."""
    asked = parse_request(CompletionRequest, body, extras)
    known.check_model_name(asked.model)
    asked.stops()
    asked.check()
    known.check_stop_tokens(asked)
    prompts = [_plain_prompt(known, prompt, asked.echo) for prompt in asked.prompts()]
    return Prepared(asked=emptied(asked), prompts=prompts)


def _plain_prompt(known: Preparation, prompt: str | list[int], echo: bool) -> Prompt:
    if isinstance(prompt, str):
        return known.prompt(known.encode(prompt, "prompt"), prompt if echo else "")
    check_tokens(prompt, known.vocab_size, "prompt")
    fitting = prompt[: known.seq_len]
    return known.prompt(prompt, template.spell(known.hugging_face, fitting) if echo else "")


def tokenize(known: Preparation, extras: Extras, body: bytes) -> bytes:
    """Return the response to /tokenize. Raises RequestError."""
    asked = parse_request(TokenizeRequest, body, extras)
    known.check_model_name(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise RequestError("expected either prompt or messages", param="prompt")
    text = asked.prompt or ""
    if asked.messages is not None:
        tools = tool_objects(asked.tools)
        text = known.render(asked.messages, tools, asked.chat_template_kwargs)
    tokens = known.encode(text, "prompt" if asked.messages is None else "messages")
    return json.dumps(
        {"count": len(tokens), "max_model_len": known.seq_len, "tokens": tokens}
    ).encode()


def detokenize(known: Preparation, extras: Extras, body: bytes) -> bytes:
    """Return the response to /detokenize. Raises RequestError."""
    asked = parse_request(DetokenizeRequest, body, extras)
    known.check_model_name(asked.model)
    if len(asked.tokens) > known.seq_len:
        raise RequestError(
            f"{len(asked.tokens)} tokens; a sequence has at most {known.seq_len}", param="tokens"
        )
    check_tokens(asked.tokens, known.vocab_size, "tokens")
    return json.dumps({"prompt": template.spell(known.hugging_face, asked.tokens)}).encode()


def check_model_name(name: str | None, served: str) -> None:
    """Raise RequestError when a request asks for another model than the one that is served."""
    if name is not None and name != served:
        raise RequestError(
            f"model {name[:200]!r} does not exist; this server has {served!r}",
            status=404,
            param="model",
            code="model_not_found",
        )


def check_tokens(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise RequestError when a number is no token."""
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise RequestError(f"{param}: expected tokens from 0 to {vocab_size - 1}", param=param)


def tool_objects(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Return tools as plain objects, without what was not given; None without tools.

    Raises RequestError when they are nested too deeply, or a schema has the wrong shape.
    """
    if not tools:
        return None
    objects = [tool.model_dump(exclude_none=True) for tool in tools]
    check_depth(objects, "tools", "tools")
    for number, each in enumerate(objects):
        place = f"tools.{number}.function.parameters"
        check_schema(each["function"].get("parameters", {}), place, "tools")
    return objects


def _wish(asked: ChatRequest, tools: list[dict[str, Any]] | None) -> Wish | None:
    """Return the grammar that the request asks for, if any. A call that is forced comes before the
    answer that shall be JSON; one that is not forced is made instead of it.
    """
    choice = asked.tool_choice
    answer = asked.response_format
    wants_json = answer is not None and answer.type != "text"
    forced = choice == "required" or isinstance(choice, NamedToolChoice)
    if forced and not tools:
        raise RequestError("tool_choice needs tools", param="tool_choice")
    for name in ("min_tokens", "ignore_eos"):
        if getattr(asked, name) and (forced or wants_json):
            raise RequestError(
                f"{name} and an answer that follows a grammar exclude each other: where the "
                "grammar has ended, so has the answer",
                param=name,
            )
    if forced and tools:
        if isinstance(choice, NamedToolChoice):
            tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
            if not tools:
                raise RequestError(
                    f"tool_choice: no tool is named {choice.function.name[:200]!r}",
                    param="tool_choice",
                )
        several = choice == "required" and asked.parallel_tool_calls is not False
        return Wish(tools=tools, several=several)
    if answer is None or not wants_json:
        return None
    several = asked.parallel_tool_calls is not False
    return Wish(schema=_schema(answer), tools=tools or (), several=several)


def _schema(answer: ResponseFormat) -> Mapping[str, Any]:
    if answer.type == "json_object":
        return ANY_OBJECT
    if answer.json_schema is None:
        raise RequestError("response_format.json_schema is missing", param="response_format")
    schema = answer.json_schema.schema_
    check_schema(schema, "response_format.json_schema.schema", "response_format")
    return schema
