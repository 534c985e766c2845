"""The options of the CPU backend, and the environment that its graphs depend on; without torch."""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from neuron_minimax.backends.base import check_buckets
from neuron_minimax.backends.directory import cpu_here, versions_of
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import BackendError

COMPUTE = ("float32", "bf16")
ENGINES = ("compiled", "exported", "eager")
DEFAULT_CPU_SEQ_LEN = 2048
DEFAULT_CPU_BUCKETS = (64, 512)
# The files that graphs are made from: the decoder, what its rules give it, and its kernels.
SOURCES = (
    "backends/cpu/graphs.py",
    "config.py",
    "convert/*.py",
    "families/*.py",
    "kernels/cpu/*.py",
    "kernels/reference.py",
    "model/*.py",
)


@dataclass(frozen=True, kw_only=True)
class CPUOptions:
    """The choices of a CPU compile; lengths in tokens. `compute` is the dtype of activations."""

    slots: int = 1
    seq_len: int
    buckets: tuple[int, ...]
    compute: str = "float32"
    engine: str = "compiled"

    def __post_init__(self) -> None:
        if self.slots < 1 or self.seq_len < 2:
            raise BackendError(
                f"batch size {self.slots}, seq_len {self.seq_len}: expected at least 1 and at "
                "least 2"
            )
        check_buckets(self.buckets, self.seq_len)
        for name, allowed in (("compute", COMPUTE), ("engine", ENGINES)):
            if getattr(self, name) not in allowed:
                raise BackendError(
                    f"{name} is {getattr(self, name)!r}; expected {' or '.join(allowed)}"
                )

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> "CPUOptions":
        """The options that a manifest holds."""
        return cls(**{**options, "buckets": tuple(options["buckets"])})


def check_options(
    config: ModelConfig, options: Mapping[str, Any], force: bool = False
) -> dict[str, Any]:
    """Fill in defaults (None counts as absent) and check. Raises BackendError naming the option.

    `force` is for backends that advise against what they could compile; this one never does.
    """
    given = {name: value for name, value in options.items() if value is not None}
    foreign = sorted(given.keys() - {field.name for field in fields(CPUOptions)})
    if foreign:
        raise BackendError(
            f"the cpu backend does not take --{foreign[0].replace('_', '-')}; it belongs to "
            "another one"
        )
    seq_len = given.setdefault("seq_len", min(DEFAULT_CPU_SEQ_LEN, config.max_position_embeddings))
    default = tuple(size for size in DEFAULT_CPU_BUCKETS if size <= seq_len) or (seq_len,)
    given["buckets"] = tuple(given.get("buckets", default))
    if given.get("engine", "compiled") == "compiled" and not compiler_is_there():
        given["engine"] = "exported"
    if seq_len > config.max_position_embeddings:
        raise BackendError(
            f"seq_len {seq_len} is beyond max_position_embeddings {config.max_position_embeddings} "
            "of config.json"
        )
    return {**asdict(CPUOptions(**given)), "buckets": list(given["buckets"])}


def environment() -> tuple[dict[str, str], dict[str, Any]]:
    """Versions and machine features that compiled graphs depend on."""
    python = {"python": "{}.{}".format(*sys.version_info)}  # whose pickles hold the loops
    return python | versions_of(["torch", "numba"], SOURCES), cpu_here()


def compiler_is_there() -> bool:
    """Look for the C++ compiler that AOTInductor calls, $CXX or g++."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None
