"""Access control and log: every HTTP request is checked for host, key, content type and size."""

import contextvars
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from importlib import resources
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from neuron_minimax.serving.messages_api import errors
from neuron_minimax.serving.protocol import RequestError

logger = logging.getLogger("neuron_minimax.serving")
access_log = logging.getLogger("neuron_minimax.serving.access")
HEALTH_PATHS = ("/health", "/health/live", "/health/ready")
PROBED_PATHS = (*HEALTH_PATHS, "/metrics")  # every few seconds, by programs
# The chat page's files by their path; index.html is the page itself.
PAGE_FILES = {
    f"/{file.name}".removesuffix("index.html"): file
    for file in (resources.files("neuron_minimax.serving") / "page").iterdir()
}
OPEN_PATHS = (*PAGE_FILES, *HEALTH_PATHS)
MESSAGE_PATH = "/v1/messages"
REQUEST_ID_HEADERS = (b"x-request-id", b"request-id")  # the second is Anthropic's
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# What a request's handler adds to its line in the log.
log_fields: contextvars.ContextVar[MutableMapping[str, Any]] = contextvars.ContextVar("log_fields")
# Whose request it is: the number of its API key; None for everybody who needs none.
client: contextvars.ContextVar[int | None] = contextvars.ContextVar("client", default=None)


class AccessControl:
    """ASGI middleware that checks a request, gives it an id, and writes its line into the log.

    Without `api_keys` no key is needed; without `hosts` any Host header is taken.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: tuple[bytes, ...],
        hosts: frozenset[str],
        on_error: Callable[[str], None],
    ) -> None:
        self._app = app
        self._api_keys = api_keys
        self._hosts = hosts
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        given_id = headers.get("x-request-id", "")
        request_id = given_id if REQUEST_ID.fullmatch(given_id) else uuid.uuid4().hex
        fields: dict[str, Any] = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"],
        }
        token = log_fields.set(fields)
        started = time.monotonic()

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                fields["status"] = message["status"]
                names = REQUEST_ID_HEADERS[: 2 if is_message_path(scope["path"]) else 1]
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name, request_id.encode()) for name in names),
                ]
            await send(message)

        try:
            client.set(self._check(scope, headers))
            await self._app(scope, receive, send_with_id)
        except RequestError as error:
            self._on_error(error.kind)
            await error_response(error, scope["path"])(scope, receive, send_with_id)
        except Exception:  # a fault of ours: the client gets no trace of it, the log does
            self._on_error("internal_error")
            logger.exception("internal error", extra={"fields": fields})
            if "status" not in fields:
                fault = RequestError(
                    "internal error; the server's log has it", status=500, kind="internal_error"
                )
                await error_response(fault, scope["path"])(scope, receive, send_with_id)
        finally:
            fields["seconds"] = round(time.monotonic() - started, 4)
            level = logging.DEBUG if _is_probe(fields) else logging.INFO
            access_log.log(level, "request", extra={"fields": fields})
            log_fields.reset(token)

    def _check(self, scope: Scope, headers: dict[str, str]) -> int | None:
        """Return the number of the request's API key, if it needs one. Raises RequestError."""
        host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if self._hosts and host not in self._hosts:
            raise RequestError(
                f"host {host!r} is not served here; see --allowed-host", status=421, kind="host"
            )
        key = None
        if self._api_keys and scope["path"] not in OPEN_PATHS:
            key = self._key_of(headers)
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and content_type != "application/json":
            raise RequestError(
                f"content type {content_type!r}; expected application/json", status=415
            )
        return key

    def _key_of(self, headers: dict[str, str]) -> int:
        """Return the number of the key that was sent. Raises RequestError (401)."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")  # as Anthropic's clients send it
        given = key.strip(" \t").encode("latin-1")  # the bytes that came
        # Every key is compared, so that the time says nothing.
        matches = [hmac.compare_digest(given, known) for known in self._api_keys]
        if not any(matches):
            raise RequestError(
                "no valid API key; send it as `Authorization: Bearer KEY`, or as `x-api-key: KEY`",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
            )
        return matches.index(True)


def _is_probe(fields: MutableMapping[str, Any]) -> bool:
    """Say whether a request has asked how the server is, and was told."""
    return fields["path"] in PROBED_PATHS and fields.get("status") in (200, 503)


def error_response(error: RequestError, path: str) -> JSONResponse:
    """Return an error in the form of the protocol that is spoken at a path."""
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if is_message_path(path):
        body = errors.body_of(error, log_fields.get()["request_id"])
        return JSONResponse(body, status_code=errors.status_of(error), headers=headers)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def is_message_path(path: str) -> bool:
    """Say whether Anthropic's protocol is spoken at a path."""
    return path == MESSAGE_PATH or path.startswith(f"{MESSAGE_PATH}/")


async def read_body(
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]], limit: int
) -> bytes:
    """Read the whole body. Raises RequestError (413) as soon as it is larger than `limit` bytes."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("the client went away", status=499, kind="cancelled")
        body += message.get("body", b"")
        if len(body) > limit:
            raise RequestError(
                f"the body is larger than {limit} bytes", status=413, kind="request_too_large"
            )
        if not message.get("more_body"):
            return bytes(body)
