"""From a checked request to the prompt's tokens, in the form that chat templates expect."""

import json
from collections.abc import Sequence
from typing import Any

from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.serving.protocol import Call, ChatMessage, RequestError, Tool, check_depth


def chat_prompt(
    tokenizer: TextTokenizer, messages: Sequence[ChatMessage], tools: Sequence[Tool] | None
) -> str:
    """The rendered prompt. Raises RequestError on messages that cannot be rendered."""
    try:
        return tokenizer.render_chat(template_messages(messages), tool_dicts(tools))
    except GenerationError as error:
        raise RequestError(str(error), param="messages") from None


def tool_dicts(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools as plain objects, without what was not given."""
    if not tools:
        return None
    dicts = [tool.model_dump(exclude_none=True) for tool in tools]
    check_depth(dicts, "tools")
    return dicts


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for a chat template: one system message first (developer messages are system
    messages, and several join to one), content as text, arguments of calls as objects.
    """
    head = next(
        (place for place, message in enumerate(messages) if not _is_system(message)), len(messages)
    )
    late = next(
        (place for place in range(head, len(messages)) if _is_system(messages[place])), None
    )
    if late is not None:
        raise RequestError(
            f"messages.{late}: a {messages[late].role} message after the conversation has begun is "
            "not supported; put it first",
            param=f"messages.{late}.role",
        )
    system = "\n\n".join(message.text() for message in messages[:head])
    rendered = [{"role": "system", "content": system}] if head else []
    return rendered + [
        _template_message(place, messages[place]) for place in range(head, len(messages))
    ]


def _is_system(message: ChatMessage) -> bool:
    return message.role in ("system", "developer")


def _template_message(place: int, message: ChatMessage) -> dict[str, Any]:
    if message.role != "assistant" and (
        message.tool_calls or message.reasoning_content is not None
    ):
        raise RequestError(
            f"messages.{place}: only assistant messages have tool_calls or reasoning_content",
            param=f"messages.{place}",
        )
    if message.content is None and not message.tool_calls and message.reasoning_content is None:
        raise RequestError(
            f"messages.{place}.content is missing", param=f"messages.{place}.content"
        )
    rendered: dict[str, Any] = {"role": message.role, "content": message.text()}
    if message.reasoning_content is not None:
        rendered["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        rendered["tool_calls"] = [
            {"id": call.id, "type": "function", "function": _called(place, call)}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    return rendered


def _called(place: int, call: Call) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(
            f"messages.{place}.tool_calls: the arguments of {call.function.name} are no JSON "
            "object",
            param=f"messages.{place}.tool_calls",
        )
    return {"name": call.function.name, "arguments": arguments}
