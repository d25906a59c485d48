"""Whether weights and the like are numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from dpo_fast.model.sharding import local


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold NaN or infinity. Waits for each device, once."""
    by_device = defaultdict(list)
    for name, tensor in ((name, local(tensor)) for name, tensor in tensors):
        if tensor.is_floating_point() and tensor.numel():
            # NaN is both its smallest and its largest number; a mask of finite ones would take a byte for each.
            smallest, largest = tensor.detach().aminmax()
            by_device[tensor.device].append((name, smallest.isfinite() & largest.isfinite()))
    bad = []
    for flags in by_device.values():
        good = torch.stack([flag for _, flag in flags]).tolist()
        bad += [name for (name, _), is_good in zip(flags, good, strict=True) if not is_good]
    return bad
