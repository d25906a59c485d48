"""Who this process is among those that train together, what they exchange, and how they end together."""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from dpo_fast.errors import PeerError, TrainingError, UserError, exit_code

Thing = TypeVar("Thing")
# How long the others are waited for: a process that died is noticed at once, by its connections.
PATIENCE = timedelta(minutes=30)
LINGER_SECONDS = 10
_ENDED, _EXIT_CODE = "dpo-fast/ended", "dpo-fast/exit-code"


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        rank: number of this process, from 0.
        world_size: how many there are.
        store: where a process that ends leaves its exit code for the others; None in a group that was there already.
    """

    rank: int = 0
    world_size: int = 1
    store: Store | None = field(default=None, repr=False, compare=False)

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

    def end(self, code: int) -> int | None:
        """Leave the exit code to the others before this process ends; that of the first which did, or None."""
        if self.store is None:
            return None
        try:
            if self.store.add(_ENDED, 1) > 1:
                return int(self.store.get(_EXIT_CODE))
            self.store.set(_EXIT_CODE, str(code))
        except RuntimeError:  # the process that holds the store is gone
            pass
        return None

    def linger(self) -> None:
        """Keep the store until the others have read how this process ended, which they do once it left the group."""
        if self.store is None or self.rank:
            return
        deadline = time.monotonic() + LINGER_SECONDS
        while 0 < self.store.add(_ENDED, 0) < self.world_size and time.monotonic() < deadline:
            time.sleep(0.05)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world_size > 1:
            dist.barrier()


ONE_PROCESS = Ranks()


def launched() -> int:
    """How many processes a launcher such as torchrun has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def free_port() -> int:
    """A port of this machine for processes to meet at, below those that Linux gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def local_processes() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or launched())


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the processes that a launcher has started with this one; a group that is there already is taken as it is.

    The first process that fails says why; the others end quietly, with its exit code.

    Args:
        device: `--device`; a process on a GPU takes the one of its number on its machine.

    Raises:
        UserError: the machine has fewer GPUs than processes.
        PeerError: another process failed first.
        TrainingError: another process is gone without a word.
    """
    if launched() == 1 or dist.is_initialized():
        yield Ranks.current()
        return
    on_gpu = _take_gpu(device)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
    # Objects and tensors of the host go by gloo, without waiting for the GPU.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    if rank:
        logging.getLogger("dpo_fast").setLevel(logging.ERROR)
    ranks = Ranks(rank, world_size, store)
    try:
        yield ranks
    except Exception as error:
        raise _as_one(error, ranks) from error
    finally:
        dist.destroy_process_group()
        ranks.linger()


def _take_gpu(device: str) -> bool:
    """Make this process's GPU the current one; returns whether it takes one."""
    if not (device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())):
        return False
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if device not in ("auto", "cuda"):
        raise UserError(f"--device {device}: each of the processes takes a GPU of its own; pass --device cuda")
    if local >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: process {local} of this machine finds {torch.cuda.device_count()} GPUs; start one "
            "process per GPU, or pass --device cpu"
        )
    torch.cuda.set_device(local)
    return True


def _as_one(error: Exception, ranks: Ranks) -> Exception:
    """The error itself in the first process that fails, elsewhere one that says nothing."""
    code = ranks.end(exit_code(error))
    if code is not None:
        return PeerError(code)
    if _is_lost_connection(error):
        return TrainingError(
            f"another process of the run is gone ({str(error).strip().splitlines()[0]}). What was saved is whole: "
            "resume with --resume auto"
        )
    return error


def _is_lost_connection(error: Exception) -> bool:
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Socket")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and not isinstance(error, TrainingError)
        and any(word in str(error) for word in words)
    )
