"""What the routes of every protocol do alike: read a request and have it prepared in time, send its
answer as it grows or wait for all of it, and end it at once when the client leaves.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from neuron_minimax.serving.access import log_fields, read_body
from neuron_minimax.serving.preparation import with_ignored
from neuron_minimax.serving.protocol import RequestError
from neuron_minimax.serving.service import Service, Submission

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@asynccontextmanager
async def deadline_of(service: Service) -> AsyncIterator[float]:
    """Give the time (of time.monotonic) by which a request that arrives now has to be answered.

    Raises RequestError (504) when the block, which ends where the engine begins, takes longer.
    """
    allowed = service.settings.request_timeout
    deadline = time.monotonic() + allowed
    try:
        async with asyncio.timeout(allowed):
            yield deadline
    except TimeoutError:
        raise RequestError(
            "the request took longer than the server allows", status=504, kind="timeout"
        ) from None


async def receive_body(request: Request, service: Service) -> bytes:
    """Read a request's body. Raises RequestError."""
    body = await read_body(request.receive, service.settings.max_body)
    if service.settings.log_requests:
        log_fields.get()["body"] = body.decode("utf-8", "replace")
    return body


async def prepare(
    service: Service, function: Callable[..., Result], body: bytes, *more: bytes
) -> Result:
    """Have a limited process make something of a body, and of `more` texts, with a function as
    `with_ignored` takes it. Raises RequestError.

    The place in the line comes after the body, which a client may be slow to send: what unfinished
    bodies hold is limited where connections are.
    """
    desk = service.model.desks.for_text(sum(map(len, (body, *more))))
    with desk.place():
        prepared, ignored = await desk.work(with_ignored, function, body, *more)
    if ignored:
        logger.debug("fields without effect: %s", ", ".join(ignored))
    return prepared  # type: ignore[no-any-return]


class EventStream(Response):
    """Sends server-sent events; calls `on_end` however it ends, at once if the client leaves."""

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((sender, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._on_end()
            gone.cancel()
            sender.cancel()
            await asyncio.gather(sender, gone, return_exceptions=True)
        if not sender.cancelled() and (fault := sender.exception()):
            raise fault

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def collected(
    request: Request, submission: Submission, work: Coroutine[Any, Any, None]
) -> None:
    """Wait for `work`, which takes in the updates of a submission; end both if the client leaves.

    Raises RequestError when it leaves, or what the work raises.
    """
    collecting = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait((collecting, gone), return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise RequestError("the client went away", status=499, kind="cancelled", counted=True)
        collecting.result()
    finally:
        submission.cancel()
        gone.cancel()
        collecting.cancel()


async def with_pauses(
    source: AsyncIterator[Result], seconds: float
) -> AsyncIterator[Result | None]:
    """Yield the items of a source, and None whenever it has had none for so many seconds."""
    waiting: asyncio.Future[Result] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(source))
            done, _ = await asyncio.wait((waiting,), timeout=seconds)
            if not done:
                yield None
                continue
            try:
                item = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield item
    finally:
        if waiting is not None:
            waiting.cancel()


async def _gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
