"""Compiled models: what they promise, how one is made, and how it is found again from its
directory.
"""

from neuron_minimax.backends.directory import CompileReport, compile_model, load

__all__ = ["CompileReport", "compile_model", "load"]
