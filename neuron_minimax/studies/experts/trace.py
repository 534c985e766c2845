"""A routing trace: what every layer's router decided for every token of one prompt and its answer.

Shapes: L layers, N tokens, K chosen per token, E experts. 512 tokens of the real shape (62, 8, 256)
take 18 MB.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from neuron_minimax.backends.base import Backend, Capabilities
from neuron_minimax.checkpoint.writer import replacing
from neuron_minimax.errors import GenerationError, counted, printable
from neuron_minimax.files import JSON_BYTES, is_plain_name, open_regular, parse_json
from neuron_minimax.generation.engine import Engine, Request
from neuron_minimax.generation.sampling import GREEDY, SamplingParams
from neuron_minimax.model.cache import KVCache
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.model.moe import Routing

FORMAT = "neuron-minimax routing trace 1"
# Axes and dtype of each array.
ARRAYS = {
    "tokens": ("N", np.dtype(np.int32)),
    "is_decode": ("N", np.dtype(np.bool_)),
    "expert_index": ("L,N,K", np.dtype(np.int16)),
    "affinity": ("L,N,K", np.dtype(np.float32)),
    "scores": ("L,N,E", np.dtype(np.float16)),
    "bias": ("L,E", np.dtype(np.float32)),
}
STORED_DTYPES = ("BOOL", "I16", "I32", "F16", "F32")  # of these arrays, as the file names them
ADVICE = "make one with `neuron-minimax experts TRACED --prompt TEXT`"


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Routing of N tokens in order, of the prompt and of all generated tokens but the last.

    Nothing was computed on that one, so that it is in `answer` alone.

    tokens [N] int32; is_decode [N] bool (prompt tokens are prefill); expert_index [L,N,K] int16
    (uint8 would hold 256, but -1 marks padding elsewhere); affinity [L,N,K] float32; scores [L,N,E]
    float16, without bias; bias [L,E] float32, zeros where routers have none. `texts` [N] is how
    each token is spelled; `prompt` is the user's text, "" in older files; `finish_reason` says why
    the answer ended.
    """

    tokens: np.ndarray
    is_decode: np.ndarray
    expert_index: np.ndarray
    affinity: np.ndarray
    scores: np.ndarray
    bias: np.ndarray
    texts: tuple[str, ...] = ()
    prompt: str = ""
    answer: str = ""
    finish_reason: str = ""
    name: str = "trace"

    @property
    def layers(self) -> int:
        return self.expert_index.shape[0]

    @property
    def experts(self) -> int:
        return self.bias.shape[1]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; the texts are in its metadata."""
        words = {
            "texts": list(self.texts),
            "prompt": self.prompt,
            "answer": self.answer,
            "finish_reason": self.finish_reason,
        }
        metadata = {"format": FORMAT, "name": self.name, "words": json.dumps(words)}
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}
        data = serialize(arrays, metadata=metadata)
        # The library writes the metadata in any order: the same trace is to be the same bytes.
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()
        header += b" " * (-len(header) % 8)
        with replacing(Path(path)) as file:
            file.write(len(header).to_bytes(8, "little") + header + data[end:])

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read a saved trace. Raises GenerationError when the file is something else, or its arrays
        do not fit each other.
        """
        try:
            metadata, arrays = _read(Path(path))
            name = metadata["name"]
            if not is_plain_name(name) or printable(name, kept="") != name:
                raise ValueError(f"its name is {name!r}, which names no folder")
            _require_consistent(arrays)
            words = parse_json(
                metadata["words"].encode(), _Words, f"{path} (words)", GenerationError, ADVICE
            )
            if len(words.texts) not in (0, len(arrays["tokens"])):
                texts = counted(len(words.texts), "text")
                raise ValueError(f"it has {texts} of {counted(len(arrays['tokens']), 'token')}")
        except (OSError, MemoryError, SafetensorError, ValueError, KeyError) as error:
            problem = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise GenerationError(f"{path} is no routing trace ({problem}); {ADVICE}") from None
        return cls(
            **arrays,
            texts=words.texts,
            prompt=words.prompt,
            answer=words.answer,
            finish_reason=words.finish_reason,
            name=name,
        )


@dataclass(frozen=True, kw_only=True)
class _Words:
    """The texts of a saved trace."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    texts: tuple[str, ...]
    answer: str
    finish_reason: str
    prompt: str = ""


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Return metadata and arrays of a file that begins as a safetensors file does: no other is
    mapped.
    """
    with open(open_regular(path), "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        if not 2 <= header <= min(os.fstat(file.fileno()).st_size - 8, JSON_BYTES):
            raise ValueError("it is no safetensors file")
    with safe_open(str(path), framework="numpy") as opened:
        metadata = opened.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"expected the format {FORMAT!r}, found {metadata.get('format')!r}")
        names = opened.keys()
        for name in names:  # NumPy lacks some dtypes of these files
            stored = opened.get_slice(name).get_dtype()
            if stored not in STORED_DTYPES:
                raise ValueError(f"{name} is {stored}; expected one of {', '.join(STORED_DTYPES)}")
        return metadata, {name: opened.get_tensor(name) for name in names}


def _require_consistent(arrays: dict[str, np.ndarray]) -> None:
    """Raise ValueError, or KeyError for an array that is missing."""
    layers, tokens, top_k = _sizes(arrays["expert_index"], "L,N,K")
    experts = _sizes(arrays["bias"], "L,E")[1]
    sizes = {"L": layers, "N": tokens, "K": top_k, "E": experts}
    if arrays.keys() != ARRAYS.keys():
        raise ValueError(f"it has {', '.join(sorted(arrays))}")
    for name, (axes, dtype) in ARRAYS.items():
        shape = tuple(sizes[axis] for axis in axes.split(","))
        found = arrays[name]
        if found.shape != shape or found.dtype != dtype:
            raise ValueError(f"{name} is {found.dtype} {found.shape}, not {dtype} {shape}")
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise ValueError(f"{name} is not finite")
    if not all(sizes.values()) or top_k > experts:
        raise ValueError(
            f"it has {counted(tokens, 'token')}, {counted(layers, 'layer')}, {top_k} of {experts} "
            "experts"
        )
    index = arrays["expert_index"]
    if index.min() < 0 or index.max() >= experts:
        raise ValueError(
            f"expert_index goes from {index.min()} to {index.max()}, of {experts} experts"
        )
    if arrays["tokens"].min() < 0:
        raise ValueError(f"a token is {arrays['tokens'].min()}")


def _sizes(array: np.ndarray, axes: str) -> tuple[int, ...]:
    if array.ndim != len(axes.split(",")):
        raise ValueError(f"an array has shape {array.shape}, not [{axes}]")
    return array.shape


@dataclass
class Recorder:
    """Collects routing pass by pass; `trace` may be taken at any time, also after an interruption.

    `on_pass` is called with the number of tokens of each pass.
    """

    bias: np.ndarray
    on_pass: Callable[[int], None] = lambda tokens: None
    passes: list[tuple[list[int], bool, list[Routing]]] = field(default_factory=list)

    @classmethod
    def of(cls, model: Decoder, on_pass: Callable[[int], None] = lambda tokens: None) -> "Recorder":
        biases = [router.bias for router in model.routers]
        return cls(torch.stack(biases).float().numpy(), on_pass)

    @property
    def tokens(self) -> list[int]:
        return [token for tokens, _, _ in self.passes for token in tokens]

    def add(self, tokens: list[int], is_decode: bool, routings: Sequence[Routing]) -> None:
        """Append a pass at once, so that an interruption leaves all of it or none."""
        kept = [
            Routing(r.scores_TE.half(), r.expert_index_TK.short(), r.affinity_TK.float())
            for r in routings
        ]
        self.passes.append((tokens, is_decode, kept))
        self.on_pass(len(tokens))

    def trace(self, **words: Any) -> Trace:
        """Return all that is recorded; `words` are a trace's fields that are no arrays."""

        def joined(part: int) -> np.ndarray:
            layers = range(len(self.bias))
            return torch.stack(
                [torch.cat([kept[layer][part] for _, _, kept in self.passes]) for layer in layers]
            ).numpy()

        return Trace(
            tokens=np.array(self.tokens, dtype=np.int32),
            is_decode=np.array(
                [decode for tokens, decode, _ in self.passes for _ in tokens], dtype=bool
            ),
            scores=joined(0),
            expert_index=joined(1),
            affinity=joined(2),
            bias=self.bias,
            **words,
        )


class RecordingBackend(Backend):
    """One slot of a model in memory; every pass goes into `recorder`."""

    def __init__(self, model: Decoder, recorder: Recorder, seq_len: int, chunk: int) -> None:
        self.config = model.config
        self.capabilities = Capabilities(
            slots=1,
            seq_len=seq_len,
            buckets=(min(chunk, seq_len),),
            vocab_size=model.config.vocab_size,
            chunked_encoding=True,
            all_position_logits=False,
        )
        self._model = model
        self._recorder = recorder
        self._cache = KVCache.allocate(model.config, 1, seq_len, model.compute)

    def reset(self, slot: int) -> None:
        """Do nothing: a recording is of one sequence."""

    def _encode(self, slot: int, ids: list[int], start: int, all_positions: bool) -> torch.Tensor:
        return self._run(ids, False)

    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        return self._run(tokens.tolist(), True)[None]

    @torch.inference_mode()
    def _run(self, tokens: list[int], is_decode: bool) -> torch.Tensor:
        """Run the next tokens of the sequence and record it; return the logits [V] of the last."""
        logits_BTV, _, routings = self._model(
            torch.tensor([tokens]), self._cache, return_routing=True
        )
        self._recorder.add(tokens, is_decode, routings)
        return logits_BTV[0, -1].float()


def check_fits(model: Decoder, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
    """Raise GenerationError when a prompt is empty, or does not fit the model's positions with its
    answer.
    """
    limit = model.config.max_position_embeddings
    if not prompt_ids:
        raise GenerationError("the prompt has no tokens; expected at least one")
    if len(prompt_ids) + max_new_tokens > limit:
        raise GenerationError(
            f"{counted(len(prompt_ids), 'prompt token')} and {max_new_tokens} new exceed the "
            f"model's {limit} positions; shorten the prompt or lower the number of new tokens"
        )


def record(
    model: Decoder,
    prompt_ids: Sequence[int],
    recorder: Recorder,
    *,
    params: SamplingParams = GREEDY,
    stop_token_ids: Collection[int] = (),
    max_new_tokens: int = 0,
    chunk: int = 512,
) -> Iterator[tuple[int, str | None]]:
    """Run the prompt (in chunks) and an answer, recording each pass.

    Yields each new token and why the answer ended. Raises GenerationError when the prompt is empty,
    or does not fit the model's positions with its answer.
    """
    check_fits(model, prompt_ids, max_new_tokens)
    backend = RecordingBackend(model, recorder, len(prompt_ids) + max_new_tokens, chunk)
    if max_new_tokens == 0:
        backend.encode(0, prompt_ids)
        return
    request = Request(
        prompt_ids=prompt_ids,
        params=params,
        max_new_tokens=max_new_tokens,
        stop_token_ids=frozenset(stop_token_ids),
    )
    for step in Engine(backend).run(request):
        yield step.token, step.finish_reason
