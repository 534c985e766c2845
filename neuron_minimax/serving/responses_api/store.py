"""Responses that can be asked for again and gone on from, as long as there is room for them."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from neuron_minimax.serving.protocol import RequestError

MAX_RESPONSES = 4096
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Stored:
    """A response, and the messages of its conversation up to it; both as JSON. `items` are the ids
    of what the response has said.
    """

    response: bytes
    messages: bytes
    items: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return len(self.response) + len(self.messages)


class Store:
    """Responses by owner and id; those that were not used for longest make room for new ones.

    Of another owner's response nobody learns that it exists.
    """

    def __init__(self) -> None:
        self._stored: OrderedDict[tuple[Hashable, str], Stored] = OrderedDict()
        self._response_of: dict[tuple[Hashable, str], str] = {}  # by item
        self._nbytes = 0

    def put(self, owner: Hashable, name: str, stored: Stored) -> None:
        self._stored[owner, name] = stored
        self._response_of |= {(owner, item): name for item in stored.items}
        self._nbytes += stored.nbytes
        while len(self._stored) > MAX_RESPONSES or self._nbytes > MAX_BYTES:
            self._forget(*next(iter(self._stored)))

    def get(self, owner: Hashable, name: str) -> Stored:
        """Return a response. Raises RequestError (404) when there is none."""
        if (owner, name) not in self._stored:
            raise RequestError(
                f"no response {name[:200]!r} is stored; it was not to be, was deleted, or has made "
                "room for newer ones: send the whole conversation as input",
                status=404,
                code="response_not_found",
            )
        self._stored.move_to_end((owner, name))
        return self._stored[owner, name]

    def delete(self, owner: Hashable, name: str) -> None:
        """Forget a response. Raises RequestError (404) when there is none."""
        self.get(owner, name)
        self._forget(owner, name)

    def holding(
        self, owner: Hashable, items: Iterable[str], others: Iterable[str] = ()
    ) -> list[bytes]:
        """Return the responses that have said the items, and of `others` those that are there.
        Raises RequestError (404) for the first item that no response has.
        """
        names: dict[str, None] = {}
        for item in items:
            if (owner, item) not in self._response_of:
                raise RequestError(
                    f"no item {item[:200]!r} is stored; its response was not to be, was deleted, "
                    "or has made room for newer ones: send the item itself",
                    status=404,
                    param="input",
                    code="item_not_found",
                )
            names[self._response_of[owner, item]] = None
        for item in others:
            if (owner, item) in self._response_of:
                names[self._response_of[owner, item]] = None
        return [self.get(owner, name).response for name in names]

    def _forget(self, owner: Hashable, name: str) -> None:
        forgotten = self._stored.pop((owner, name))
        self._nbytes -= forgotten.nbytes
        for item in forgotten.items:
            del self._response_of[owner, item]
