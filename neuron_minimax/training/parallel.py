"""The processes of one run, what they add up, and the device of each."""

import os

import torch
import torch.distributed as distributed

from neuron_minimax.errors import TrainingError


class Processes:
    """The processes of one run: this one alone, or all that torchrun started.

    Rank and count come from the environment that torchrun sets; sums go over gloo, of what is on
    CUDA devices over NCCL.
    """

    def __init__(self, on_cuda: bool = False) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = _rank()
        if self.count > 1 and not distributed.is_initialized():
            distributed.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Say whether the flag is true in one of the processes."""
        return bool(self.sum(torch.tensor(float(flag))))

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def close(self) -> None:
        if self.count > 1:
            distributed.destroy_process_group()


def is_first_process() -> bool:
    """Say whether this process is the first of a run, before they have found each other."""
    return _rank() == 0


def device_of(name: str) -> torch.device:
    """Return the device of that name, of several of its kind the one of this process.

    Raises TrainingError when it cannot be used.
    """
    try:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try cpu"
        ) from None
    return device


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
