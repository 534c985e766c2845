"""Names of the Neuron packages, what is installed of them, and how to install them; imports none of
them.
"""

from importlib import metadata

from neuron_minimax.planner.sdks import SDKS

# Distribution to import name.
PACKAGES = {
    "torch-neuronx": "torch_neuronx",
    "neuronx-distributed": "neuronx_distributed",
    "neuronx-distributed-inference": "neuronx_distributed_inference",
}
# A module that each real package has and the placeholder of its name on the public index has not.
REAL_MODULES = {
    "torch_neuronx": "torch_neuronx.xla_impl.ops",
    "neuronx_distributed": "neuronx_distributed.parallel_layers.parallel_state",
    "neuronx_distributed_inference": "neuronx_distributed_inference.models.model_base",
}


def install_lines() -> str:
    """The command for each family of instances."""
    return "; ".join(
        f"on {' and '.join(sdk.families)} run: {sdk.install_line}" for sdk in SDKS.values()
    )


def installed_versions() -> dict[str, str]:
    """Versions of the Neuron packages that are installed, as their metadata says."""
    found = {}
    for name in {name for sdk in SDKS.values() for name in sdk.python}:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
