"""The embedded demo model, made ready to be served: converted and compiled once, recognized
afterwards.
"""

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from neuron_minimax.backends import compile_model
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.plan import plan_conversion

OPTIONS: Mapping[str, Any] = {"slots": 8}


def demo_model(
    parent: Path = Path("traced_model"),
    options: Mapping[str, Any] = OPTIONS,
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """The compiled demo in `parent`/demo-serving, for eight requests at a time unless the CPU
    `options` say otherwise; made now, or recognized when it is there already.

    Raises ConversionError or BackendError.
    """
    traced = parent / "demo-serving"
    converted = parent / "demo-serving-converted"
    with resources.as_file(resources.files("neuron_minimax") / "demo") as checkpoint:
        plan = plan_conversion(Checkpoint.open(checkpoint))
        plan.write(converted, overwrite=True)  # of another version's demo
    compile_model(converted, traced, options=options, progress=progress)
    return traced
