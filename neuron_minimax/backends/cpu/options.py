"""The options of the CPU backend, and the environment that its graphs depend on; without torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pydantic import ConfigDict

from neuron_minimax.backends.base import check_buckets, check_seq_len, given_options
from neuron_minimax.backends.manifest import cpu_here, versions_of
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import BackendError
from neuron_minimax.files import parse_json
from neuron_minimax.kernels.cpu.library import compiler

COMPUTE = ("float32", "bf16")
# What keys and values are kept in; auto is the dtype of activations.
KV_CACHE_CHOICES = ("auto", "float32", "bfloat16", "fp8")
ENGINES = ("compiled", "exported", "eager")
EXPORTED = ".exported.pt2"  # ends the name of an exported graph
KERNELS = "kernels.so"
DEFAULT_CPU_SEQ_LEN = 2048
MOST = 1 << 30  # slots or positions, which memory bounds much earlier
DEFAULT_CPU_BUCKETS = (64, 512)
# The files that graphs are made from: the decoder, what its rules give it, and its kernels.
SOURCES = (
    "backends/cpu/graphs.py",
    "config.py",
    "convert/*.py",
    "families/*.py",
    "kernels/cpu/*.cpp",
    "kernels/cpu/*.h",
    "kernels/cpu/*.py",
    "kernels/reference.py",
    "model/*.py",
)


@dataclass(frozen=True, kw_only=True)
class CPUOptions:
    """The choices of a CPU compile; lengths in tokens. `compute` is the dtype of activations,
    `kv_cache_dtype` that of keys and values: "auto" is the same.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    slots: int = 1
    seq_len: int
    buckets: tuple[int, ...]
    compute: str = "float32"
    kv_cache_dtype: str = "auto"
    engine: str = "compiled"

    def __post_init__(self) -> None:
        if not 1 <= self.slots <= MOST or not 2 <= self.seq_len <= MOST:
            raise BackendError(
                f"batch size {self.slots}, seq_len {self.seq_len}: expected at least 1 and at "
                f"least 2, and at most {MOST}",
                usage=True,
            )
        check_buckets(self.buckets, self.seq_len)
        for name, allowed in (
            ("compute", COMPUTE),
            ("kv_cache_dtype", KV_CACHE_CHOICES),
            ("engine", ENGINES),
        ):
            if getattr(self, name) not in allowed:
                raise BackendError(
                    f"{name} is {getattr(self, name)!r}; expected {' or '.join(allowed)}",
                    usage=True,
                )

    @property
    def cache_dtype(self) -> str:
        """What keys and values are kept in: float32, bfloat16 or fp8."""
        of_activations = "bfloat16" if self.compute == "bf16" else self.compute
        return of_activations if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    def cache_bytes_per_token(self, config: ModelConfig) -> int:
        """Return the bytes of one position's keys and values; in FP8 a head has a scale, too."""
        size = config.head_dim
        of_head = {"float32": 4 * size, "bfloat16": 2 * size, "fp8": size + 4}[self.cache_dtype]
        return 2 * config.num_hidden_layers * config.num_key_value_heads * of_head

    @classmethod
    def parse(
        cls,
        options: Mapping[str, Any],
        advice: str = "expected lengths and counts as integers, names as text",
    ) -> "CPUOptions":
        """Options from a manifest or a caller. Raises BackendError naming one of another type, or
        that does not exist.
        """
        given = json.dumps(dict(options), default=repr).encode()
        return parse_json(given, cls, "an option of the cpu backend", BackendError, advice)


def check_options(
    config: ModelConfig, options: Mapping[str, Any], force: bool = False
) -> dict[str, Any]:
    """Fill in defaults (None counts as absent) and check. Raises BackendError naming the option.

    `force` is for backends that advise against what they could compile; this one never does.
    """
    taken = [field.name for field in fields(CPUOptions)]
    given = given_options(options, taken, "cpu")
    given.setdefault("seq_len", min(DEFAULT_CPU_SEQ_LEN, config.max_position_embeddings))
    chosen = CPUOptions.parse({"buckets": (1,)} | given)
    if "buckets" not in given:
        default = tuple(size for size in DEFAULT_CPU_BUCKETS if size <= chosen.seq_len)
        chosen = replace(chosen, buckets=default or (chosen.seq_len,))
    if chosen.engine == "compiled" and not compiler():
        chosen = replace(chosen, engine="exported")
    check_seq_len(chosen.seq_len, config)
    return {**asdict(chosen), "buckets": list(chosen.buckets)}


def environment(
    options: Mapping[str, Any],
) -> tuple[dict[str, str], dict[str, str | list[str]]]:
    """Versions and machine features that compiled graphs depend on, whatever the options are."""
    return versions_of(["torch"], SOURCES), cpu_here()
