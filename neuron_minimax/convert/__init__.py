"""Conversion of a Hugging Face checkpoint to the names, layout and FP8 range that Neuron loads."""

from neuron_minimax.convert.plan import Layout
from neuron_minimax.convert.state_dict import (
    convert_hf_to_neuron_state_dict,
    neuron_to_hf_state_dict,
)
from neuron_minimax.convert.write import convert

__all__ = ["Layout", "convert", "convert_hf_to_neuron_state_dict", "neuron_to_hf_state_dict"]
