"""The embedded demo model, made ready to be served: converted and compiled once, recognized afterwards."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path

from neuron_minimax.backends import compile_model
from neuron_minimax.convert.run import convert

SLOTS = 8


def demo_model(parent: Path = Path("traced_model"), progress: Callable[[str], None] = lambda line: None) -> Path:
    """The compiled demo for SLOTS requests at a time, in `parent`/demo-serving; made now unless it is there already.

    Raises ConversionError or BackendError.
    """
    traced, converted = parent / "demo-serving", parent / "demo-serving-converted"
    with resources.as_file(resources.files("neuron_minimax") / "demo") as checkpoint:
        convert(checkpoint, converted)
    compile_model(converted, traced, options={"slots": SLOTS}, progress=progress)
    return traced
