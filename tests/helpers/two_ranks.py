"""A tiny model with the fused loss inside, and what a process of a group of them runs.

Apart from the tests that start it: a spawned process finds modules by the search path, which has this folder but not
the tests' own package.
"""

import json
import os
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dpo_fast import FusedLinearDPOLoss
from dpo_fast.ranks import Ranks


class Tiny(nn.Module):
    """An embedding, a layer and a head, with the loss inside: what wrappers wrap."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.head = nn.Embedding(37, 8), nn.Linear(8, 8), nn.Linear(8, 37)
        self.loss = FusedLinearDPOLoss(use_ref_model=False, beta=0.5)

    def forward(self, ids):
        hidden = self.layer(self.embed(ids[:, :-1])).tanh()
        return self.loss(self.head.weight, hidden, ids[:, 1:], self.head.bias)[0]


def batch_of(rank):
    """Two pairs, chosen first."""
    return torch.randint(0, 37, (4, 9), generator=torch.Generator().manual_seed(rank))


def wrap(model, wrapper, world_size):
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (world_size,))
    if wrapper == "fsdp2":
        return fully_shard(model, mesh=mesh)
    # The head's own unit is never run as a module here, so that the loss meets its shards.
    for part in (model.head, model.layer, model.embed):
        fully_shard(part, mesh=mesh)
    return model


def gradients(rank, world_size, wrapper, folder: Path):
    """One process's step; the first writes `grads.pt`."""
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    model = Tiny()
    wrapped = wrap(model, wrapper, world_size)  # kept until the backward is over: DDP's hooks go with it
    wrapped(batch_of(rank)).backward()
    grads = {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for name, p in model.named_parameters()
    }
    if rank == 0:
        torch.save(grads, folder / "grads.pt")
    torch.distributed.barrier()
    # Tearing down DDP joins gloo's threads while holding the lock that they may be waiting for: leave without it.
    os._exit(0)


def share_and_sum(rank, folder: Path):
    """One of two processes: writes what its `Ranks` says to `RANK.json`."""
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    ranks = Ranks.current()
    x = torch.tensor([1.0, 10.0]) * (rank + 1)
    total = ranks.sum(x)
    ranks.wait()
    found = {"writer": ranks.is_writer, "share": list(ranks.share(5)), "total": total.tolist(), "own": x.tolist()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
