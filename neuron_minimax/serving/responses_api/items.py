"""Input items of /v1/responses, and the chat messages that they stand for.

Nothing here imports torch: bodies are read in limited processes.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import StrictStr

from neuron_minimax.serving.fields import Extras, Fields
from neuron_minimax.serving.protocol import RequestError
from neuron_minimax.serving.translation import Hint, read_typed, unseal


class InputText(Fields):
    type: Literal["input_text"]
    text: StrictStr
    prompt_cache_breakpoint: Hint = None


class OutputText(Fields):
    type: Literal["output_text"]
    text: StrictStr
    annotations: Hint = None
    logprobs: Hint = None


class _Item(Fields):
    """What an output item has that is sent back: nothing depends on it."""

    id: StrictStr | None = None
    status: StrictStr | None = None


class MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Any
    phase: Hint = None


class DirectCaller(Fields):
    type: Literal["direct"]


class FunctionCall(_Item):
    type: Literal["function_call"]
    call_id: StrictStr
    name: StrictStr
    arguments: StrictStr
    caller: DirectCaller | None = None


class FunctionCallOutput(_Item):
    type: Literal["function_call_output"]
    call_id: StrictStr
    output: Any
    name: StrictStr | None = None
    caller: DirectCaller | None = None


class ReasoningText(Fields):
    type: Literal["reasoning_text", "summary_text"]
    text: StrictStr


class ReasoningItem(_Item):
    type: Literal["reasoning"]
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: StrictStr | None = None

    @property
    def empty(self) -> bool:
        return not (self.summary or self.content or self.encrypted_content)

    def text(self) -> str | None:
        """Return the reasoning; None where another server has sealed it."""
        if self.content:
            return "".join(part.text for part in self.content)
        unsealed = unseal(self.encrypted_content or "")
        if unsealed is not None:
            return unsealed
        if self.summary or not self.encrypted_content:
            return "\n".join(part.text for part in self.summary or ())
        return None


class ItemReference(Fields):
    """An item of a stored response, by its id; its type may be left out."""

    type: Literal["item_reference"]
    id: StrictStr


ITEMS: Any = {
    "message": MessageItem,
    "function_call": FunctionCall,
    "function_call_output": FunctionCallOutput,
    "reasoning": ReasoningItem,
    "item_reference": ItemReference,
}
PARTS: Any = {"input_text": InputText, "output_text": OutputText}


def referenced(given: Any, extras: Extras) -> tuple[list[str], list[str]]:
    """Return the ids of the stored items that an input refers to, and those of reasoning without
    its text, which some clients send back so. Raises RequestError.
    """
    items = [
        _read(value, f"input.{number}", extras)
        for number, value in enumerate(given if isinstance(given, list) else ())
        if isinstance(value, dict) and _kind(value) in ("item_reference", "reasoning")
    ]
    return (
        [item.id for item in items if isinstance(item, ItemReference)],
        [item.id for item in items if isinstance(item, ReasoningItem) and item.id and item.empty],
    )


def chat_messages(
    given: Any, extras: Extras, stored: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the chat messages of an input, each with the place of the item that it begins with.

    `stored` has the items that it refers to, by their ids. Raises RequestError.
    """
    if isinstance(given, str):
        yield "input", {"role": "user", "content": given}
        return
    if not isinstance(given, list):
        raise RequestError("input: expected a text or a list of items", param="input")
    turn = _AssistantTurn()
    for number, value in enumerate(given):
        place = f"input.{number}"
        item = _read(value, place, extras)
        refers = isinstance(item, ItemReference)
        if refers or (isinstance(item, ReasoningItem) and item.empty and item.id in stored):
            item = _read(stored[item.id], place, extras)
        if not turn.takes(item):
            yield from turn.ended()
            turn = _AssistantTurn()
        if turn.takes(item):
            turn.add(item, place, extras)
        elif isinstance(item, MessageItem):
            content = _content(item.content, f"{place}.content", extras)
            yield place, {"role": item.role, "content": content}
        else:
            content = _content(item.output, f"{place}.output", extras)
            yield place, {"role": "tool", "tool_call_id": item.call_id, "content": content}
    yield from turn.ended()


def _read(value: Any, place: str, extras: Extras) -> Any:
    """Read an item. Raises RequestError."""
    if isinstance(value, dict):
        value = {**value, "type": _kind(value)}
    return read_typed(ITEMS, value, place, extras)


def _kind(value: Mapping[str, Any]) -> Any:
    """Return the type of an item; messages and references may leave it out."""
    kind = value.get("type")
    if kind is not None:
        return kind
    if "role" in value:
        return "message"
    return "item_reference" if "id" in value else None


class _AssistantTurn:
    """The items that an assistant has said one behind the other: one message."""

    def __init__(self) -> None:
        self._place = ""
        self._last: Any = None
        self._message: dict[str, Any] = {"role": "assistant"}

    def takes(self, item: Any) -> bool:
        """Say whether an item can belong to this turn, which does not speak twice in a row."""
        if isinstance(item, MessageItem):
            return item.role == "assistant" and not isinstance(self._last, MessageItem)
        return isinstance(item, FunctionCall | ReasoningItem)

    def add(self, item: Any, place: str, extras: Extras) -> None:
        """Add an item. Raises RequestError."""
        self._place = self._place or place
        self._last = item
        if isinstance(item, ReasoningItem):
            text = item.text()
            if text is None:
                raise RequestError(
                    f"{place}: the reasoning is sealed elsewhere; leave the item out",
                    param=f"{place}.encrypted_content",
                )
            self._append("reasoning_content", text, "\n")
        elif isinstance(item, MessageItem):
            for part in _parts(item.content, f"{place}.content", extras):
                self._append("content", part["text"], "")
        else:
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            self._message.setdefault("tool_calls", []).append(call)

    def ended(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the message, if there is one."""
        if self._last is not None:
            yield self._place, {"content": "", **self._message}

    def _append(self, field: str, text: str, between: str) -> None:
        before = self._message.get(field)
        self._message[field] = text if not before else f"{before}{between}{text}"


def _content(value: Any, place: str, extras: Extras) -> str | list[dict[str, str]]:
    return value if isinstance(value, str) else _parts(value, place, extras)


def _parts(value: Any, place: str, extras: Extras) -> list[dict[str, str]]:
    """Return the texts of a content. Raises RequestError."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise RequestError(f"{place}: expected a text or a list of parts", param=place)
    parts = [
        read_typed(PARTS, each, f"{place}.{number}", extras) for number, each in enumerate(value)
    ]
    return [{"type": "text", "text": part.text} for part in parts]
