"""Make, compile and load the NxDI application of a converted directory, and run it as a backend.

The application is made with continuous batching, one sequence id per slot.
Shapes: S slots, T tokens, V vocabulary, which comes padded to a multiple of the ranks.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from neuron_minimax.backends.base import Backend, Capabilities
from neuron_minimax.backends.nxdi import coverage, imports
from neuron_minimax.backends.nxdi.config import read_config
from neuron_minimax.backends.nxdi.options import (
    PARAMETERS_NAME,
    NeuronOptions,
    neuron_config_fields,
    quantization_options,
)
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.config import ModelConfig
from neuron_minimax.families import Family


def application_class(family: Family) -> type[imports.CausalLM]:
    """The NxDI application class of a family, by its name there."""
    module, _, name = family.neuron_class.partition(":")
    found: type[imports.CausalLM] = getattr(import_module(module), name)
    return found


def make_application(model: Path, options: NeuronOptions, **overrides: Any) -> imports.CausalLM:
    """The application over a converted directory, in BF16; `overrides` are NeuronConfig's
    fields.
    """
    fields = (
        neuron_config_fields(options)
        | quantization_options(model)
        | {"torch_dtype": torch.bfloat16}
        | overrides
    )
    application = application_class(ModelConfig.from_dir(model).family)
    config = application.get_config_cls()(
        imports.MoENeuronConfig(**fields),
        load_config=read_config(model),
        expert_kernel=options.expert_kernel,
        expert_scales=options.expert_scales,
        expert_placement=options.expert_placement,
    )
    return application(str(model), config)


def compile_application(application: imports.CausalLM, graphs: Path) -> None:
    """NxDI's compile and its per-rank weight files into `graphs`, which are then checked for
    coverage.
    """
    application.compile(str(graphs))
    record_parameters(application, graphs)


def record_parameters(application: imports.CausalLM, graphs: Path) -> None:
    """Write what a rank's file has to hold, read off the sharded model, and hold every rank's file
    against it.
    """
    module = next(iter(application.get_builder().model_collection.values())).model_instance.module
    parameters = coverage.parameters_of(module)
    first = rank_file(graphs, 0)
    names = coverage.weight_names(parameters, TensorDirectory(first.parent, [first.name]).entries)
    expected = {
        name: [coverage.STORED_NAMES[parameters[name].dtype], list(parameters[name].shape)]
        for name in sorted(names)
    }
    (graphs / PARAMETERS_NAME).write_text(json.dumps(expected, indent=0), encoding="utf-8")
    check_rank_files(graphs, application.neuron_config.tp_degree)


def load_application(model: Path, graphs: Path, options: NeuronOptions) -> imports.CausalLM:
    """The compiled application, its weights on the device. Raises CheckpointError when a rank's
    file is not whole.
    """
    check_rank_files(graphs, options.tp_degree)
    application = make_application(model, options)
    application.load(str(graphs))
    return application


def check_rank_files(graphs: Path, tp_degree: int) -> None:
    """Raise CheckpointError unless every rank's file holds exactly the parameters recorded at
    compile time.
    """
    expected = json.loads((graphs / PARAMETERS_NAME).read_text(encoding="utf-8"))
    for rank in range(tp_degree):
        path = rank_file(graphs, rank)
        tensors = TensorDirectory(path.parent, [path.name])
        tensors.require_usable()
        found = {entry.name: (entry.dtype, entry.shape) for entry in tensors.entries.values()}
        coverage.check_rank_file(expected, found, str(path))


def rank_file(graphs: Path, rank: int) -> Path:
    """The file in which NxDI saves a rank's weights."""
    return graphs / "weights" / f"tp{rank}_sharded_checkpoint.safetensors"


class NeuronBackend(Backend):
    """Prompts are encoded one at a time; every step runs all slots, as the compiled batch does."""

    def __init__(self, application: imports.CausalLM, model: Path, options: NeuronOptions) -> None:
        self.application = application
        self.model_directory = model
        self.config = application.config.model_config
        self.capabilities = Capabilities(
            slots=options.slots,
            seq_len=options.seq_len,
            buckets=options.buckets,
            vocab_size=self.config.vocab_size,
            chunked_encoding=False,  # NxDI continues a prompt with a block layout of the cache only
            # Its context encoding computes the head for the last position
            all_position_logits=False,
        )
        self._lengths = [0] * options.slots

    def reset(self, slot: int) -> None:
        """A position is written before it is read, whatever a slot held before."""
        self._check_slot(slot)
        self._lengths[slot] = 0

    @torch.inference_mode()
    def _encode(self, slot: int, ids: list[int], start: int, all_positions: bool) -> torch.Tensor:
        # Padded here, because NxDI gives padding position 1 and takes the logits at the highest
        # position: of a prompt of one token that would be a padding's.
        padding = [0] * (self.capabilities.bucket_for(len(ids)) - len(ids))
        logits_1TV = self.application(
            input_ids=torch.tensor([ids + padding]),
            attention_mask=torch.tensor([[1] * len(ids) + padding]),
            position_ids=torch.tensor([[*range(len(ids)), *padding]]),
            seq_ids=torch.tensor([slot]),
        ).logits
        self._lengths[slot] = len(ids)
        return logits_1TV[0, -1, : self.config.vocab_size].float()

    @torch.inference_mode()
    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        # An inactive slot writes where its own next token will be written, and so leaves nothing
        # behind. Position 0 would make NxDI take the batch for a prompt.
        last = self.capabilities.seq_len - 1
        resting = torch.tensor(self._lengths).clamp(1, last)
        positions = torch.where(active, positions, resting)
        logits_S1V = self.application(
            input_ids=torch.where(active, tokens, 0)[:, None],
            attention_mask=(torch.arange(int(positions.max())) < positions[:, None]).long(),
            position_ids=positions[:, None],
            seq_ids=torch.arange(self.capabilities.slots),
        ).logits
        for slot in active.nonzero().flatten().tolist():
            self._lengths[slot] = int(positions[slot]) + 1
        return logits_S1V[:, -1, : self.config.vocab_size].float()
