"""The processes of one training run: this one alone, or all that torchrun started."""

import os

import torch
import torch.distributed as distributed


class Processes:
    """Rank and count, from the environment that torchrun sets, and the sums that they exchange
    (gloo or nccl).
    """

    def __init__(self, backend: str = "gloo") -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if self.count > 1 and not distributed.is_initialized():
            distributed.init_process_group(backend)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def close(self) -> None:
        if self.count > 1:
            distributed.destroy_process_group()
