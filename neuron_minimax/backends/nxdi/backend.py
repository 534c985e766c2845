"""The Neuron backend: options, compile and load; the Neuron packages are imported when needed.

A compile runs in a process of its own: `python -m neuron_minimax.backends.nxdi.backend MODEL
GRAPHS`, whose output is the log.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_minimax.backends.directory import Manifest, versions_of
from neuron_minimax.backends.nxdi import options as neuron_options
from neuron_minimax.backends.nxdi.supervise import run_supervised
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.plan import Converted
from neuron_minimax.errors import BackendError, NeuronMiniMaxError
from neuron_minimax.planner import instances
from neuron_minimax.planner.sdks import (
    PACKAGES,
    install_lines,
    installed_versions,
    sdk_for,
    untested,
)

if TYPE_CHECKING:
    from neuron_minimax.backends.base import Backend

SOURCES = (
    "backends/nxdi/*.py",
    "convert/*.py",
    "families/*.py",
    "kernels/reference.py",
    "kernels/nki/*.py",
    "model/rope.py",
    "planner/sharding.py",
)
COMPILE_SECONDS = 7200.0
ALLOW_UNTESTED = "allow_untested_versions"
LOG_NAME = "compile.log"
OPTIONS_NAME = "options.json"
MODEL_NAME = "model.pt"  # written by NxDI below the graphs directory


def check_options(
    config: ModelConfig, options: Mapping[str, Any], force: bool = False
) -> dict[str, Any]:
    """Defaults filled in and judged by the planner.

    Raises BackendError when it refuses, unless `force`, and when the installed Neuron packages are
    of other versions than the SDK's, unless `options` has allow_untested_versions; that changes no
    graph and is not kept.
    """
    foreign = {name for name in ("engine", "compute") if options.get(name) is not None}
    if foreign:
        raise BackendError(
            f"--{min(foreign)} belongs to the cpu backend; a Neuron compile is BF16 over FP8 "
            "weights",
            usage=True,
        )
    allowed = options.get(ALLOW_UNTESTED, False)
    checked = neuron_options.check(
        config, {name: value for name, value in options.items() if name != ALLOW_UNTESTED}, force
    )
    lines = untested_versions(checked["instance"])
    if lines and not allowed:
        raise BackendError(
            f"these packages are not of the Neuron SDK that {checked['instance']} was prepared "
            f"for: {'; '.join(lines)}. {install_lines()}; or compile with --allow-untested-versions"
        )
    return checked


def untested_versions(instance: str) -> list[str]:
    """A line for each installed Neuron package of another version than the instance's SDK has."""
    return untested(sdk_for(instances.instance(instance).family), installed_versions())


def environment(options: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Versions of the Neuron packages, whatever the options are. Raises BackendError with AWS's
    install line when one is not there.
    """
    versions = versions_of(["torch"], SOURCES)
    for distribution, package in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            raise BackendError(
                f"the Neuron backend needs {package}, which is not installed; {install_lines()}"
            )
        try:
            versions[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            versions[distribution] = "unknown"
    return versions, {}


def build(
    model: Path, graphs: Path, options: Mapping[str, Any], progress: Callable[[str], None]
) -> tuple[dict[str, float], list[str]]:
    """Compile both submodels and save each rank's weights, in a process of its own with a limit of
    two hours.

    The log stays in `graphs`. Raises BackendError with its last lines when the compile fails or
    takes too long.
    """
    parsed = neuron_options.parse(options)
    notes = [f"untested version: {line}" for line in untested_versions(parsed.instance)]
    stored = TensorDirectory(model).entries.values()
    config = ModelConfig.from_dir(model)
    rounded = neuron_options.rounded_weights(
        ((entry.name, entry.dtype == "F32") for entry in stored), config.family
    )
    if rounded:
        notes.append(neuron_options.rounding_note(rounded))
    padding = -config.num_local_experts % parsed.moe_ep_degree
    if padding:
        notes.append(
            f"{padding} of {parsed.moe_ep_degree} expert-parallel ranks hold an expert of zeros, "
            f"which no token can choose: the ranks do not divide {config.num_local_experts} experts"
        )
    for note in notes:
        progress(f"warning: {note}")
    (graphs / OPTIONS_NAME).write_text(json.dumps(dict(options)), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "neuron_minimax.backends.nxdi.backend",
        str(model),
        str(graphs),
    ]
    seconds = run_supervised(
        command,
        process_environment(model, graphs, parsed),
        graphs / LOG_NAME,
        progress,
        limit=COMPILE_SECONDS,
    )
    return {MODEL_NAME: seconds, neuron_options.PARAMETERS_NAME: 0.0}, [f"log: {LOG_NAME}", *notes]


def process_environment(
    model: Path, graphs: Path, options: neuron_options.NeuronOptions
) -> dict[str, str]:
    """This process's variables with those of the options; a cast left over from another model is
    taken out.
    """
    inherited = {
        name: value for name, value in os.environ.items() if name not in neuron_options.FP8_CASTS
    }
    return inherited | neuron_options.environment(model, graphs, options)


def load(model: Converted, graphs: Path, manifest: Manifest) -> "Backend":
    """The model on the device, from the compiled directory alone; each rank's weights are checked
    first.
    """
    parsed = neuron_options.parse(manifest.options)
    for name in neuron_options.FP8_CASTS:
        os.environ.pop(name, None)
    os.environ.update(neuron_options.environment(model.directory, graphs, parsed))
    from neuron_minimax.backends.nxdi.application import NeuronBackend, load_application

    application = load_application(model.directory, graphs, parsed)
    return NeuronBackend(application, model.directory, parsed)


def main(argv: list[str] | None = None) -> int:
    """Compile the converted directory MODEL into GRAPHS, by the options.json that is there."""
    from neuron_minimax.backends.nxdi.application import compile_application, make_application

    model, graphs = (Path(argument) for argument in (argv or sys.argv[1:]))
    try:
        options = neuron_options.parse(
            json.loads((graphs / OPTIONS_NAME).read_text(encoding="utf-8"))
        )
        compile_application(make_application(model, options), graphs)
    except NeuronMiniMaxError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
