"""Run the backward of PyTorch's attention kernels, and nothing else, under deterministic algorithms.

They add up dQ in whatever order their blocks finish unless they are told otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node


def in_fixed_order(out: Tensor) -> Tensor:
    """`out`; the backward of the attention kernel that made it will be deterministic."""
    node = out.grad_fn if out.is_cuda else None
    # Otherwise attention is plain products, whose order is fixed, and which cuBLAS would refuse under that setting.
    if node is not None and "att" in node.name().lower():
        run_deterministically(node)
    return out


def run_deterministically(node: Node) -> None:
    """Run one node of a backward under deterministic algorithms."""
    node.register_prehook(_enter_determinism)
    node.register_hook(leave_determinism)


# PyTorch's settings before the attention backward that is running; empty while none is.
_set_before: list[tuple[int, bool]] = []


def _enter_determinism(*_: object) -> None:
    settings: Any = torch.utils.deterministic
    if not _set_before:
        _set_before.append((torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory))
    # A warning would leave the order as it is; and what the kernels write need not be filled beforehand.
    torch.set_deterministic_debug_mode("error")
    settings.fill_uninitialized_memory = False


def leave_determinism(*_: object) -> None:
    """Restore the settings; harmless if no backward is running."""
    settings: Any = torch.utils.deterministic
    if _set_before:
        mode, settings.fill_uninitialized_memory = _set_before.pop()
        torch.set_deterministic_debug_mode(mode)
