"""Conversion of a Hugging Face checkpoint to the names, layout and FP8 range that Neuron loads."""
