"""The Neuron SDK releases that the model class was written for: exact package versions, and
versions known to be wrong.

Source of the versions: aws-neuron-sdk, src/helperscripts/n2-manifest.json (tag v2.29.0 holds both
releases). Wheels carry a local part after "+", which the manifest leaves out and a comparison
ignores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType

from neuron_minimax.planner import instances

INDEX = "https://pip.repos.neuron.amazonaws.com"
# Distribution to import name, of the packages that the Neuron backend imports.
PACKAGES = {
    "torch-neuronx": "torch_neuronx",
    "neuronx-distributed": "neuronx_distributed",
    "neuronx-distributed-inference": "neuronx_distributed_inference",
}


@dataclass(frozen=True, kw_only=True)
class SDK:
    """One release: its Python and Debian packages with their versions. instances.json says which
    chip it is for.
    """

    release: str
    python: Mapping[str, str]
    debian: Mapping[str, str]

    @property
    def families(self) -> tuple[str, ...]:
        return instances.families(self.release)

    @property
    def install_line(self) -> str:
        """The pip command that installs exactly these versions, from AWS's own index."""
        pins = " ".join(f"{name}=={version}" for name, version in self.python.items())
        return f"pip install --extra-index-url {INDEX} {pins}"


# The newest first.
SDKS = {
    sdk.release: sdk
    for sdk in (
        SDK(
            release="2.29",
            python=MappingProxyType(
                {
                    "neuronx-cc": "2.24.5133.0",
                    "torch-neuronx": "2.9.0.2.13.24727",
                    "neuronx-distributed": "0.18.27753",
                    "neuronx-distributed-inference": "0.9.17334",
                    "nki": "0.3.0",
                    "libneuronxla": "2.2.16408.0",
                }
            ),
            debian=MappingProxyType(
                {
                    "aws-neuronx-dkms": "2.27.4.0",
                    "aws-neuronx-runtime-lib": "2.31.24.0",
                    "aws-neuronx-collectives": "2.31.24.0",
                    "aws-neuronx-tools": "2.29.18.0",
                }
            ),
        ),
        SDK(
            release="2.28",
            python=MappingProxyType(
                {
                    "neuronx-cc": "2.23.6484.0",
                    "torch-neuronx": "2.9.0.2.12.22436",
                    "neuronx-distributed": "0.17.26814",
                    "neuronx-distributed-inference": "0.8.16251",
                    "nki": "0.2.0",
                    "libneuronxla": "2.2.15515.0",
                }
            ),
            debian=MappingProxyType(
                {
                    "aws-neuronx-dkms": "2.26.10.0",
                    "aws-neuronx-runtime-lib": "2.30.51.0",
                    "aws-neuronx-collectives": "2.30.59.0",
                    "aws-neuronx-tools": "2.28.23.0",
                }
            ),
        ),
    )
}
# Package, beginning of its version, and what is reported of it.
KNOWN_FAULTS = (
    (
        "neuronx-cc",
        "2.26.",
        "silently gave a wrong graph of another FP8 mixture of experts, seen with prompts of 200 "
        "tokens and more (neuronx-distributed-inference PR 150)",
    ),
)


def sdk_for(family: str) -> SDK:
    """The release for an instance family. Raises ConfigError for an unknown family."""
    return SDKS[instances.chip(family)["sdk"]]


def untested(sdk: SDK, installed: Mapping[str, str]) -> list[str]:
    """One line for each package that is not installed in the release's version; none where nothing
    is installed.
    """
    if not installed:
        return []
    lines = []
    for name, tested in sdk.python.items():
        found = installed.get(name, "missing")
        if found.split("+")[0] == tested:
            continue
        faults = [
            what
            for package, start, what in KNOWN_FAULTS
            if package == name and found.startswith(start)
        ]
        lines.append(f"{name} {found} (tested: {tested})" + "".join(f": {what}" for what in faults))
    return lines


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
