"""Who this process is among those that train together, and what is exchanged between them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_fast.errors import UserError

Thing = TypeVar("Thing")
# A process that died must not keep the others waiting for long; the slowest thing in between is saving a checkpoint.
PATIENCE = timedelta(minutes=30)


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

    @classmethod
    def start(cls, device: str) -> Ranks:
        """Join the processes that a launcher such as torchrun has started with this one; one process without one.

        Args:
            device: `--device`; a process on a GPU takes the one of its number on its machine.

        Raises:
            UserError: the machine has fewer GPUs than processes.
        """
        if int(os.environ.get("WORLD_SIZE") or 1) == 1 or dist.is_initialized():
            return cls.current()
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        if on_gpu:
            if local >= torch.cuda.device_count():
                raise UserError(
                    f"--device {device}: process {local} of this machine finds {torch.cuda.device_count()} GPUs; start "
                    "one process a GPU, or pass --device cpu"
                )
            torch.cuda.set_device(local)
        # Objects and tensors of the host go by gloo, without waiting for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
        return cls.current()

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

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag if self.world_size == 1 else bool(self.sum(torch.tensor(int(flag))))

    def gather(self, thing: Thing) -> list[Thing]:
        """What each process passes, in the order of their numbers."""
        if self.world_size == 1:
            return [thing]
        found: list[Thing | None] = [None] * self.world_size
        dist.all_gather_object(found, thing)
        return found  # type: ignore[return-value]

    def first(self, thing: Thing) -> Thing:
        """What the first process passes."""
        if self.world_size == 1:
            return thing
        things = [thing]
        dist.broadcast_object_list(things)
        return things[0]

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world_size > 1:
            dist.barrier()
