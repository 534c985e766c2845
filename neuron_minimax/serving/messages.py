"""Messages of a request in the form that chat templates take: one system message first, the results
of tools in the order of their calls, arguments as objects.

Nothing here imports torch: messages are read in limited processes.
"""

import json
from collections.abc import Sequence
from typing import Any

from neuron_minimax.generation import template
from neuron_minimax.serving.protocol import Call, ChatMessage, RequestError

SHOWN_IDS = 8


def template_messages(messages: Sequence[ChatMessage], hugging_face: Any) -> list[dict[str, Any]]:
    """Return messages for the chat template of a tokenizer: content as text, arguments of calls as
    objects, developer messages as system messages.

    Those before the conversation join to one. A later one stays in its place where the template
    writes it there, and else joins them. Raises RequestError for messages that cannot be brought
    into that form.
    """
    head = next(
        (place for place, message in enumerate(messages) if not _is_system(message)), len(messages)
    )
    late = [place for place in range(head, len(messages)) if _is_system(messages[place])]
    moved = late if late and not template.writes_late_system(hugging_face) else []
    first = [messages[place] for place in (*range(head), *moved)]
    system = "\n\n".join(message.text() for message in first)
    rendered = [{"role": "system", "content": system}] if first else []
    rest = [place for place in range(head, len(messages)) if place not in set(moved)]
    for place in _results_in_order(messages, rest):
        rendered += _template_messages(place, messages[place], hugging_face)
    return rendered


def _is_system(message: ChatMessage) -> bool:
    return message.role in ("system", "developer")


def _results_in_order(messages: Sequence[ChatMessage], places: Sequence[int]) -> list[int]:
    """Return places with those of tool messages that follow each other in the order of the calls.

    Raises RequestError for a result of a call that nobody has made.
    """
    known: set[str | None] = set()
    order: dict[str | None, int] = {}
    ordered: list[int] = []
    results: list[int] = []
    for place in places:
        message = messages[place]
        if message.role == "tool":
            _check_call(place, message.tool_call_id, known)
            results.append(place)
            continue
        ordered += _by_calls(messages, results, order)
        results = []
        ordered.append(place)
        if message.tool_calls:
            order = {call.id: number for number, call in enumerate(message.tool_calls)}
            known |= order.keys()
    return ordered + _by_calls(messages, results, order)


def _by_calls(
    messages: Sequence[ChatMessage], results: Sequence[int], order: dict[str | None, int]
) -> list[int]:
    """Return results in the order of their calls, unless one does not say which is its own."""
    ids = [messages[place].tool_call_id for place in results]
    if None in ids or None in order:
        return list(results)
    return sorted(results, key=lambda place: order.get(messages[place].tool_call_id, -1))


def _check_call(place: int, call_id: str | None, known: set[str | None]) -> None:
    """Calls without ids have results of any."""
    if call_id is None or call_id in known or None in known:
        return
    ids = ", ".join(repr(each[:64]) for each in sorted(filter(None, known))[:SHOWN_IDS])
    expected = f"one of {ids}" if ids else "an assistant message with tool_calls before it"
    raise RequestError(
        f"messages.{place}.tool_call_id: {call_id[:200]!r} is the id of no call before it; "
        f"expected {expected}",
        param=f"messages.{place}.tool_call_id",
    )


def _template_messages(place: int, message: ChatMessage, hugging_face: Any) -> list[dict[str, Any]]:
    """Return a message as a template takes it; a tool's result of several texts, where the template
    does not write lists, as several.
    """
    thoughts = message.thoughts()
    if message.role != "assistant" and (message.tool_calls or thoughts is not None):
        raise RequestError(
            f"messages.{place}: only assistant messages have tool_calls or reasoning_content",
            param=f"messages.{place}",
        )
    if not message.texts() and message.content is None and not message.tool_calls and not thoughts:
        raise RequestError(
            f"messages.{place}.content is missing", param=f"messages.{place}.content"
        )
    rendered: dict[str, Any] = {"role": message.role, "content": message.text()}
    if thoughts is not None:
        rendered["reasoning_content"] = thoughts
    if message.tool_calls:
        rendered["tool_calls"] = [
            {"id": call.id, "type": "function", "function": _called(place, call)}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    if message.role != "tool" or not isinstance(message.content, list) or not message.content:
        return [rendered]
    texts = message.texts()
    if template.writes_results_apart(hugging_face):
        return [rendered | {"content": [{"type": "text", "text": text} for text in texts]}]
    return [rendered | {"content": text} for text in texts]


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
