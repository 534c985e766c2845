"""Compiled models: what they promise, how one is made, and how it is found again from its
directory.
"""

from neuron_minimax.backends.compilation import compile_model
from neuron_minimax.backends.directory import load, verify_compiled
from neuron_minimax.backends.report import CompileMode, CompileReport

__all__ = ["CompileMode", "CompileReport", "compile_model", "load", "verify_compiled"]
