"""Waiting for what happens at once on an idle machine, and late on a busy one."""

import time
from collections.abc import Callable
from typing import Any

WAIT = 120.0  # seconds; long enough for a machine that does ten other things


def wait_until(condition: Callable[[], Any], seconds: float = WAIT) -> Any:
    """Return what the condition returns as soon as that is true. Fails after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return value
