"""Files that somebody else may have written: only regular ones are opened, JSON is parsed once into
a declared type, and a stamp tells later whether a file is still the one that was read.
"""

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Hashable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, cast

from pydantic import AfterValidator, TypeAdapter, ValidationError

from neuron_minimax.errors import NeuronMiniMaxError, shown

Parsed = TypeVar("Parsed")
JSON_BYTES = 100_000_000  # the safetensors format's own limit for a header
# A parsed value takes about a hundred bytes. The real index and the largest header have 800,000.
JSON_VALUES = 3_000_000
MODIFIED = "was modified"


class Stamp(NamedTuple):
    """What the file system says of a file's content: its size, and when it was last modified
    (nanoseconds since 1970).
    """

    nbytes: int
    modified_ns: int


def open_regular(path: Path) -> int:
    """Return a descriptor to read a regular file, or a link to one.

    Raises OSError; for a FIFO, a socket or a device without waiting for it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is no regular file", str(path))


def read_bytes(path: Path, limit: int = JSON_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises OSError, also when the file has more than `limit` bytes, before any is read.
    """
    with open(open_regular(path), "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > limit:
            raise OSError(
                errno.EFBIG, f"it has {nbytes} bytes, at most {limit} are read", str(path)
            )
        return file.read(limit)


def parse_json(
    data: bytes, kind: type[Parsed], where: object, error: type[NeuronMiniMaxError], advice: str
) -> Parsed:
    """Return JSON as a value of the declared type: nothing is converted, no key may be unknown to a
    dataclass that forbids it. No key stands twice in one object, and every number is finite.

    Raises `error`, which names the place, what is wrong with it, and `advice`.
    """
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > JSON_VALUES:
        raise error(f"{where} has more than {JSON_VALUES} values; {advice}")
    try:
        parsed = _parser_of(cast(Hashable, kind)).validate_json(data, strict=True)
        json.loads(
            data, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse_constant
        )
    except ValidationError as invalid:
        problem = _first_problem(invalid)
    except ValueError as odd:
        problem = str(odd)
    else:
        return cast(Parsed, parsed)
    raise error(f"{where} cannot be used ({problem}); {advice}")


def read_json(
    path: Path,
    kind: type[Parsed],
    error: type[NeuronMiniMaxError],
    advice: str,
    limit: int = JSON_BYTES,
) -> Parsed:
    """Read a JSON file as `parse_json` does.

    Raises FileNotFoundError when there is none, and `error` for everything else.
    """
    try:
        data = read_bytes(path, limit)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror}); {advice}") from None
    return parse_json(data, kind, path, error, advice)


def is_plain_name(name: str) -> bool:
    """Return whether a name, read from a file, names something within its own directory."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError(f"{shown(name)} is no plain file name")
    return name


# A name read from a file; it cannot lead out of its directory.
FileName = Annotated[str, AfterValidator(_plain)]


def stamp(path: Path) -> Stamp:
    """Return the stamp of a regular file. Raises OSError."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return Stamp(found.st_size, found.st_mtime_ns)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file's bytes, in hexadecimal. Raises OSError."""
    with open(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamps(directory: Path, names: Iterable[str]) -> dict[str, Stamp]:
    """Return the stamp of each file. Raises OSError."""
    return {name: stamp(directory / name) for name in names}


def differences(directory: Path, recorded: Mapping[str, Stamp]) -> dict[str, str]:
    """Return what is not as recorded: file name to a phrase such as "is missing"."""
    found: dict[str, str] = {}
    for name, before in recorded.items():
        try:
            now = stamp(directory / name)
        except FileNotFoundError:
            found[name] = "is missing"
            continue
        except OSError as problem:
            found[name] = f"cannot be used ({problem.strerror})"
            continue
        if now.nbytes != before.nbytes:
            found[name] = f"has {now.nbytes} bytes, not {before.nbytes}"
        elif now.modified_ns != before.modified_ns:
            found[name] = MODIFIED
    return found


def _first_problem(invalid: ValidationError) -> str:
    """Return the place, the fault, and where it says more what was found."""
    first = invalid.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    problem = f"{shown(place)[1:-1]}: {first['msg']}" if place else first["msg"]
    said = first["type"] in ("missing", "unexpected_keyword_argument", "json_invalid")
    return problem if said else f"{problem}, not {shown(first['input'])}"


def _unique(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"{shown(key)} stands twice in one object")
        seen.add(key)


def _finite(text: str) -> None:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:40]} is no finite number")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@cache
def _parser_of(kind: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, kind))


def user_cache() -> Path:
    """Return $XDG_CACHE_HOME/neuron-minimax, or that in ~/.cache.

    Raises FileNotFoundError for a user who has neither.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        home = given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        raise FileNotFoundError(
            "there is no home directory to keep files in; set XDG_CACHE_HOME to a directory"
        ) from None
    return home / "neuron-minimax"
