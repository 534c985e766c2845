"""Responses that can be asked for again and gone on from, as long as there is room for them."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from neuron_minimax.serving.protocol import RequestError

MAX_RESPONSES = 4096
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Stored:
    """A response, and the messages of its conversation up to it; both as JSON."""

    response: bytes
    messages: bytes

    @property
    def nbytes(self) -> int:
        return len(self.response) + len(self.messages)


class Store:
    """Responses by owner and id; those that were not used for longest make room for new ones.

    Of another owner's response nobody learns that it exists.
    """

    def __init__(self) -> None:
        self._stored: OrderedDict[tuple[Hashable, str], Stored] = OrderedDict()
        self._nbytes = 0

    def put(self, owner: Hashable, name: str, stored: Stored) -> None:
        self._stored[owner, name] = stored
        self._nbytes += stored.nbytes
        while len(self._stored) > MAX_RESPONSES or self._nbytes > MAX_BYTES:
            _, oldest = self._stored.popitem(last=False)
            self._nbytes -= oldest.nbytes

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
        self._nbytes -= self.get(owner, name).nbytes
        del self._stored[owner, name]
