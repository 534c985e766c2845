"""Make `neuron-minimax` and `python -m neuron_minimax` one command."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

SHOW_CURSOR = "\r\033[?25h"


def main() -> NoReturn:
    """Run the command that the program was started with, and exit."""
    code: int | None = None
    kept = "nothing was done"

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        """End at once: before the command has begun, amid an import, or when it is done."""
        if code is None:
            cursor = SHOW_CURSOR if os.isatty(2) else ""  # which a progress bar hides
            os.write(2, f"{cursor}stopped by {signal.Signals(number).name}; {kept}\n".encode())
        os._exit(128 + number if code is None else code)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave)
    from neuron_minimax.cli import KEPT
    from neuron_minimax.cli import main as command

    kept = KEPT
    code = command()
    if code > 128:
        # An interruption amid `exec`, as of a dataclass, has Python kill itself when it ends.
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
