"""Instances and chips as data, from instances.json, whose entries name their sources."""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from neuron_minimax.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One machine; memory in bytes."""

    name: str
    family: str  # trn1, inf2, trn2 or trn3
    logical_cores: int
    logical_nc_config: int
    memory_per_core: int
    host_memory: int
    tp_degrees: tuple[int, ...]  # the ones NxDI documents; empty where it documents none
    nki_kernels: bool
    e4m3_max: int
    # The newest Neuron SDK that supports NxDI models on this chip, of those this project has been
    # run with
    sdk: str


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
        raise ConfigError(f"instance {name!r} is not known; expected one of {', '.join(known)}")
    row = known[name]
    chip = data()["chips"][known[name]["chip"]]
    return Instance(
        name=name,
        family=chip["family"],
        logical_cores=row["logical_cores"],
        logical_nc_config=row["logical_nc_config"],
        memory_per_core=row["hbm_gib_per_logical_core"] * GIB,
        host_memory=row["host_memory_gib"] * GIB,
        tp_degrees=tuple(row["tp_degrees"]),
        nki_kernels=chip["nki_kernels"],
        e4m3_max=chip["e4m3_max"],
        sdk=chip["sdk"],
    )
