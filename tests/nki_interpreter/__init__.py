"""A NumPy interpreter for the few NKI instructions the kernels use; it enforces the hardware's
limits and counts work.

`load(path)` runs a kernel file against stand-ins for `nki`, `nki.isa` and `nki.language` and
returns its module and the machine. Sources of the limits: the NKI architecture guide for Trainium2
and the API reference of each instruction.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tests.nki_interpreter.instructions import Instructions
from tests.nki_interpreter.language import Language
from tests.nki_interpreter.machine import HardwareError, Machine

# Where kernels import their neighbours from.
PACKAGE = "neuron_minimax.kernels.nki"

__all__ = ["HardwareError", "Machine", "load"]


def load(path: str | Path, generation: int = 3) -> tuple[ModuleType, Machine]:
    """Import the kernel file at `path` under a private name, its NKI imports, and those of its
    neighbours, served by a new machine of this generation.
    """
    machine = Machine(generation=generation)
    stand_ins = _stand_ins(machine)
    neighbours = [f"{PACKAGE}.{each.stem}" for each in Path(path).parent.glob("[!_]*.py")]
    before = {name: sys.modules.pop(name, None) for name in (*stand_ins, *neighbours)}
    sys.modules.update(stand_ins)
    try:
        spec = importlib.util.spec_from_file_location(f"interpreted_{Path(path).stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, previous in before.items():
            if previous is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = previous
    return module, machine


def _stand_ins(machine: Machine) -> dict[str, ModuleType]:
    language = Language(machine)
    modules = {
        "nki": {"jit": language.jit},
        "nki.isa": Instructions(machine).exported(),
        "nki.language": language.exported(),
    }
    built = {}
    for name, contents in modules.items():
        built[name] = ModuleType(name)
        vars(built[name]).update(contents)
    built["nki"].isa, built["nki"].language = built["nki.isa"], built["nki.language"]
    return built
