"""The fields of requests that are not done here: which of them change nothing, and which are
refused.

Nothing here imports torch: bodies are read in limited processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from neuron_minimax.errors import shortened

UNKNOWN = "unknown_field"  # the type of pydantic's error

# What clients say that has no effect on an answer here. Of a part, a message or a tool:
MARKS = frozenset(
    {"cache_control", "signature", "citations", "extra_content", "provider_specific_fields"}
)
# Of a request:
HINTS = frozenset(
    {
        *("reasoning_effort", "reasoning", "thinking", "verbosity", "store", "metadata", "user"),
        *("service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
        *("prediction", "request_id", "priority", "kv_transfer_params"),
        "truncation_side",  # of what is not truncated
    }
)
# What would change a prompt's tokens, or the answer that tells them, and is not done here; with the
# values that ask for nothing.
PROMPT_INERT: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "return_token_strs": (False,),
}
# What would change an answer.
INERT: Mapping[str, tuple[Any, ...]] = {
    **PROMPT_INERT,
    "logit_bias": ({},),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "modalities": (["text"], []),
    "audio": ({},),
    "web_search_options": (),
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (-1,),
    "include_stop_str_in_output": (False,),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "prompt_embeds": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (),
    "vllm_xargs": ({},),
    "add_special_tokens": (True, False),  # the tokenizers here have none to add
    "response_format": ({"type": "text"},),  # of a plain completion
    "echo": (False,),  # of a chat
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
}


@dataclass
class Extras:
    """How fields are taken that an object does not have: `strict` refuses those that nobody knows.
    `ignored` are the names of those that were passed over.
    """

    strict: bool = False
    ignored: list[str] = field(default_factory=list)


class Fields(BaseModel):
    """An object whose fields may be null where they may be left out.

    Other fields than its own are passed over, but for those that are known to change the answer:
    `inert` has them, with the values that ask for nothing. `hints` are known to change nothing, and
    count first.
    """

    model_config = ConfigDict(extra="allow")
    hints: ClassVar[frozenset[str]] = frozenset()
    inert: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _default_for_null(cls, value: Any, info: ValidationInfo) -> Any:
        known = cls.model_fields[str(info.field_name)]
        if value is None and not known.is_required():
            return known.get_default(call_default_factory=True)
        return value

    @model_validator(mode="after")
    def _pass_over_others(self, info: ValidationInfo) -> Self:
        extras = info.context if isinstance(info.context, Extras) else Extras()
        for name, value in (self.model_extra or {}).items():
            hint = name in self.hints
            changes_something = not hint and value not in self.inert.get(name, (value,))
            unknown = not hint and name not in self.inert
            if value is not None and (changes_something or (unknown and extras.strict)):
                # The first one is told: pydantic's `extra="forbid"` makes a kilobyte of each.
                raise PydanticCustomError(UNKNOWN, "it is not supported", {"field": name})
            extras.ignored.append(shortened(name))
        (self.model_extra or {}).clear()
        return self
