"""Requests in OpenAI's format with vLLM's extensions; everything else is refused by name.

Chat messages and tools are brought here into the form that chat templates expect.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    ValidationError,
    field_validator,
)

from neuron_minimax.errors import GenerationError, NeuronMiniMaxError
from neuron_minimax.generation.sampling import SamplingParams

Model = TypeVar("Model", bound=BaseModel)

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_SCHEMA_DEPTH = 32


class RequestError(NeuronMiniMaxError):
    """A request that is answered with an HTTP error in OpenAI's form."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: StrictStr


class Function(_Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class CalledFunction(_Strict):
    name: str
    arguments: str


class Call(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    function_call: None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ToolChoiceName(_Strict):
    name: str


class NamedToolChoice(_Strict):
    type: Literal["function"]
    function: ToolChoiceName


class JsonSchema(_Strict):
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Strict):
    include_usage: bool = False


class _Sampled(_Strict):
    """The fields that chat and plain completions share; None: the checkpoint's own default."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # names the end user; has no effect on the answer

    @field_validator("n", "stream", mode="before")
    @classmethod
    def _default_for_null(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
            raise RequestError(
                f"stop takes up to {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters",
                param="stop",
            )
        return stops

    def sampling(self, defaults: SamplingParams, choice: int = 0) -> SamplingParams:
        """Return the parameters of choice number `choice`; each has a seed of its own.

        Raises RequestError that names the field.
        """
        values = asdict(defaults)
        values |= {name: value for name in values if (value := getattr(self, name)) is not None}
        values["top_k"] = max(0, values["top_k"])  # vLLM's -1: all tokens
        if self.seed is not None:
            values["seed"] = self.seed + choice
        try:
            return SamplingParams(**values)
        except GenerationError as error:
            raise RequestError(str(error), param=str(error).split()[0]) from None


class ChatRequest(_Sampled):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    def limit(self) -> int | None:
        return (
            self.max_completion_tokens
            if self.max_completion_tokens is not None
            else self.max_tokens
        )

    def top(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Sampled):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    def limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else 16  # OpenAI's default here

    def top(self) -> int | None:
        return self.logprobs


class TokenizeRequest(_Strict):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)


class DetokenizeRequest(_Strict):
    model: str | None = None
    tokens: list[int]


def parse_request(model: type[Model], body: bytes) -> Model:
    """Read a JSON body as `model`. Raises RequestError that names the first field at fault."""
    try:
        text = body.decode("utf-8")
        values = json.loads(text)
        if "\\u" in text:  # half a surrogate pair is valid JSON, but no text that can be tokenized
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {type(error).__name__}") from None
    if not isinstance(values, dict):
        raise RequestError(f"the body is a JSON {type(values).__name__}; expected an object")
    try:
        return model.model_validate(values)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise RequestError("the body is nested too deeply") from None
        raise _named(error) from None


def _named(error: ValidationError) -> RequestError:
    """Return the first problem of a validation; an unknown field is named as unsupported."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    unknown = next((problem for problem in problems if problem["type"] == "extra_forbidden"), None)
    problem = unknown or problems[0]
    name = ".".join(str(part) for part in problem["loc"])
    if unknown:
        return RequestError(f"{name} is not supported", param=name, code="unsupported_parameter")
    return RequestError(f"{name}: {problem['msg']}", param=name)


def check_depth(value: Any, name: str, limit: int = MAX_SCHEMA_DEPTH) -> None:
    """Raise RequestError when lists and objects in `value` are nested deeper than `limit`."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RequestError(f"{name} is nested deeper than {limit} levels", param=name)


def tool_objects(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Return tools as plain objects, without what was not given; None without tools.

    Raises RequestError when they are nested too deeply.
    """
    if not tools:
        return None
    objects = [tool.model_dump(exclude_none=True) for tool in tools]
    check_depth(objects, "tools")
    return objects


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages for a chat template: content as text, arguments of calls as objects.

    One system message comes first: developer messages are system messages, and several join to one.
    Raises RequestError when they cannot be brought into that form.
    """
    head = next(
        (place for place, message in enumerate(messages) if not _is_system(message)), len(messages)
    )
    late = next(
        (place for place in range(head, len(messages)) if _is_system(messages[place])), None
    )
    if late is not None:
        raise RequestError(
            f"messages.{late}: a {messages[late].role} message after the conversation has begun is "
            "not supported; put it first",
            param=f"messages.{late}.role",
        )
    system = "\n\n".join(message.text() for message in messages[:head])
    rendered = [{"role": "system", "content": system}] if head else []
    return rendered + [
        _template_message(place, messages[place]) for place in range(head, len(messages))
    ]


def _is_system(message: ChatMessage) -> bool:
    return message.role in ("system", "developer")


def _template_message(place: int, message: ChatMessage) -> dict[str, Any]:
    if message.role != "assistant" and (
        message.tool_calls or message.reasoning_content is not None
    ):
        raise RequestError(
            f"messages.{place}: only assistant messages have tool_calls or reasoning_content",
            param=f"messages.{place}",
        )
    if message.content is None and not message.tool_calls and message.reasoning_content is None:
        raise RequestError(
            f"messages.{place}.content is missing", param=f"messages.{place}.content"
        )
    rendered: dict[str, Any] = {"role": message.role, "content": message.text()}
    if message.reasoning_content is not None:
        rendered["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        rendered["tool_calls"] = [
            {"id": call.id, "type": "function", "function": _called(place, call)}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    return rendered


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
