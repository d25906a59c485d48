"""Who this process is among those that train together, and what is exchanged between them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from dpo_fast.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        rank: number of this process, from 0.
        world_size: how many there are.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of torch's default process group; one process if there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, num_items: int) -> range:
        """Indices of the items that this process takes: every `world_size`-th."""
        return range(self.rank, num_items, self.world_size)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes; `x` itself if there is one process."""
        if self.world_size == 1:
            return x
        total = x.clone()
        dist.all_reduce(total)
        return total

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world_size > 1:
            dist.barrier()


def refuse_many_processes() -> None:
    """Under a launcher, each process would train the whole job into one folder.

    Raises:
        UserError: the environment says that this is one of several processes.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size not in ("", "1"):
        raise UserError(
            f"WORLD_SIZE is {world_size}: dpo-fast train is a single process. Start it without torchrun, or train on "
            "several GPUs with dpo_fast.integrations.trl.DPOTrainer under accelerate launch"
        )
