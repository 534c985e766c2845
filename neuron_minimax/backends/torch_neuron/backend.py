"""The TorchNeuron backend: a compile and a model whose parts are in a process per rank."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from neuron_minimax.backends.base import LOGIT_ROWS, Backend, Capabilities
from neuron_minimax.backends.manifest import Manifest
from neuron_minimax.backends.torch_neuron.group import RankGroup, RankTask
from neuron_minimax.backends.torch_neuron.options import TorchNeuronOptions
from neuron_minimax.backends.torch_neuron.weights import shard_of
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.plan import Converted
from neuron_minimax.errors import BackendError

EAGER_AS_ASKED = "eager engine, as asked: nothing was compiled"


class TorchNeuronBackend(Backend):
    """Slots of a model that a group of ranks holds; they are ended with this object."""

    def __init__(self, model: Converted, group: RankGroup, options: TorchNeuronOptions) -> None:
        self.model_directory = model.directory
        self.config = model.config
        self.group = group
        self.capabilities = Capabilities(
            slots=options.slots,
            seq_len=options.seq_len,
            buckets=options.buckets,
            vocab_size=model.config.vocab_size,
            chunked_encoding=True,
            all_position_logits=True,
            slot_copies=True,
        )

    @property
    def failure(self) -> BackendError | None:
        return self.group.failure

    def reset(self, slot: int) -> None:
        """Nothing to do: a position is written before it is read, whatever a slot held before."""
        self._check_slot(slot)

    def _encode(self, slot: int, ids: list[int], start: int, all_positions: bool) -> torch.Tensor:
        if all_positions:
            return torch.cat(list(self._encode_rows(slot, ids, start)))
        self.group.call("encode", slot, ids, start)
        return self.group.logits[0].clone()

    def _encode_rows(self, slot: int, ids: list[int], start: int) -> Iterator[torch.Tensor]:
        self.group.call("encode", slot, ids, start)
        for first in range(0, len(ids), LOGIT_ROWS):
            stop = min(first + LOGIT_ROWS, len(ids))
            self.group.call("logits", first, stop)
            yield self.group.logits[: stop - first].clone()

    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        self.group.call("step", tokens.tolist(), positions.tolist(), active.tolist())
        return self.group.logits[: self.capabilities.slots].clone()

    def _copy(self, source: int, target: int, start: int, end: int) -> None:
        self.group.call("copy", source, target, start, end)


def build(
    model: Path, graphs: Path, options: Mapping[str, Any], progress: Callable[[str], None]
) -> tuple[dict[str, float], list[str]]:
    """Compile every graph on every rank, and keep in `graphs` what the compiler keeps.

    Returns file name to seconds, and notes. Raises ConfigError when the group cannot hold the
    model, BackendError when a rank fails.
    """
    parsed = TorchNeuronOptions.parse(options)
    config = ModelConfig.from_dir(model)
    shard_of(config, 0, parsed.tp_degree, parsed.moe_ep_degree)
    if parsed.engine == "eager":
        return {}, [EAGER_AS_ASKED]
    progress("starting the ranks")
    group = _group(model, config, graphs, parsed, None)
    try:
        made = group.start(progress)
    finally:
        group.close()
    return {each["made"]: each["seconds"] for each in made}, []


def load(model: Converted, graphs: Path, manifest: Manifest) -> Backend:
    """The backend over the weights in `model`. Raises BackendError when a rank fails."""
    options = TorchNeuronOptions.parse(manifest.options, "compile again")
    group = _group(model.directory, model.config, graphs, options, manifest)
    try:
        group.start()
    except BaseException:
        group.close()
        raise
    return TorchNeuronBackend(model, group, options)


def _group(
    model: Path,
    config: ModelConfig,
    graphs: Path,
    options: TorchNeuronOptions,
    manifest: Manifest | None,
) -> RankGroup:
    rows = max(options.slots, LOGIT_ROWS)
    task = partial(
        _task,
        model=model.resolve(),
        graphs=graphs.resolve(),
        options=options,
        manifest=manifest,
        logits=(rows, config.vocab_size),
    )
    # A compiler's caches may be large: those of a compile are made where they are kept.
    return RankGroup(options, config.vocab_size, rows, task, None if manifest else graphs)


def _task(rank: int, scratch: Path, **others: Any) -> RankTask:
    return RankTask(rank=rank, scratch=scratch, **others)
