"""Layering: a module imports only from its left, heavy packages load only where they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import neuron_minimax
from neuron_minimax.backends.cpu import options as cpu
from neuron_minimax.backends.nxdi import backend as neuron

PACKAGE = Path(neuron_minimax.__file__).parent
# Left to right; a module may import from its own group and from those before it.
ORDER = [
    {"errors", "fp8", "families", "demo", "__init__"},
    {"config"},
    {"checkpoint"},
    {"inspection", "kernels"},
    {"convert"},
    {"model", "planner"},
    {"backends"},
    {"generation"},
    {"serving", "training", "device_check"},
    {"studies"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
NEURON_PACKAGES = {
    "torch_neuronx",
    "torch_xla",
    "neuronx_distributed",
    "neuronx_distributed_inference",
    "nki",
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def imports_of(path):
    """(module, at import time?) of every import statement of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            yield name, id(node) in top_level


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_left(path):
    group = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name, _ in imports_of(path):
        parts = name.split(".")
        if parts[0] == "neuron_minimax" and len(parts) > 1 and parts[1] in RANK:
            assert RANK[parts[1]] <= RANK[group], f"{group} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_one_door_leads_to_the_neuron_packages(path):
    doors = {
        "backends/nxdi/imports.py",
        "kernels/nki/expert_mlp.py",
    }  # the second holds NKI code, imported through the first
    if str(path.relative_to(PACKAGE)) not in doors:
        assert not {name.split(".")[0] for name, _ in imports_of(path)} & NEURON_PACKAGES


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            "import neuron_minimax.cli; neuron_minimax.cli.main(['--help'])",
            {"torch", "numpy", "transformers", "rich"},
        ),
        ("import neuron_minimax.inspection.precision", {"torch", "transformers"}),
        ("import neuron_minimax.convert.verify", {"torch", "transformers"}),
        ("import neuron_minimax.model.decoder", {"transformers", "numba"} | NEURON_PACKAGES),
        ("import neuron_minimax.backends", {"torch", "transformers"} | NEURON_PACKAGES),
    ],
)
def test_what_does_not_need_a_heavy_package_does_not_load_it(code, absent):
    probe = (
        f"import sys; {code}; print('loaded:', *sorted({sorted(absent)!r} & sys.modules.keys()))"
    )
    probe = probe.replace(repr(sorted(absent)), f"set({sorted(absent)!r})")
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:", done.stdout


def package_files(path):
    """The files of this package that a file imports, wherever in it."""
    for name, _ in imports_of(path):
        file = PACKAGE.parent / (name.replace(".", "/") + ".py")
        if name.startswith("neuron_minimax.") and file.exists():
            yield file


@pytest.mark.parametrize(
    ("sources", "first"),
    [(cpu.SOURCES, "backends/cpu/graphs.py"), (neuron.SOURCES, "backends/nxdi/model.py")],
    ids=["cpu", "neuron"],
)
def test_a_change_to_any_file_that_graphs_are_made_of_asks_for_a_compile(sources, first):
    digested = {path for pattern in sources for path in PACKAGE.glob(pattern)}
    reached = set()
    waiting = [PACKAGE / first]
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            # The directory's code makes no graphs, whatever it imports to check a conversion.
            waiting += package_files(path) if path.name != "directory.py" else []
    folders = {path: path.relative_to(PACKAGE).parts[0] for path in reached}
    computing = {path for path in reached if folders[path] in ("kernels", "model", "convert")}
    assert computing, "nothing that computes is imported: the test looks in the wrong place"
    assert computing - digested == set()
