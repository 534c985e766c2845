"""Errors in Anthropic's form, with its status codes."""

from typing import Any

from neuron_minimax.serving.protocol import RequestError

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
OVERLOADED = 529  # what the protocol has for 503


def status_of(error: RequestError) -> int:
    return OVERLOADED if error.status == 503 else error.status


def body_of(error: RequestError, request_id: str) -> dict[str, Any]:
    """Return the body of an error; a stream has it as an event."""
    status = status_of(error)
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    message = str(error)
    if error.code == "context_length_exceeded":
        message = f"prompt is too long: {message}"  # by these words clients know when to compact
    return {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": request_id,
    }
