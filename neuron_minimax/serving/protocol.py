"""Requests in OpenAI's format with vLLM's extensions.

What would change an answer and is not done here is refused by name; what changes nothing is not.

Nothing here imports torch: bodies are read in limited processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from neuron_minimax.errors import GenerationError, NeuronMiniMaxError, counted, shortened
from neuron_minimax.serving.fields import (
    HINTS,
    INERT,
    MARKS,
    PROMPT_INERT,
    UNKNOWN,
    Extras,
    Fields,
)

if TYPE_CHECKING:
    from neuron_minimax.generation.sampling import SamplingParams

Model = TypeVar("Model", bound=BaseModel)
Item = TypeVar("Item")
# Arguments of a chat template; which there are, the template says.
TemplateArguments = Annotated[
    dict[str, StrictBool | StrictInt | StrictFloat | StrictStr | None], Field(max_length=16)
]
# A list that is given up at its first wrong item.
Items = Annotated[list[Item], Field(fail_fast=True)]

# A prompt of as many token numbers as the longest model takes, and the values of a hundred tools.
MAX_VALUES = 300_000

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_CHOICES = 16
MAX_ANSWERS = 128  # of all prompts of one request
MAX_TOP_LOGPROBS = 20
MAX_SALT_LENGTH = 256


class RequestError(NeuronMiniMaxError):
    """A request that is answered with an HTTP error in OpenAI's form; what it quotes of the request
    is cut off where it is long. `counted`: the metrics of the engine's thread have it already.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        counted: bool = False,
    ) -> None:
        super().__init__(shortened(message))
        self.status = status
        self.kind = kind
        self.param = None if param is None else shortened(param)
        self.code = code
        self.retry_after = retry_after
        self.counted = counted

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


class TextPart(Fields):
    """A piece of a message; its text stands under the name of its kind, as it does for others."""

    hints: ClassVar[frozenset[str]] = MARKS

    type: Literal["text", "input_text", "output_text", "refusal", "thinking"]
    text: StrictStr = ""
    refusal: StrictStr = ""
    thinking: StrictStr = ""
    name: str | None = None  # of the tool that says it, in the vendor's own form

    @model_validator(mode="after")
    def _has_its_text(self) -> Self:
        own = self.type if self.type in ("refusal", "thinking") else "text"
        if own not in self.model_fields_set:
            raise PydanticCustomError("missing", "{field} is missing", {"field": own})
        return self


class Function(Fields):
    hints: ClassVar[frozenset[str]] = MARKS

    name: str = Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    hints: ClassVar[frozenset[str]] = MARKS

    type: Literal["function"]
    function: Function


class CalledFunction(Fields):
    name: str
    arguments: str


class Call(Fields):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ReasoningPart(Fields):
    """A piece of reasoning as proxies keep it: OpenRouter's details, Anthropic's blocks."""

    hints: ClassVar[frozenset[str]] = MARKS | {"type", "id", "format", "index", "data"}

    text: str = ""
    summary: str = ""
    thinking: str = ""

    def said(self) -> str:
        return self.text or self.thinking or self.summary


class ChatMessage(Fields):
    """A message; what the assistant has thought has the first of four names that is given."""

    hints: ClassVar[frozenset[str]] = MARKS | {"annotations", "id", "status", "type", "parsed"}
    inert: ClassVar[Mapping[str, tuple[Any, ...]]] = {"audio": ({},), "function_call": ({},)}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Items[TextPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    reasoning_details: Items[ReasoningPart] | None = None
    thinking_blocks: Items[ReasoningPart] | None = None
    tool_calls: Items[Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: str | None = None

    def texts(self) -> list[str]:
        """Return the texts that the content has."""
        if isinstance(self.content, list):
            parts = [part for part in self.content if part.type != "thinking"]
            return [part.refusal or part.text for part in parts]
        text = self.content or self.refusal
        return [] if text is None else [text]

    def text(self) -> str:
        return "".join(self.texts())

    def thoughts(self) -> str | None:
        """Return the reasoning, None without any."""
        parts = self.content if isinstance(self.content, list) else []
        kept = self.reasoning_details or self.thinking_blocks or []
        joined = "".join(part.said() for part in kept)
        written = "".join(part.thinking for part in parts if part.type == "thinking")
        given = (self.reasoning_content, self.reasoning, joined, written)
        return next((each for each in given if each), None)


class ToolChoiceName(Fields):
    name: str


class NamedToolChoice(Fields):
    type: Literal["function"]
    function: ToolChoiceName


class JsonSchema(Fields):
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Fields):
    hints: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})
    inert: ClassVar[Mapping[str, tuple[Any, ...]]] = {"continuous_usage_stats": (False,)}

    include_usage: bool = False


class _Sampled(Fields):
    """The fields that chat and plain completions share; None: the checkpoint's own default."""

    hints: ClassVar[frozenset[str]] = HINTS
    inert: ClassVar[Mapping[str, tuple[Any, ...]]] = INERT

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
    stop: str | Items[str] | None = None
    # These four as in vLLM.
    stop_token_ids: Items[StrictInt] | None = Field(None, max_length=MAX_STOPS)
    min_tokens: StrictInt = Field(0, ge=0)
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool = True
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=MAX_SALT_LENGTH)  # as in vLLM

    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
            raise RequestError(
                f"stop takes up to {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters",
                param="stop",
            )
        return stops

    def sampling(self, defaults: "SamplingParams", choice: int = 0) -> "SamplingParams":
        """Return the parameters of choice number `choice`; each has a seed of its own.

        Raises RequestError that names the field.
        """
        given = {name: getattr(self, name) for name in vars(defaults)}
        given = {name: value for name, value in given.items() if value is not None}
        if "top_k" in given:
            given["top_k"] = max(0, given["top_k"])  # vLLM's -1: all tokens
        if self.seed is not None:
            given["seed"] = self.seed + choice
        try:
            return replace(defaults, **given)
        except GenerationError as error:
            raise RequestError(str(error), param=str(error).split()[0]) from None


class ChatRequest(_Sampled):
    messages: Items[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: Items[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: TemplateArguments | None = None  # as in vLLM
    # Whether the model shall reason, in the words of several vendors; the rest of them are hints.
    reasoning_effort: Any = None
    reasoning: Any = None
    thinking: Any = None
    include_reasoning: StrictBool = True
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    def limit(self) -> int | None:
        return (
            self.max_completion_tokens
            if self.max_completion_tokens is not None
            else self.max_tokens
        )

    def wants_thinking(self) -> bool | None:
        """Say whether the model is asked to reason, or not to; None where that is left to it."""
        kind = _part(self.thinking, "type")
        if kind in ("enabled", "disabled"):
            return bool(kind == "enabled")
        enabled = _part(self.reasoning, "enabled")
        if isinstance(enabled, bool):
            return enabled
        effort = self.reasoning_effort or _part(self.reasoning, "effort")
        return None if effort is None else effort != "none"

    def shows_reasoning(self) -> bool:
        return self.include_reasoning and _part(self.reasoning, "exclude") is not True

    def top(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Sampled):
    prompt: str | Items[StrictInt] | Items[str] | Items[Items[StrictInt]]
    max_tokens: int | None = Field(None, ge=0)
    echo: StrictBool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _name_the_forms(cls, value: Any, read: Callable[[Any], Any]) -> Any:
        """Say once what a prompt may be, instead of what is wrong with the first of four forms."""
        try:
            return read(value)
        except ValidationError:
            raise PydanticCustomError(
                "prompt",
                "expected a text, a list of texts, a list of token numbers, or a list of such "
                "lists",
            ) from None

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts. Raises RequestError when there are none, or too many answers."""
        prompt = self.prompt
        several = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
        prompts: Any = prompt if several else [prompt]
        if not prompts:
            raise RequestError("prompt: the list is empty; expected a prompt", param="prompt")
        if len(prompts) * self.n > MAX_ANSWERS:
            raise RequestError(
                f"prompt: {counted(len(prompts), 'prompt')} with n {self.n}: "
                f"{len(prompts) * self.n} answers; at most {MAX_ANSWERS} are given at once",
                param="prompt",
            )
        return prompts

    def check(self) -> None:
        """Raise RequestError for a limit of 0 where that leaves nothing to answer."""
        if self.max_tokens == 0 and not self.echo:
            raise RequestError(
                "max_tokens is 0, which leaves an empty answer; expected at least 1, or echo to "
                "have the prompt back",
                param="max_tokens",
            )

    def limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else 16  # OpenAI's default here

    def top(self) -> int | None:
        return self.logprobs


class TokenizeRequest(Fields):
    inert: ClassVar[Mapping[str, tuple[Any, ...]]] = PROMPT_INERT

    model: str | None = None
    add_special_tokens: Literal[False] | None = None  # as everywhere here: none are added
    prompt: str | None = None
    messages: Items[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tools: Items[Tool] | None = Field(None, max_length=MAX_TOOLS)
    chat_template_kwargs: TemplateArguments | None = None


class DetokenizeRequest(Fields):
    model: str | None = None
    tokens: Items[int]


def _part(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def parse_request(model: type[Model], body: bytes, extras: Extras | None = None) -> Model:
    """Read a JSON body as `model`; `extras` says how other fields than its own are taken.

    Raises RequestError that names the first field at fault.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise RequestError(f"the body has more than {MAX_VALUES} values")
    try:
        return model.model_validate_json(body, context=extras)
    except ValidationError as error:
        raise named(error) from None


def named(error: ValidationError, place: str = "") -> RequestError:
    """Return the first problem of a validation; an unknown field is named as unsupported. `place`
    is where in the body the value is that was validated.
    """
    problems = error.errors(include_url=False, include_input=False)
    unknown = next((problem for problem in problems if problem["type"] == UNKNOWN), None)
    problem = unknown or problems[0]
    if problem["type"] == "json_invalid":
        return RequestError(f"the body cannot be read as JSON: {problem['msg']}")
    path = [*([place] if place else []), *(str(part) for part in problem["loc"])]
    if unknown:
        name = ".".join([*path, unknown["ctx"]["field"]])
        return RequestError(f"{name} is not supported", param=name, code="unsupported_parameter")
    if not path:
        return RequestError(f"the body: {problem['msg']}")
    name = ".".join(path)
    return RequestError(f"{name}: {problem['msg']}", param=name)
