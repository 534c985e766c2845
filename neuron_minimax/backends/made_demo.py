"""The embedded demo as `make demo` compiles it, and how it is told from another's.

A compiled directory is machine code, and whoever hands one over can make its manifest say that it
is the demo. So the compile that makes the demo notes the digest of its manifest, which has the
digests of all that is run, where nobody but the user writes.
"""

from contextlib import suppress
from pathlib import Path

from neuron_minimax.backends.directory import check_compiled
from neuron_minimax.backends.manifest import MANIFEST_NAME
from neuron_minimax.checkpoint.writer import make_directory, replacing
from neuron_minimax.errors import BackendError, NeuronMiniMaxError
from neuron_minimax.files import read_bytes, sha256_of, user_cache
from neuron_minimax.progress import Progress

MADE_DEMO = Path("traced_model/demo")  # where `make demo` leaves it
NOTE = "made-demo"  # in the user's cache
DIGEST_LINE = 65  # bytes


def note_demo(traced: Path) -> str:
    """Note that this user has compiled the demo into a directory; one that was noted before is
    forgotten. Return why that cannot be noted, "" when it was.
    """
    try:
        note = user_cache() / NOTE
        make_directory(note.parent)
        with replacing(note) as file:
            file.write(f"{sha256_of(traced / MANIFEST_NAME)}\n".encode())
    except (OSError, BackendError) as error:
        return str(error)
    return ""


def is_made_demo(fingerprint: str, progress: Progress) -> bool:
    """Say whether this user's `make demo` has left a compile of the checkpoint with this
    fingerprint that can be loaded; `progress` is told why not, unless nothing is there.
    """
    if not (MADE_DEMO / MANIFEST_NAME).exists():
        return False
    why = _why_not(fingerprint)
    if why:
        progress(f"{MADE_DEMO} is left alone: {why}")
    return not why


def _why_not(fingerprint: str) -> str:
    """Return the reason not to load what `make demo` seems to have left; "" when there is none."""
    noted = b""
    try:
        with suppress(OSError):
            noted = read_bytes(user_cache() / NOTE, DIGEST_LINE)
        if f"{sha256_of(MADE_DEMO / MANIFEST_NAME)}\n".encode() != noted:
            return "it is not what you have last compiled by `make demo` or `neuron-minimax run`"
        made_of = check_compiled(MADE_DEMO).manifest.identity.source_fingerprint
    except (NeuronMiniMaxError, OSError) as error:
        return str(error)
    return "" if made_of == fingerprint else "it is no compile of this version's demo model"
