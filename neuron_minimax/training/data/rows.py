"""Rows of training data in the forms that people publish, as a text or as messages for a chat
template.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from neuron_minimax.errors import TrainingError, shortened, shown
from neuron_minimax.files import parse_json

ROW_ADVICE = "expected one JSON object per line, with 'text', 'messages' or 'conversations'"
JSON_ADVICE = "expected JSON, as it is or in a string"
# ShareGPT's names of roles, in `from`, and what chat templates call them.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")
FUNCTION_CALL = "function_call"
# Where MiniMind's system turn has its tools; those of a row go before them.
TURN_TOOLS = ("tools", "functions")
MESSAGE_FIELDS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
FORMS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "conversations": ("conversations", "tools", "system"),
    "text": ("text",),
}
Row = Mapping[str, Any]


def form_of(raw: Row, where: str) -> str:
    """Return which of FORMS a row has: the first that it has a value for.

    Raises TrainingError, which names the row, when it has none.
    """
    found = next((form for form in FORMS if raw.get(form) is not None), None)
    if found is None:
        names = shortened(", ".join(sorted(raw)) or "none")
        raise TrainingError(
            f"{where} has neither 'text' nor 'messages' nor 'conversations' (its fields: {names}); "
            f"{ROW_ADVICE}"
        )
    return found


def parse_row(raw: Row, where: str) -> Row:
    """Return a row as `{"text": ...}`, or as `{"messages": [...], "tools": [...]}` in the form that
    chat templates take.

    Raises TrainingError, which names the row and what is wrong with it.
    """
    form = form_of(raw, where)
    if form == "text":
        if not isinstance(raw["text"], str):
            raise TrainingError(f"{where} has a 'text' that is none; {ROW_ADVICE}")
        return {"text": raw["text"]}
    turns = raw[form]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise TrainingError(f"{where} has {form!r} that are none; expected a list of objects")
    messages = [_message(turn, form, where) for turn in turns]
    given = [raw.get("tools")]
    if form == "conversations":
        given += [turn.get(name) for turn in turns for name in TURN_TOOLS]
        if raw.get("system"):
            messages.insert(0, _message({"role": "system", "content": raw["system"]}, form, where))
    found: Any = next((tools for tools in given if tools not in (None, "")), [])
    tools = _json(found, list, "tools", where)
    if not all(isinstance(tool, dict) for tool in tools):
        raise TrainingError(f"{where} has 'tools' that are none; expected a list of objects")
    return {"messages": messages, "tools": tools}


def unused_fields(raw: Row, where: str) -> Iterator[str]:
    """Yield the names of a row's fields that nothing reads, those of messages behind a dot."""
    form = form_of(raw, where)
    yield from (name for name in raw if name not in FORMS[form] and raw[name] is not None)
    if form == "text":
        return
    turns = raw[form]
    names = {"from", "value", *TURN_TOOLS} if form == "conversations" else set()
    known = names.union(MESSAGE_FIELDS)
    yield from {f"{form}.{name}" for turn in turns for name in turn if name not in known}


def _message(turn: Mapping[str, Any], form: str, where: str) -> dict[str, Any]:
    """Return one message in the form that chat templates take."""
    message = {name: turn[name] for name in MESSAGE_FIELDS if turn.get(name) is not None}
    if form == "conversations":
        named = turn.get("from", turn.get("role"))
        role = ROLES.get(named) if isinstance(named, str) else None
        if role is None:
            raise TrainingError(
                f"{where} has a turn from {shown(named)}; expected one of {', '.join(ROLES)}"
            )
        message["role"] = role
        content = turn.get("value", turn.get("content"))
        if named == FUNCTION_CALL:
            called = _json(content, list | dict, FUNCTION_CALL, where)
            message["tool_calls"] = called if isinstance(called, list) else [called]
            content = ""
        message["content"] = content
    message.setdefault("content", None)
    if not _is_message(message):
        raise TrainingError(
            f"{where} has {form!r} that are none; expected a list of objects with a 'role' and a "
            "'content'"
        )
    if message["role"] not in CHAT_ROLES:
        raise TrainingError(
            f"{where} has a message of role {shown(message['role'])}; expected "
            f"{', '.join(CHAT_ROLES)}"
        )
    if "tool_calls" in message:
        calls = _json(message["tool_calls"], list, "tool_calls", where)
        message["tool_calls"] = [_call(call, where) for call in calls]
    return message


def _is_message(message: Mapping[str, Any]) -> bool:
    texts = [message.get(name) for name in ("reasoning_content", "tool_call_id", "name")]
    return (
        isinstance(message.get("role"), str)
        and isinstance(message["content"], str | list | None)
        and all(isinstance(text, str | None) for text in texts)
    )


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call in OpenAI's form, its arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise TrainingError(
            f"{where} has 'tool_calls' that are none; expected a list of objects with a 'name' and "
            "'arguments'"
        )
    arguments = _json(function.get("arguments") or {}, dict, "arguments", where)
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _json(value: Any, kind: Any, name: str, where: str) -> Any:
    """Return a value of a kind, which may stand as JSON in a string."""
    if isinstance(value, str):
        place = f"{name!r} of {where}"
        value = parse_json(value.encode(), Any, place, TrainingError, JSON_ADVICE)
    if not isinstance(value, kind):
        raise TrainingError(f"{where} has {name!r} that are none; {JSON_ADVICE}")
    return value
