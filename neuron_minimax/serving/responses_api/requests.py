"""Requests to /v1/responses, and the chat request that each stands for.

Nothing here imports torch: bodies are read in limited processes. What cannot be honoured is refused
by name; hints that change nothing about an answer are taken.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

from neuron_minimax.serving.fields import Extras, Fields
from neuron_minimax.serving.preparation import Preparation, Prepared, prepare_chat
from neuron_minimax.serving.protocol import (
    MAX_TOOLS,
    ChatRequest,
    RequestError,
    parse_request,
)
from neuron_minimax.serving.responses_api.items import chat_messages, referenced
from neuron_minimax.serving.translation import (
    OF_CHAT,
    Hint,
    Names,
    Unsupported,
    in_names,
    read_typed,
)

NAMES: Names = (
    (r"\btools\.(\d+)\.function\b", r"tools.\1"),
    (r"\bresponse_format(\.json_schema)?", "text.format"),
    (r"\bmax_tokens\b", "max_output_tokens"),
    (r"^messages\b(?!\.)", "input"),
)
SEALED = "reasoning.encrypted_content"


class FunctionTool(Fields):
    type: Literal["function"]
    name: StrictStr
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: Unsupported = None
    output_schema: Hint = None


class NamedFunction(Fields):
    type: Literal["function"]
    name: StrictStr


class AllowedTools(Fields):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction] = Field(min_length=1, max_length=MAX_TOOLS)


class Format(Fields):
    type: Literal["text", "json_object", "json_schema"]
    name: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: StrictStr | None = None
    strict: StrictBool | None = None


class TextConfig(Fields):
    format: Format | None = None
    verbosity: Hint = None


class StreamOptions(Fields):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Fields):
    inert: ClassVar[Mapping[str, tuple[Any, ...]]] = OF_CHAT

    model: StrictStr | None = None
    input: Any
    instructions: StrictStr | None = None
    previous_response_id: StrictStr | None = None
    store: StrictBool | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: StrictInt | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    tools: list[Any] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Any = None
    parallel_tool_calls: StrictBool | None = None
    text: TextConfig | None = None
    include: list[StrictStr] | None = None
    metadata: dict[str, StrictStr] | None = Field(None, max_length=16)
    truncation: Literal["disabled"] | None = None
    user: StrictStr | None = None
    reasoning: Hint = None
    service_tier: Hint = None
    safety_identifier: Hint = None
    prompt_cache_key: Hint = None
    prompt_cache_options: Hint = None
    prompt_cache_retention: Hint = None
    max_tool_calls: Hint = None  # of tools that the server runs, of which there are none
    background: Unsupported = None
    conversation: Unsupported = None
    context_management: Unsupported = None
    moderation: Unsupported = None
    prompt: Unsupported = None
    access_programs: Unsupported = None
    image: Unsupported = None
    top_logprobs: Unsupported = None


@dataclass(frozen=True, kw_only=True)
class PreparedResponse:
    """A request that has been read: the chat request that it stands for, and what else its answer
    depends on.

    `echo` has the fields of the request that the response repeats. `messages` are those of the
    whole conversation but for the instructions, as JSON, to be stored if that is wanted.
    """

    chat: Prepared[ChatRequest]
    echo: dict[str, Any]
    messages: bytes
    store: bool
    seal_reasoning: bool


@dataclass(frozen=True, kw_only=True)
class References:
    """What a request needs of the store: the response that it goes on from, and items, by ids; of
    `reasoning` what is there.
    """

    previous: str | None
    items: list[str]
    reasoning: list[str]


def prepare_response(
    known: Preparation,
    extras: Extras,
    body: bytes,
    earlier: bytes | None = None,
    *responses: bytes,
) -> PreparedResponse | References:
    """Prepare a response to a request, and to the `earlier` messages of its conversation (JSON).

    Return what it refers to where that is not given: the messages, and the stored `responses` that
    have the items. Raises RequestError.
    """
    asked = parse_request(ResponsesRequest, body, extras)
    if earlier is None:
        previous = asked.previous_response_id
        items, reasoning = referenced(asked.input, Extras())
        if items or reasoning or previous is not None:
            extras.ignored.clear()  # the whole reading that follows says what is passed over
            return References(previous=previous, items=items, reasoning=reasoning)
    stored = {item["id"]: item for each in responses for item in json.loads(each)["output"]}
    included = asked.include or []
    if "message.output_text.logprobs" in included:
        raise RequestError(
            "include: message.output_text.logprobs is not supported here; leave it out, or use "
            "/v1/chat/completions with logprobs",
            param="include",
        )
    messages: list[dict[str, Any]] = json.loads(earlier or b"[]")
    places = ["previous_response_id"] * len(messages)
    for place, message in chat_messages(asked.input, extras, stored):
        places.append(place)
        messages.append(message)
    instructions = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    tools = [
        read_typed({"function": FunctionTool}, tool, f"tools.{number}", extras)
        for number, tool in enumerate(asked.tools or ())
    ]
    request = {
        "model": asked.model,
        "messages": instructions + messages,
        "max_tokens": asked.max_output_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "stream": asked.stream,
        "parallel_tool_calls": asked.parallel_tool_calls,
        "response_format": _response_format(asked.text),
        "reasoning": asked.reasoning,
        **_choice(asked.tool_choice, tools, extras),
    }
    given = {name: value for name, value in request.items() if value is not None}
    with in_names(NAMES, ["instructions"] * len(instructions) + places):
        chat = prepare_chat(known, extras, json.dumps(given).encode())
    return PreparedResponse(
        chat=chat,
        echo=_echo(asked, tools),
        messages=json.dumps(messages).encode(),
        store=asked.store is not False,
        seal_reasoning=SEALED in included,
    )


def _choice(choice: Any, tools: list[FunctionTool], extras: Extras) -> dict[str, Any]:
    """Return the fields of a chat request about tools. Raises RequestError."""
    if isinstance(choice, dict):
        kinds: Any = {"function": NamedFunction, "allowed_tools": AllowedTools}
        named = read_typed(kinds, choice, "tool_choice", extras)
        if isinstance(named, AllowedTools):
            tools = _allowed(named, tools)
            choice = named.mode
        else:
            choice = {"type": "function", "function": {"name": named.name}}
    elif choice not in (None, "auto", "none", "required"):
        raise RequestError(
            "tool_choice: expected auto, none, required, a function or allowed_tools",
            param="tool_choice",
        )
    functions = [
        {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
            "strict": tool.strict,
        }
        for tool in tools
    ]
    chat_tools = [{"type": "function", "function": function} for function in functions]
    return {"tools": chat_tools or None, "tool_choice": choice}


def _allowed(choice: AllowedTools, tools: list[FunctionTool]) -> list[FunctionTool]:
    """Return the tools that may be called: of the others the model is not told."""
    names = {each.name for each in choice.tools}
    unknown = sorted(names - {tool.name for tool in tools})
    if unknown:
        raise RequestError(
            f"tool_choice.tools: no tool is named {unknown[0][:200]!r}", param="tool_choice.tools"
        )
    return [tool for tool in tools if tool.name in names]


def _response_format(text: TextConfig | None) -> dict[str, Any] | None:
    """Return the field of a chat request, if there is a format. Raises RequestError."""
    if text is None or text.format is None:
        return None
    given = text.format
    if given.type != "json_schema":
        return {"type": given.type}
    if given.schema_ is None:
        raise RequestError("text.format.schema is missing", param="text.format.schema")
    schema = {"name": given.name or "answer", "schema": given.schema_}
    return {"type": "json_schema", "json_schema": schema}


def _echo(asked: ResponsesRequest, tools: list[FunctionTool]) -> dict[str, Any]:
    """Return the fields that a response repeats of its request."""
    text = {} if asked.text is None else asked.text.model_dump(exclude_none=True, by_alias=True)
    return {
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "reasoning": asked.reasoning,
        "store": asked.store is not False,
        "text": {"format": {"type": "text"}} | text,
        "tool_choice": asked.tool_choice or "auto",
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": bool(tool.strict),
            }
            for tool in tools
        ],
        "truncation": "disabled",
        "user": asked.user,
    }
