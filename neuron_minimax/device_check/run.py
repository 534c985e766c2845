"""The process that runs a check on a compiled model: `python -m neuron_minimax.device_check.run
TRACED ASKED LOGITS`.

ASKED is a JSON file of `write_rounds` or `write_prompts`; LOGITS a safetensors file, there when all
went well.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from neuron_minimax.backends.base import Backend
    from neuron_minimax.device_check.schedule import Round


def write_rounds(path: Path, rounds: Sequence["Round"]) -> None:
    """The rounds to run, as the process reads them."""
    rows = [[asdict(sequence) for sequence in round_] for round_ in rounds]
    path.write_text(json.dumps({"rounds": rows}), encoding="utf-8")


def write_prompts(path: Path, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    """Prompts to continue greedily by so many tokens, as the process reads them."""
    asked = {"prompts": [list(prompt) for prompt in prompts], "tokens": tokens}
    path.write_text(json.dumps(asked), encoding="utf-8")


def answer(backend: "Backend", asked: Path, logits: Path) -> None:
    """Run what is asked and write {"logits"}: [N,V] of rounds, or [P,tokens,V] of prompts that
    are continued.
    """
    import torch
    from safetensors.torch import save_file

    from neuron_minimax.device_check.schedule import SlotTokens, run_rounds

    request = json.loads(asked.read_text(encoding="utf-8"))
    if "rounds" in request:
        rounds = [
            tuple(
                SlotTokens(
                    slot=row["slot"],
                    prompt=tuple(row["prompt"]),
                    continuation=tuple(row["continuation"]),
                )
                for row in round_
            )
            for round_ in request["rounds"]
        ]
        found = run_rounds(backend, rounds)
    else:
        found = torch.stack(
            [
                continued(backend, prompt, request["tokens"], number % backend.capabilities.slots)
                for number, prompt in enumerate(request["prompts"])
            ]
        )
    partial = logits.with_name(logits.name + ".partial")
    save_file({"logits": found.contiguous()}, partial)
    os.replace(partial, logits)


def continued(backend: "Backend", prompt: Sequence[int], tokens: int, slot: int) -> "torch.Tensor":
    """The logits [tokens,V] float32 behind a prompt's most likely tokens."""
    import torch

    from neuron_minimax.generation.generate import generate

    steps = generate(backend, prompt, max_new_tokens=tokens, slot=slot)
    return torch.stack([step.logits for step in steps]).float()


def main(argv: Sequence[str] | None = None) -> int:
    from neuron_minimax.backends import load
    from neuron_minimax.errors import NeuronMiniMaxError

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
