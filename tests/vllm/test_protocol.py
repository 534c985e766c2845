"""Requests that are accepted here and answers that are given, parsed by vLLM's own definitions.

The tests of the server run with recording.py between their clients and it; what has passed is
parsed. docs/serving.md has a table of what differs, and nothing else may.
"""

import copy
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from tests.vllm.recording import FILE

try:
    import vllm
    from vllm.entrypoints.anthropic import protocol as anthropic
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.completion import protocol as completion
    from vllm.entrypoints.openai.responses import protocol as responses
    from vllm.entrypoints.serve.tokenize import protocol as tokens
    from vllm.exceptions import VLLMValidationError
except ImportError as error:
    pytest.skip(
        f"vLLM's protocols cannot be imported: {error} (docs/serving.md)", allow_module_level=True
    )

ROOT = Path(__file__).parents[2]
TABLE = "| what | endpoint | where |"
WHOLE_TABLE_OF = "0.32"  # of an earlier version some rows are not true
# What differs from an earlier version alone.
EARLIER = {("field", "/v1/responses", "usage.input_tokens_details.cache_write_tokens")}
MODULES = [
    "test_agents.py",
    "test_chat_families.py",
    "test_clients.py",
    "test_completions.py",
    "test_messages.py",
    "test_responses_api.py",
    "test_server.py::test_tokenize_and_detokenize_are_inverse_and_render_messages",
    "test_server_format.py",
]
# Of each path the request, the answer and an event of its stream.
MODELS = {
    "/v1/chat/completions": (
        chat.ChatCompletionRequest,
        chat.ChatCompletionResponse,
        chat.ChatCompletionStreamResponse,
    ),
    "/v1/completions": (
        completion.CompletionRequest,
        completion.CompletionResponse,
        completion.CompletionStreamResponse,
    ),
    "/v1/messages": (
        anthropic.AnthropicMessagesRequest,
        anthropic.AnthropicMessagesResponse,
        anthropic.AnthropicStreamEvent,
    ),
    "/v1/messages/count_tokens": (
        anthropic.AnthropicCountTokensRequest,
        anthropic.AnthropicCountTokensResponse,
        None,
    ),
    "/v1/responses": (
        responses.ResponsesRequest,
        responses.ResponsesResponse,
        responses.StreamingResponsesResponse,
    ),
    "/tokenize": (tokens.TokenizeRequest, tokens.TokenizeResponse, None),
    "/detokenize": (tokens.DetokenizeRequest, tokens.DetokenizeResponse, None),
}


@pytest.fixture(scope="module")
def exchanges(tmp_path_factory):
    """What passes when the tests of the server run: path, request and answer of each."""
    path = tmp_path_factory.mktemp("exchanges") / "exchanges"
    modules = [f"tests/{name}" for name in MODULES]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.vllm.recording", *modules],
        cwd=ROOT,
        env=os.environ | {FILE: str(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-5000:]
    return [json.loads(line) for line in path.read_text().splitlines()]


def parsed(model, value):
    """A value as vLLM reads it, and the places where it does not."""
    try:
        return TypeAdapter(model).validate_python(copy.deepcopy(value)), set()
    except ValidationError as error:
        places = [problem["loc"] for problem in error.errors()]
    except VLLMValidationError as error:
        return None, {error.parameter}
    if not any(place[:1] == ("input",) for place in places):
        return None, {".".join(map(str, place)) or "whole" for place in places}
    items = value["input"]
    wrong = (
        items
        if len(items) == 1
        else [item for item in items if parsed(model, value | {"input": [item]})[1]]
    )
    return None, {f"input.{item.get('type') or item['role']}" for item in wrong}


def unknown(value, read, place=""):
    """The fields of an answer that vLLM does not have."""
    if isinstance(value, list) and isinstance(read, list):
        for one, other in zip(value, read, strict=True):
            yield from unknown(one, other, place)
    if not isinstance(value, dict) or not isinstance(read, BaseModel):
        return
    named = {field.alias or name: name for name, field in type(read).model_fields.items()}
    for name, each in value.items():
        if name in named:
            yield from unknown(each, getattr(read, named[name]), f"{place}{name}.")
        elif each is not None:
            yield place + name


def events_of(answer):
    lines = (line for line in answer.splitlines() if line.startswith("data: {"))
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def model_of(path, streamed, value):
    """The model of an answer, or of an event of its stream. Some of OpenAI's events vLLM takes as
    they are, and has none of its own.
    """
    _, answer, event = MODELS[path]
    if not streamed:
        return answer
    if path != "/v1/responses":
        return event
    kinds = typing.get_args(event)
    own = {typing.get_args(each.model_fields["type"].annotation)[0]: each for each in kinds}
    return own.get(value["type"])


def differences(exchange):
    """What differs in a request and its answer: (what, path, place)."""
    path = exchange["path"]
    _, wrong = parsed(MODELS[path][0], exchange["request"])
    yield from (("request", path, place) for place in wrong)
    streamed = exchange["answer"].startswith(("data:", "event:"))
    said = events_of(exchange["answer"]) if streamed else [json.loads(exchange["answer"])]
    for value in said:
        model = model_of(path, streamed, value)
        if model is None:
            continue
        read, wrong = parsed(model, value)
        yield from (("answer", path, place.removeprefix("response.")) for place in wrong)
        others = unknown(value, read)
        yield from (("field", path, place.removeprefix("response.")) for place in others)


def documented():
    """The rows of the table in docs/serving.md."""
    text = (ROOT / "docs" / "serving.md").read_text()
    _, _, *rows = text[text.index(TABLE) :].partition("\n\n")[0].splitlines()
    cells = [re.findall(r"`([^`]*)`|(?<=\| )(\w+)(?= \|)", row) for row in rows]
    return {tuple(a or b for a, b in row[:3]) for row in cells}


def test_every_protocol_is_spoken_streamed_and_not(exchanges):
    spoken = {(each["path"], each["request"].get("stream") or False) for each in exchanges}
    streamed = {path for path, (_, _, event) in MODELS.items() if event is not None}
    assert {(path, False) for path in MODELS} | {(path, True) for path in streamed} <= spoken


def test_vllm_reads_what_passes_but_for_what_is_documented(exchanges):
    found = {each for exchange in exchanges for each in differences(exchange)}
    assert found <= documented() | EARLIER
    if vllm.__version__.startswith(WHOLE_TABLE_OF):
        assert found == documented()
