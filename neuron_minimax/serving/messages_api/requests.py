"""Requests in Anthropic's format, and the chat request that each stands for.

Nothing here imports torch: bodies are read in limited processes. What cannot be honoured is refused
by name; hints that change nothing about an answer are taken.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

from neuron_minimax.serving.fields import Extras, Fields
from neuron_minimax.serving.preparation import Preparation, Prepared, prepare_chat
from neuron_minimax.serving.protocol import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatRequest,
    Items,
    RequestError,
    parse_request,
)
from neuron_minimax.serving.translation import (
    OF_CHAT,
    Hint,
    Names,
    Unsupported,
    in_names,
    read,
    read_typed,
    unseal,
)

NAMES: Names = (
    (r"\btools\.(\d+)\.function\.parameters", r"tools.\1.input_schema"),
    (r"\btools\.(\d+)\.function\b", r"tools.\1"),
    (r"\bresponse_format(\.json_schema\.schema)?", "output_config.format.schema"),
    (r"^stop\b", "stop_sequences"),
)


class TextBlock(Fields):
    type: Literal["text"]
    text: StrictStr
    cache_control: Hint = None
    citations: Unsupported = None


class ThinkingBlock(Fields):
    type: Literal["thinking"]
    thinking: StrictStr
    signature: StrictStr | None = None


class DirectCaller(Fields):
    type: Literal["direct"]


class ToolUseBlock(Fields):
    type: Literal["tool_use"]
    id: StrictStr
    name: StrictStr
    input: dict[str, Any]
    cache_control: Hint = None
    caller: DirectCaller | None = None


class ToolResultBlock(Fields):
    type: Literal["tool_result"]
    tool_use_id: StrictStr
    content: Any = None
    is_error: StrictBool | None = None
    cache_control: Hint = None


class Message(Fields):
    role: Literal["user", "assistant", "system"]
    content: Any


class ToolDefinition(Fields):
    """A tool that the client runs."""

    name: StrictStr
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: StrictStr | None = None
    strict: StrictBool | None = None
    cache_control: Hint = None
    eager_input_streaming: Hint = None  # arguments are always streamed as they come
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: Unsupported = None
    input_examples: Unsupported = None


class ToolChoice(Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool | None = None


class Thinking(Fields):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: StrictInt | None = Field(None, ge=1)  # a target, of which templates know nothing
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(Fields):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Fields):
    effort: Hint = None
    format: JsonFormat | None = None


class Edit(Fields):
    """The one edit of the context that changes nothing."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Fields):
    edits: list[Edit] | None = None


class Metadata(Fields):
    user_id: StrictStr | None = None


class CountRequest(Fields):
    """What the prompt is made of; the body of /v1/messages/count_tokens, which may be that of a
    message.
    """

    hints: ClassVar[frozenset[str]] = frozenset(
        {
            *("max_tokens", "stream", "stop_sequences", "temperature", "top_p", "top_k"),
            *("metadata", "service_tier"),
        }
    )
    inert: ClassVar[Mapping[str, tuple[Any, ...]]] = OF_CHAT

    model: StrictStr | None = None
    messages: Items[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Any = None
    tools: list[Any] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None  # its older name
    context_management: ContextManagement | None = None
    cache_control: Hint = None
    speed: Literal["standard"] | None = None
    mcp_servers: Unsupported = None
    compaction: Unsupported = None
    thread: Unsupported = None


class MessagesRequest(CountRequest):
    max_tokens: StrictInt = Field(ge=1)
    stream: StrictBool = False
    stop_sequences: Items[StrictStr] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: StrictInt | None = None
    metadata: Metadata | None = None
    service_tier: Hint = None
    container: Unsupported = None
    diagnostics: Unsupported = None
    fallbacks: Unsupported = None
    inference_geo: Unsupported = None


@dataclass(frozen=True, kw_only=True)
class PreparedMessage:
    """A request that has been read: the chat request that it stands for, and what else its answer
    depends on. The chat request has no limit of tokens where `max_tokens` would not fit.
    """

    chat: Prepared[ChatRequest]
    max_tokens: int
    omit_thinking: bool


def prepare_message(known: Preparation, extras: Extras, body: bytes) -> PreparedMessage:
    """Prepare a message. Raises RequestError."""
    asked = parse_request(MessagesRequest, body, extras)
    chat = _prepare(known, extras, asked, _options(asked))
    if asked.max_tokens > known.seq_len - chat.prompts[0].length:
        # The protocol lets an answer end where the context does.
        unlimited = chat.asked.model_copy(update={"max_tokens": None})
        chat = Prepared(**{**vars(chat), "asked": unlimited})
    omit = asked.thinking is not None and asked.thinking.display == "omitted"
    return PreparedMessage(chat=chat, max_tokens=asked.max_tokens, omit_thinking=omit)


def count_tokens(known: Preparation, extras: Extras, body: bytes) -> bytes:
    """Return the response to /v1/messages/count_tokens. Raises RequestError."""
    chat = _prepare(known, extras, parse_request(CountRequest, body, extras), {})
    return json.dumps({"input_tokens": chat.prompts[0].length}).encode()


def _prepare(
    known: Preparation, extras: Extras, asked: CountRequest, options: dict[str, Any]
) -> Prepared[ChatRequest]:
    rendered = list(_chat_messages(asked, extras))
    request: dict[str, Any] = {
        "model": asked.model,
        "messages": [message for _, message in rendered],
    }
    if asked.thinking is not None:
        request["thinking"] = {"type": asked.thinking.type}
    request |= _tools(asked, extras) | options
    form = asked.output_format or (asked.output_config and asked.output_config.format)
    if form:
        answer = {"name": "answer", "schema": form.schema_}
        request["response_format"] = {"type": "json_schema", "json_schema": answer}
    body = json.dumps({name: value for name, value in request.items() if value is not None})
    with in_names(NAMES, [place for place, _ in rendered]):
        return prepare_chat(known, extras, body.encode())


def _options(asked: MessagesRequest) -> dict[str, Any]:
    return {
        "max_tokens": asked.max_tokens,
        "stream": asked.stream,
        "stop": asked.stop_sequences,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
    }


def _tools(asked: CountRequest, extras: Extras) -> dict[str, Any]:
    """Return the fields of a chat request about tools. Raises RequestError."""
    tools = [
        _tool(value, f"tools.{number}", extras) for number, value in enumerate(asked.tools or ())
    ]
    fields: dict[str, Any] = {"tools": tools or None}
    choice = asked.tool_choice
    if choice is None:
        return fields
    if (choice.type == "tool") != (choice.name is not None):
        raise RequestError(
            "tool_choice.name: expected with type tool, and only there", param="tool_choice.name"
        )
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    if choice.type == "tool":
        named: Any = {"type": "function", "function": {"name": choice.name}}
    else:
        named = "required" if choice.type == "any" else choice.type
    return fields | {"tool_choice": named}


def _tool(value: Any, place: str, extras: Extras) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in (None, "custom"):
        raise RequestError(
            f"{place}.type: found {kind!r}; this server runs no tools and knows none by its type: "
            "expected custom, with a name and an input_schema",
            param=f"{place}.type",
        )
    tool = read(ToolDefinition, value, place, extras)
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}


def _chat_messages(asked: CountRequest, extras: Extras) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the messages of the chat request, each with the place that it comes from.

    Consecutive messages of one role are one turn. Raises RequestError.
    """
    if asked.system is not None:
        yield "system", {"role": "system", "content": _text(asked.system, "system", extras)}
    turn: list[tuple[str, Any]] = []
    for number, message in enumerate(asked.messages):
        place = f"messages.{number}"
        if message.role == "system":
            content = _text(message.content, f"{place}.content", extras)
            yield place, {"role": "system", "content": content}
            continue
        turn += _blocks(message.content, f"{place}.content")
        following = asked.messages[number + 1 :][:1]
        if following and following[0].role == message.role:
            continue
        render = _assistant_turn if message.role == "assistant" else _user_turn
        yield from ((place, rendered) for rendered in render(turn, extras))
        turn = []
    if asked.messages[-1].role == "assistant":
        raise RequestError(
            f"messages.{len(asked.messages) - 1}: the conversation ends with an assistant message, "
            "which this model cannot go on with; expected a user message",
            param="messages",
        )


def _blocks(content: Any, place: str) -> list[tuple[str, Any]]:
    """Return the blocks of a content, each with its place, unread. Raises RequestError."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RequestError(f"{place}: expected a text or a list of blocks", param=place)
    return [(f"{place}.{number}", block) for number, block in enumerate(content)]


def _text(content: Any, place: str, extras: Extras) -> str:
    """Return the text of a content that has nothing else. Raises RequestError."""
    kinds = {"text": TextBlock}
    blocks = _blocks(content, place)
    return "\n".join(read_typed(kinds, block, at, extras).text for at, block in blocks)


def _user_turn(blocks: list[tuple[str, Any]], extras: Extras) -> Iterator[dict[str, Any]]:
    """Yield the messages of a user's turn: results of tools, then its text. Raises RequestError."""
    kinds: Any = {"text": TextBlock, "tool_result": ToolResultBlock}
    texts: list[str] = []
    results = False
    for place, value in blocks:
        block = read_typed(kinds, value, place, extras)
        if isinstance(block, TextBlock):
            texts.append(block.text)
            continue
        if texts:
            raise RequestError(
                f"{place}: a tool_result comes behind text; expected all of them before it",
                param=place,
            )
        results = True
        yield {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": _result(block, f"{place}.content", extras),
        }
    if texts or not results:
        yield {"role": "user", "content": "\n".join(texts)}


def _result(block: ToolResultBlock, place: str, extras: Extras) -> list[dict[str, str]]:
    """Return the texts of a result; of an error the first says so, for templates cannot."""
    kinds = {"text": TextBlock}
    blocks = _blocks("" if block.content is None else block.content, place)
    parts = [read_typed(kinds, each, at, extras).text for at, each in blocks]
    if block.is_error:
        parts[:1] = [f"Error: {''.join(parts[:1])}".rstrip()]
    return [{"type": "text", "text": text} for text in parts]


def _assistant_turn(blocks: list[tuple[str, Any]], extras: Extras) -> Iterator[dict[str, Any]]:
    """Yield the message of an assistant's turn. Raises RequestError."""
    kinds: Any = {"text": TextBlock, "thinking": ThinkingBlock, "tool_use": ToolUseBlock}
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[dict[str, Any]] = []
    for place, value in blocks:
        block = read_typed(kinds, value, place, extras)
        if isinstance(block, ThinkingBlock):
            reasoning.append(_reasoning(block, place))
        elif isinstance(block, TextBlock):
            content.append(block.text)
        else:
            function = {"name": block.name, "arguments": json.dumps(block.input)}
            calls.append({"id": block.id, "type": "function", "function": function})
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content)}
    if reasoning:
        message["reasoning_content"] = "\n".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    yield message


def _reasoning(block: ThinkingBlock, place: str) -> str:
    reasoning = block.thinking or unseal(block.signature or "")
    if reasoning is None:
        raise RequestError(
            f"{place}: the thinking is sealed in a signature from elsewhere; leave the block out",
            param=f"{place}.signature",
        )
    return reasoning
