"""One request against a compiled directory, as the command line and the demo make it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from neuron_minimax.backends import load
from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.generate import Answer, answer
from neuron_minimax.generation.sampling import GREEDY, SamplingOptions
from neuron_minimax.generation.tokenizer import TextTokenizer, read_stop_tokens


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """Either a user's message or prompt tokens; `sampling` holds the options that were given (None:
    the default).
    """

    prompt: str | None = None
    token_ids: Sequence[int] | None = None
    max_new_tokens: int | None = None
    greedy: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    dump_logits: Path | None = None


def run_generate(
    traced: str | Path, request: GenerateRequest, on_text: Callable[[str], None] | None = None
) -> Answer:
    """Load a compiled directory and answer one request; `on_text` gets the text as it appears.

    Prompt tokens need no tokenizer: without one the answer has no text. Raises BackendError or
    GenerationError.
    """
    given = {name: value for name, value in request.sampling.items() if value is not None}
    if request.greedy and {"temperature", "top_p", "top_k"} & set(given):
        raise GenerationError(
            f"--greedy excludes --{min(given).replace('_', '-')}; give one or the other"
        )
    backend = load(traced)
    directory = backend.model_directory
    has_tokenizer = (directory / "tokenizer.json").is_file()
    tokenizer = (
        TextTokenizer.from_dir(directory) if request.prompt is not None or has_tokenizer else None
    )
    if request.prompt is not None and tokenizer is not None:
        prompt_ids = tokenizer.encode(
            tokenizer.render_chat([{"role": "user", "content": request.prompt}])
        )
    else:
        prompt_ids = list(request.token_ids or ())
    defaults = tokenizer.sampling if tokenizer else SamplingOptions()
    return answer(
        backend,
        prompt_ids,
        tokenizer=tokenizer,
        options=replace(GREEDY, seed=given.get("seed"))
        if request.greedy
        else replace(defaults, **given),
        stop_token_ids=(
            tokenizer.stop_token_ids
            if tokenizer
            else read_stop_tokens(directory, backend.capabilities.vocab_size)
        ),
        max_new_tokens=request.max_new_tokens,
        dump_logits=request.dump_logits,
        on_text=on_text,
    )
