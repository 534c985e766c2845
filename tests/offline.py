"""`python -m tests.offline CHECKPOINT FOLDER`: imports every module and goes from a checkpoint to
tokens; prints, as JSON, the exit codes and every attempt to reach another machine, also one whose
failure was swallowed.
"""

import importlib
import json
import pkgutil
import sys
from typing import Any

import neuron_minimax
from neuron_minimax import cli

NEURON = ("neuron_minimax.backends.nxdi", "neuron_minimax.kernels.nki.")  # need AWS's packages
attempts: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    unix = event == "socket.connect" and isinstance(arguments[1], str | bytes)
    if event in ("socket.connect", "socket.getaddrinfo") and not unix:
        attempts.append(f"{event} {arguments}")


def main(checkpoint: str, folder: str) -> None:
    sys.addaudithook(watch)
    for module in pkgutil.walk_packages(neuron_minimax.__path__, "neuron_minimax."):
        if not module.name.startswith(NEURON) and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    converted = f"{folder}/converted"
    traced = f"{folder}/traced"
    commands = [
        ["inspect", checkpoint],
        ["convert", checkpoint, converted],
        ["verify", checkpoint, converted],
        ["compile", converted, traced, "--engine", "eager"],
        ["generate", traced, "--prompt", "Hi", "--max-new-tokens", "2", "--greedy"],
    ]
    codes = [cli.main(command) for command in commands]
    print(json.dumps({"attempts": attempts, "codes": codes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
