"""Layering: a module imports only from its left, heavy packages load only where they are used."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import neuron_minimax
from neuron_minimax.backends.cpu import options as cpu
from neuron_minimax.backends.nxdi import backend as neuron
from neuron_minimax.backends.torch_neuron import options as torch_neuron

PACKAGE = Path(neuron_minimax.__file__).parent
# Left to right: a folder or module of the package imports from itself and from those before it.
ORDER = [
    "errors",
    "progress",
    "files",
    "processes",
    "limited",
    "fp8",
    "families",
    "demo",
    "config",
    "checkpoint",
    "inspection",
    "convert",
    "kernels",
    "model",
    "planner",
    "backends",
    "generation",
    "serving",
    "device_check",
    "training",
    "studies",
    "api",
    "pipeline",
    "cli",
    "__main__",
]
NEURON_PACKAGES = {
    "torch_neuronx",
    "torch_xla",
    "neuronx_distributed",
    "neuronx_distributed_inference",
    "nki",
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


@cache
def imports_of(path, for_types=True):
    """The module, or name in a module, of every import statement of a file, wherever it stands;
    those for type checkers alone only if wanted.
    """
    names = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    typed = [node for node in blocks if ast.unparse(node.test) == "TYPE_CHECKING"]
    unread = {id(inner) for node in typed for inner in ast.walk(node)} if not for_types else set()
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def module_name(path):
    """A file's name in import statements."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in MODULES}


def imported_modules(path):
    """The modules of this package that a file imports when it runs; not itself."""
    found = imports_of(path, for_types=False)
    names = (name if name in FILES else name.rpartition(".")[0] for name in found)
    return {name for name in names if name in FILES} - {module_name(path)}


def test_every_part_of_the_package_has_a_place_in_the_order():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert parts == {"__init__", *ORDER}


def test_the_documented_order_is_the_one_held_here():
    text = " ".join((PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    assert " < ".join(ORDER) in text


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_left(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = ORDER[: ORDER.index(part) + 1] if part in ORDER else []
    for name in imported_modules(path) - {"neuron_minimax"}:
        assert name.split(".")[1] in allowed, f"{part} imports {name}"


def test_training_data_know_nothing_of_the_trainer():
    for path in (PACKAGE / "training/data").glob("*.py"):
        ours = {name for name in imported_modules(path) if ".training" in name}
        assert all(name.startswith("neuron_minimax.training.data") for name in ours), path


def circles(imported):
    """The sets of modules that reach one another, out of module -> modules that it imports."""
    reached = {}
    for start in imported:
        seen = set()
        waiting = [start]
        while waiting:
            found = imported[waiting.pop()] - seen
            seen |= found
            waiting += found
        reached[start] = seen
    return {
        frozenset(other for other in seen if start in reached[other])
        for start, seen in reached.items()
        if start in seen
    }


def test_no_modules_import_one_another_in_a_circle():
    found = circles({name: imported_modules(path) for name, path in FILES.items()})
    assert [sorted(circle) for circle in found] == []


def test_a_circle_is_found_through_every_module_on_its_way():
    imported = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert circles(imported) == {frozenset("abc"), frozenset("de")}


def test_an_import_inside_a_function_counts(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("def function():\n    from neuron_minimax.config import ModelConfig\n")
    assert imports_of(file) == ["neuron_minimax.config.ModelConfig"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_one_door_leads_to_the_neuron_packages(path):
    door = PACKAGE / "backends/nxdi/imports.py"
    kernels = PACKAGE / "kernels/nki"  # NKI code, imported through the door
    if path == PACKAGE / "backends/torch_neuron/rank.py":
        found = {name.split(".")[0] for name in imports_of(path)}
        assert found & NEURON_PACKAGES == {"torch_neuronx"}
    elif path != door and path.parent != kernels:
        assert not {name.split(".")[0] for name in imports_of(path)} & NEURON_PACKAGES


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            "import neuron_minimax.cli; neuron_minimax.cli.main(['--help'])",
            {"torch", "numpy", "transformers", "rich"},
        ),
        ("import neuron_minimax.inspection.precision", {"torch", "transformers"}),
        ("import neuron_minimax.convert.verify", {"torch", "transformers"}),
        ("import neuron_minimax.model.decoder", {"transformers"} | NEURON_PACKAGES),
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


def test_the_package_itself_loads_the_standard_library_alone():
    probe = (
        "import sys; before = set(sys.modules); import neuron_minimax\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print('loaded:', *sorted(loaded - sys.stdlib_module_names - {'neuron_minimax'}))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "loaded:"


@pytest.mark.parametrize(
    ("sources", "first"),
    [
        (cpu.SOURCES, "backends/cpu/graphs.py"),
        (neuron.SOURCES, "backends/nxdi/model.py"),
        (torch_neuron.SOURCES, "backends/torch_neuron/rank.py"),
    ],
    ids=["cpu", "neuron", "torch-neuron"],
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
            if path.name != "directory.py":
                waiting += [FILES[name] for name in imported_modules(path)]
    folders = {path: path.relative_to(PACKAGE).parts[0] for path in reached}
    computing = {path for path in reached if folders[path] in ("kernels", "model", "convert")}
    assert computing, "nothing that computes is imported: the test looks in the wrong place"
    assert computing - digested == set()
