"""Data-parallel fits: the few collective operations that they need of ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError

__all__ = ["Ranks", "average", "copy_from_first"]


class Ranks(NamedTuple):
    """Which part of the work is ours.

    Attributes:
        rank: Number of this process.
        world: Number of processes.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Ask the process group that the program has initialised.

        Raises:
            DataError: There is none.
        """
        group = torch.distributed
        if not (group.is_available() and group.is_initialized()):
            raise DataError(
                "distributed=True: expected a process group, got none; call "
                "torch.distributed.init_process_group first, or leave the option out"
            )
        return cls(group.get_rank(), group.get_world_size())

    def shard(self, units: int) -> Tensor:
        """Return our units: rank, rank + world, ..., [unit].

        Raises:
            DataError: There are fewer units than processes.
        """
        if units < self.world:
            raise DataError(
                f"distributed=True: expected at least one unit for each of {self.world} "
                f"processes, got {units} units"
            )
        return torch.arange(self.rank, units, self.world)


def average(tensors: Sequence[Tensor], count: int) -> None:
    """Replace each tensor by its mean over the ``count`` processes, in place."""
    if count == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= count
    begin = 0
    for tensor in tensors:
        tensor.copy_(flat[begin : begin + tensor.numel()].reshape(tensor.shape))
        begin += tensor.numel()


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrite each tensor by that of the first process."""
    for tensor in tensors:
        torch.distributed.broadcast(tensor, src=0)
