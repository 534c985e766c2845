"""Instances and chips as data, from instances.json, whose entries name their sources."""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from neuron_minimax.errors import ConfigError

GIB = 2**30
BANDWIDTH_UNITS = {"GiB/s": 2**30, "TB/s": 10**12}


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One machine; memory in bytes."""

    name: str
    family: str  # trn1, inf2, trn2 or trn3
    logical_cores: int
    logical_nc_config: int
    memory_per_core: int
    bandwidth_per_core: float  # bytes a second that a logical core reads at most, as documented
    host_memory: int
    # Those that NxDI documents for the chip and this machine has cores for; empty where it
    # documents none.
    tp_degrees: tuple[int, ...]
    nki_kernels: bool
    e4m3_max: int
    # The newest Neuron SDK that supports NxDI models on this chip, of those this project has been
    # run with
    sdk: str

    @property
    def device_memory(self) -> int:
        """Bytes of all cores."""
        return self.logical_cores * self.memory_per_core


@cache
def data() -> dict[str, Any]:
    """The parsed instances.json."""
    return json.loads(
        resources.files("neuron_minimax.planner")
        .joinpath("instances.json")
        .read_text(encoding="utf-8")
    )


def scratch_bytes() -> int:
    """Bytes to leave free per core for activations and graphs; instances.json says why."""
    return data()["scratch_gib"] * GIB


def most_reported_batch() -> int:
    """The most sequences at once that a report of instances.json has run."""
    return max(known["plan"]["batch_size"] for known in data()["known_cases"] if "plan" in known)


def names() -> list[str]:
    return list(data()["instances"])


def chip(family: str) -> dict[str, Any]:
    """The chip of an instance family (trn1, inf2, trn2, trn3). Raises ConfigError for another
    one.
    """
    chips = {row["family"]: row for row in data()["chips"].values()}
    if family not in chips:
        raise ConfigError(f"no chip is known as {family!r}; expected one of {', '.join(chips)}")
    return chips[family]


def families(sdk: str) -> tuple[str, ...]:
    """Instance families for which a Neuron SDK release is the one to use."""
    return tuple(row["family"] for row in data()["chips"].values() if row["sdk"] == sdk)


def instance(name: str) -> Instance:
    """The instance of that name. Raises ConfigError listing the known ones."""
    known = data()["instances"]
    if name not in known:
        raise ConfigError(
            f"instance {name!r} is not known; expected one of {', '.join(known)}", usage=True
        )
    row = known[name]
    chip = data()["chips"][known[name]["chip"]]
    (amount, unit) = chip["memory_bandwidth"].split()
    bandwidth = float(amount) * BANDWIDTH_UNITS[unit]
    return Instance(
        name=name,
        family=chip["family"],
        logical_cores=row["logical_cores"],
        logical_nc_config=row["logical_nc_config"],
        memory_per_core=row["hbm_gib_per_logical_core"] * GIB,
        bandwidth_per_core=bandwidth * row["chips"] / row["logical_cores"],
        host_memory=row["host_memory_gib"] * GIB,
        tp_degrees=tuple(each for each in row["tp_degrees"] if each <= row["logical_cores"]),
        nki_kernels=chip["nki_kernels"],
        e4m3_max=chip["e4m3_max"],
        sdk=chip["sdk"],
    )
