"""Stand-ins for the closed packages behind NxDI, enough to import it and run its CPU mode; loud for
anything else.

`install()` adds a finder at the end of `sys.meta_path`, so a real package always wins. An attribute
of a stand-in module is a `Standin`: it can be named, subclassed, passed on and used as a decorator,
and raises when called. What CPU mode really calls is written out in `operations.py`, what a traced
graph calls in `kernels.py`.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import torch

PACKAGES = (
    "torch_xla",
    "torch_neuronx",
    "neuronxcc",
    "libneuronxla",
    "nki",
    "nkilib",
    "neuron_dtypes",
)
# Applied to a kernel when a module is imported; the kernel itself stays uncallable.
KERNEL_DECORATORS = (
    "jit",
    "nki_jit",
    "trace",
    "no_trace",
    "skip_middle_end_transformations",
    "enable_stack_allocator",
)
CALL_DECORATORS = ("xla_hlo_call", "xla_call", "hlo_call", "hlo_debug")
DECORATORS = KERNEL_DECORATORS + CALL_DECORATORS


class Standin:
    """A name of a closed package that nobody may call on a CPU."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f"<stand-in for {self._name}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Standin(f"{self._name}.{name}")

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._name.rsplit(".", 1)[-1] in DECORATORS:
            return _decorate(arguments, self._name)
        raise NotImplementedError(
            f"{self._name} was called; it is part of a closed Neuron package that has only a "
            "stand-in here"
        )

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (_Base,) if _Base not in bases else ()

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__

    def __getitem__(self, key: Any) -> "Standin":
        return self


class _Base:
    """What a class gets in place of a closed base class."""


class Kernel(Standin):
    """A kernel in place of a compiled one. On a traced tensor its call is one operation of the
    graph, with the outputs that `kernels.py` knows; otherwise it raises as any stand-in does.
    """

    def __init__(self, name: str, function: Any = None, grid: Any = None) -> None:
        super().__init__(name)
        self._function = function
        self._grid = grid

    def __getitem__(self, key: Any) -> "Kernel":
        return Kernel(self._name, self._function, key)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from tests.neuron.standins import kernels

        if not kernels.traced(arguments, options):
            return super().__call__(*arguments, **options)
        return kernels.call(self._name, self._function, self._grid, arguments, options)


def _decorate(arguments: tuple[Any, ...], name: str) -> Any:
    """A decorator, with or without options, makes a kernel, which keeps its name and, where there
    is one, its code.
    """
    if len(arguments) != 1 or not (callable(arguments[0]) or isinstance(arguments[0], Standin)):
        return lambda kernel: _decorate((kernel,), name)
    (kernel,) = arguments
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, Standin):
        return Kernel(kernel._name.rsplit(".", 1)[-1])
    return Kernel(kernel.__name__, kernel)


class _Module(ModuleType):
    """A stand-in module: every attribute exists, as a `Standin`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = Standin(f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module below the closed packages."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in PACKAGES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []  # type: ignore[attr-defined]
        module.__version__ = "2.9.0+standin"  # type: ignore[attr-defined]
        from tests.neuron.standins import operations

        for name, value in operations.PROVIDED.get(module.__name__, {}).items():
            setattr(module, name, value)


def stand_in_for(name: str) -> None:
    """Put a stand-in in the place of one module of a package that is there otherwise, before
    anything imports it.
    """
    finder = _Finder()
    spec = importlib.machinery.ModuleSpec(name, finder, is_package=True)
    module = importlib.util.module_from_spec(spec)
    finder.exec_module(module)
    sys.modules[name] = module


def is_real(package: str) -> bool:
    """Whether the package is installed, stand-ins not counted."""
    found = importlib.util.find_spec(package)
    return found is not None and not isinstance(found.loader, _Finder)


def install() -> None:
    """Make the closed packages importable; once per process."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if is_real("torch_xla") and not is_real("libneuronxla"):
        # It asks libneuronxla for a device when it is imported; it must not meet the stand-in.
        os.environ.setdefault("PJRT_DEVICE", "CPU")
        importlib.import_module("torch_xla")
    sys.meta_path.append(_Finder())
    if not is_real("torch_neuronx"):
        # TorchScript classes that torch_neuronx's shared library registers; NxD names them in
        # annotations.
        torch.classes.neuron = Standin("torch.classes.neuron")
