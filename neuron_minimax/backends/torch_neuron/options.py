"""The options of the TorchNeuron backend, and what its graphs depend on; without torch."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from typing import Any

from pydantic import ConfigDict

from neuron_minimax.backends.base import check_buckets, check_seq_len, given_options
from neuron_minimax.backends.manifest import cpu_here, versions_of
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import BackendError
from neuron_minimax.files import parse_json
from neuron_minimax.planner.settings import default_buckets, largest_sizes, moe_degrees

DEVICES = ("neuron", "cpu")
COMPUTE = {"neuron": "bf16", "cpu": "float32"}  # the default of each device
ENGINES = ("compiled", "eager")
DEFAULT_SEQ_LEN = 1024
MOST = 1 << 30  # slots or positions, which memory bounds much earlier
PACKAGE = "torch-neuronx"
COMPILER = "neuronx-cc"
FIRST_VERSION = (2, 13)  # of torch-neuronx: before, it was PyTorch/XLA
INSTALL_PAGE = "https://awsdocs-neuron.readthedocs-hosted.com/en/latest/setup/pytorch/index.html"
INSTALL = (
    f"TorchNeuron is {PACKAGE} 2.13.3.0 or 2.14.3.0, of Neuron SDK 2.33 and later, for trn2 and "
    f"trn3; AWS says how it is installed: {INSTALL_PAGE}. Without the chip, --device cpu runs the "
    "same ranks on this machine's CPU"
)
# The files that graphs are made from.
SOURCES = (
    "backends/torch_neuron/*.py",
    "config.py",
    "convert/*.py",
    "families/*.py",
    "kernels/reference.py",
    "model/*.py",
    "planner/sharding.py",
)


@dataclass(frozen=True, kw_only=True)
class TorchNeuronOptions:
    """The choices of a compile; lengths in tokens.

    device          "neuron", or "cpu": the same ranks and graphs without the chip
    moe_ep_degree   groups of ranks that share out the experts; the ranks of a group share channels
    compute         dtype of activations and of the cache
    engine          "compiled" by torch.compile, with the device's own compiler; "eager" on a CPU
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    device: str
    tp_degree: int
    moe_ep_degree: int
    slots: int
    seq_len: int
    buckets: tuple[int, ...]
    compute: str
    engine: str

    def __post_init__(self) -> None:
        for name, allowed in (("device", DEVICES), ("compute", ("float32", "bf16"))):
            _require_one_of(name, getattr(self, name), allowed)
        if self.device == "neuron" and self.engine == "eager":
            raise BackendError(
                "engine is 'eager'; expected compiled, or --device cpu, which has both", usage=True
            )
        _require_one_of("engine", self.engine, ENGINES)
        sizes = {"tp_degree": 1, "moe_ep_degree": 1, "slots": 1, "seq_len": 2}
        most = largest_sizes()["tp_degree"]
        for name, least in sizes.items():
            limit = most if name.endswith("degree") else MOST
            if not least <= getattr(self, name) <= limit:
                raise BackendError(
                    f"{name} is {getattr(self, name)}; expected {least} to {limit}", usage=True
                )
        check_buckets(self.buckets, self.seq_len)

    @classmethod
    def parse(
        cls,
        options: Mapping[str, Any],
        advice: str = "expected lengths and counts as integers, names as text",
    ) -> "TorchNeuronOptions":
        """Options from a manifest or a caller. Raises BackendError naming one of another type, or
        that does not exist.
        """
        given = json.dumps(dict(options), default=repr).encode()
        what = "an option of the torch-neuron backend"
        return parse_json(given, cls, what, BackendError, advice)


def _require_one_of(name: str, found: str, allowed: tuple[str, ...]) -> None:
    if found not in allowed:
        raise BackendError(f"{name} is {found!r}; expected {' or '.join(allowed)}", usage=True)


def check_options(
    config: ModelConfig, options: Mapping[str, Any], force: bool = False
) -> dict[str, Any]:
    """Fill in defaults (None counts as absent) and check. Raises BackendError or ConfigError naming
    the option.
    """
    taken = {"moe_tp_degree", *(field.name for field in fields(TorchNeuronOptions))}
    given = given_options(options, taken, "torch-neuron")
    moe_tp_degree = given.pop("moe_tp_degree", None)
    device = given.setdefault("device", DEVICES[0])
    tp_degree = given.setdefault("tp_degree", 1)
    moe_tp_degree, moe_ep_degree = moe_degrees(
        config, tp_degree, moe_tp_degree, given.get("moe_ep_degree")
    )
    if moe_tp_degree * moe_ep_degree != tp_degree:
        raise BackendError(
            f"moe_tp_degree {moe_tp_degree} times moe_ep_degree {moe_ep_degree} is not tp_degree "
            f"{tp_degree}; expected the experts over all ranks",
            usage=True,
        )
    given["moe_ep_degree"] = moe_ep_degree
    given.setdefault("slots", 1)
    seq_len = given.setdefault("seq_len", min(DEFAULT_SEQ_LEN, config.max_position_embeddings))
    given.setdefault("buckets", default_buckets(seq_len))
    given.setdefault("compute", COMPUTE.get(device, "bf16"))
    given.setdefault("engine", ENGINES[0])
    chosen = TorchNeuronOptions.parse(given)
    check_seq_len(chosen.seq_len, config)
    return {**asdict(chosen), "buckets": list(chosen.buckets)}


def environment(
    options: Mapping[str, Any],
) -> tuple[dict[str, str], dict[str, str | list[str]]]:
    """Versions and machine features that compiled graphs depend on.

    Raises BackendError that says what to install when the device's package is not there.
    """
    if options["device"] == "cpu":
        return versions_of(["torch"], SOURCES), cpu_here()
    _require_torch_neuron()
    return versions_of(["torch", PACKAGE, COMPILER], SOURCES), {}


def _require_torch_neuron() -> None:
    if importlib.util.find_spec("torch_neuronx") is None:
        raise BackendError(f"--backend torch-neuron needs {PACKAGE}, which is not here. {INSTALL}")
    found = metadata.version(PACKAGE)
    if tuple(int(part) for part in found.split(".")[:2]) < FIRST_VERSION:
        raise BackendError(
            f"{PACKAGE} {found} is PyTorch/XLA, which --backend neuron runs on. {INSTALL}"
        )
