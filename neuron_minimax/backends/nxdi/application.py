"""Making, compiling and loading the NxDI application of a converted directory."""

import json
from pathlib import Path
from typing import Any

import torch

from neuron_minimax.backends.nxdi import coverage, imports
from neuron_minimax.backends.nxdi.backend import PARAMETERS_NAME
from neuron_minimax.backends.nxdi.config import MiniMaxM2InferenceConfig, read_config
from neuron_minimax.backends.nxdi.model import NeuronMiniMaxM2ForCausalLM
from neuron_minimax.backends.nxdi.options import (
    NeuronOptions,
    neuron_config_fields,
    quantization_options,
)
from neuron_minimax.checkpoint.reader import TensorDirectory


def make_application(
    model: Path, options: NeuronOptions, **overrides: Any
) -> NeuronMiniMaxM2ForCausalLM:
    """The application over a converted directory, in BF16; `overrides` are NeuronConfig's
    fields.
    """
    fields = (
        neuron_config_fields(options)
        | quantization_options(model)
        | {"torch_dtype": torch.bfloat16}
        | overrides
    )
    config = MiniMaxM2InferenceConfig(
        imports.MoENeuronConfig(**fields),
        load_config=read_config(model),
        expert_kernel=options.expert_kernel,
        expert_placement=options.expert_placement,
    )
    return NeuronMiniMaxM2ForCausalLM(str(model), config)


def compile_application(application: NeuronMiniMaxM2ForCausalLM, graphs: Path) -> None:
    """NxDI's compile and its per-rank weight files into `graphs`, which are then checked for
    coverage.
    """
    application.compile(str(graphs))
    record_parameters(application, graphs)


def record_parameters(application: NeuronMiniMaxM2ForCausalLM, graphs: Path) -> None:
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


def load_application(
    model: Path, graphs: Path, options: NeuronOptions
) -> NeuronMiniMaxM2ForCausalLM:
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
    """Where NxDI saves a rank's weights."""
    return graphs / "weights" / f"tp{rank}_sharded_checkpoint.safetensors"
