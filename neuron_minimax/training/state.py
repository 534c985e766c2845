"""A training run on disk: one file with everything that the next step depends on, replaced
atomically.
"""

from pathlib import Path
from typing import Any

import torch

from neuron_minimax.checkpoint.writer import replacing
from neuron_minimax.errors import TrainingError

STATE_NAME = "training_state.pt"


def save_state(directory: Path, state: dict[str, Any]) -> None:
    """Write the state under its final name only when it is whole and synced."""
    path = directory / STATE_NAME
    with replacing(path) as file:
        torch.save(state, file)


def load_state(directory: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """The saved state, or None where there is none.

    Raises TrainingError when it was saved by a run with other `options`: going on would be neither
    run.
    """
    path = directory / STATE_NAME
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TrainingError(f"{path} cannot be read ({error}); remove it to start again") from None
    differing = sorted(name for name in options if state["options"].get(name) != options[name])
    if differing:
        name = differing[0]
        raise TrainingError(
            f"{path} belongs to a run with {name} {state['options'].get(name)!r}, not "
            f"{options[name]!r}; give the same options to resume it, or another output directory"
        )
    return state
