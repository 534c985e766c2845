"""The process that runs a check on a compiled model: `python -m neuron_minimax.device_check.run
TRACED ASKED LOGITS`.

ASKED is a JSON file of `schedule.Asked`; LOGITS a safetensors file, there when all went well.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neuron_minimax.checkpoint.writer import replacing
from neuron_minimax.errors import NeuronMiniMaxError

if TYPE_CHECKING:  # loading a model for a device sets variables, which torch may read at once
    import torch

    from neuron_minimax.backends.base import Backend


def answer(backend: "Backend", asked: Path, logits: Path) -> None:
    """Run what is asked and write {"logits"}: [N,V] of rounds, or [P,tokens,V] of prompts that
    are continued. Raises BackendError when ASKED is something else.
    """
    import torch
    from safetensors.torch import save

    from neuron_minimax.device_check.schedule import Asked, run_rounds

    request = Asked.read(asked)
    if request.rounds:
        found = run_rounds(backend, request.rounds)
    else:
        slots = backend.capabilities.slots
        found = torch.stack(
            [
                continued(backend, prompt, request.tokens, number % slots)
                for number, prompt in enumerate(request.prompts)
            ]
        )
    with replacing(logits) as file:
        file.write(save({"logits": found.contiguous()}))


def continued(backend: "Backend", prompt: Sequence[int], tokens: int, slot: int) -> "torch.Tensor":
    """The logits [tokens,V] float32 behind a prompt's most likely tokens."""
    import torch

    from neuron_minimax.generation.generate import generate

    steps = generate(backend, prompt, max_new_tokens=tokens, slot=slot)
    return torch.stack([step.logits for step in steps]).float()


def main(argv: Sequence[str] | None = None) -> int:
    from neuron_minimax.backends import load

    traced, asked, logits = (Path(argument) for argument in (argv or sys.argv[1:]))
    try:
        answer(load(traced), asked, logits)
    except NeuronMiniMaxError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def read_logits(path: Path) -> "torch.Tensor":
    """The logits that the process wrote."""
    from safetensors.torch import load_file

    return load_file(path)["logits"]


if __name__ == "__main__":
    sys.exit(main())
