"""What the translations of other protocols' requests into chat requests share: how their fields are
read, and how what is wrong with them is told in the protocol's own names.

Nothing here imports torch: bodies are read in limited processes.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic_core import PydanticCustomError

from neuron_minimax.serving.fields import HINTS, INERT, Extras
from neuron_minimax.serving.protocol import ChatRequest, RequestError, named

Model = TypeVar("Model", bound=BaseModel)
# Patterns of the names of a chat request's fields, and what they are called in another protocol.
Names = Sequence[tuple[str, str]]
SEAL = "reasoning:"
# What a chat request has and other protocols have not, or call otherwise, with the values that ask
# for nothing: there it would change the answer, and is refused by name.
OF_CHAT: Mapping[str, tuple[Any, ...]] = {
    **INERT,
    **{
        name: (*INERT.get(name, ()), field.get_default())
        for name, field in ChatRequest.model_fields.items()
        if name not in HINTS
    },
}


def _nothing(value: Any) -> None:
    if value not in (None, False, [], {}):
        raise PydanticCustomError("unsupported", "it is not supported here; leave it out")


# A field that no answer depends on: about caching, prices, effort, or who asks.
Hint = Any
# A field that cannot be honoured, unless it asks for nothing.
Unsupported = Annotated[None, BeforeValidator(_nothing)]


def read(model: type[Model], value: Any, place: str, extras: Extras) -> Model:
    """Read the part of a request at `place`; `extras` are those of the request.

    Raises RequestError that names the field.
    """
    try:
        return model.model_validate(value, context=extras)
    except ValidationError as error:
        raise named(error, place) from None


def read_typed(kinds: dict[str, type[Model]], value: Any, place: str, extras: Extras) -> Model:
    """Read a part of a request as the model of its `type`. Raises RequestError, as `read`."""
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise RequestError(
            f"{place}.type: found {kind!r}; expected {', '.join(kinds)}", param=f"{place}.type"
        )
    return read(kinds[kind], value, place, extras)


@contextmanager
def in_names(names: Names, places: Sequence[str] = ()) -> Iterator[None]:
    """Tell what is wrong with a chat request in another protocol's names; message number N of it
    comes from `places[N]`.
    """

    def renamed(text: str) -> str:
        for pattern, name in names:
            text = re.sub(pattern, name, text)
        return re.sub(r"\bmessages\.(\d+)", lambda match: _place(places, match), text)

    try:
        yield
    except RequestError as error:
        error.args = (renamed(str(error)),)
        error.param = None if error.param is None else renamed(error.param)
        raise


def _place(places: Sequence[str], match: re.Match[str]) -> str:
    number = int(match[1])
    return places[number] if number < len(places) else match[0]


def seal(reasoning: str) -> str:
    """Return reasoning in a form that clients send back without showing it."""
    return base64.b64encode(f"{SEAL}{reasoning}".encode()).decode()


def unseal(sealed: str) -> str | None:
    """Return the reasoning that was sealed here; None for what was sealed elsewhere."""
    try:
        text = base64.b64decode(sealed, validate=True).decode()
    except (binascii.Error, ValueError):
        return None
    return text.removeprefix(SEAL) if text.startswith(SEAL) else None


def sign(reasoning: str) -> str:
    """Return a digest of reasoning, for clients that want a signature; nobody checks it."""
    return base64.b64encode(hashlib.sha256(reasoning.encode()).digest()).decode()
