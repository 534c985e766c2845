"""MiniMax-M2 from its Hugging Face FP8 checkpoint to served tokens on AWS Neuron."""

__version__ = "0.1.0"
