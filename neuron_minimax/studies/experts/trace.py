"""A routing trace: what every layer's router decided for every token of one prompt and its answer.

Shapes: L layers, N tokens, K chosen per token, E experts. 512 tokens of the real shape (62, 8, 256)
take 18 MB.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from neuron_minimax.backends.base import Backend, Capabilities
from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.engine import Engine, Request
from neuron_minimax.generation.sampling import GREEDY, SamplingParams
from neuron_minimax.model.cache import KVCache
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.model.moe import Routing

FORMAT = "neuron-minimax routing trace 1"
ARRAYS = ("tokens", "is_decode", "expert_index", "affinity", "scores", "bias")


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Routing of N tokens in order, of the prompt and of all generated tokens but the last.

    Nothing was computed on that one, so that it is in `answer` alone.

    tokens [N] int32; is_decode [N] bool (prompt tokens are prefill); expert_index [L,N,K] int16
    (uint8 would hold 256, but -1 marks padding elsewhere); affinity [L,N,K] float32; scores [L,N,E]
    float16, without bias; bias [L,E] float32, zeros where routers have none. `texts` [N] is how
    each token is spelled; `finish_reason` says why the answer ended.
    """

    tokens: np.ndarray
    is_decode: np.ndarray
    expert_index: np.ndarray
    affinity: np.ndarray
    scores: np.ndarray
    bias: np.ndarray
    texts: tuple[str, ...] = ()
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
        """Write one safetensors file; the texts are in its metadata."""
        words = {
            "texts": list(self.texts),
            "answer": self.answer,
            "finish_reason": self.finish_reason,
        }
        metadata = {"format": FORMAT, "name": self.name, "words": json.dumps(words)}
        save_file(
            {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS},
            str(path),
            metadata=metadata,
        )

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read a saved trace. Raises GenerationError when the file is something else."""
        try:
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if metadata.get("format") != FORMAT or set(arrays) != set(ARRAYS):
                raise ValueError(
                    f"expected the format {FORMAT!r}, found {metadata.get('format')!r}"
                )
            words = json.loads(metadata["words"])
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise GenerationError(
                f"{path} is no routing trace ({error}); make one with `neuron-minimax experts "
                "TRACED --prompt TEXT`"
            ) from None
        return cls(**arrays, **words | {"texts": tuple(words["texts"])}, name=metadata["name"])


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
        """Return all that is recorded; `words` are texts, answer, finish_reason and name."""

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
    limit = model.config.max_position_embeddings
    if not prompt_ids:
        raise GenerationError("the prompt has no tokens; expected at least one")
    if len(prompt_ids) + max_new_tokens > limit:
        raise GenerationError(
            f"{len(prompt_ids)} prompt tokens and {max_new_tokens} new ones exceed the model's "
            f"{limit} positions; shorten the prompt or lower the number of new tokens"
        )
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
