"""Rows of a pack gathered for attention, and the sum back: a prompt's keys serve the prompt and all of its answers.

    out_k = x[index_k]                    d x_t = Σ_{k: index_k = t} d out_k

The sum runs over k in rising order, in fp32, and every row is written by one program: no atomics, the same bits every
time (PyTorch's own backward adds atomically on a GPU). T rows, K gathered rows, C numbers a row: 2·K·C numbers are
moved forward and (K + T)·C backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_fast.kernels.backends import Backend, choose_backend


@dataclass(frozen=True)
class RowIndex:
    """Which rows are gathered, and for each row where it went.

    Attributes:
        index: (K,) int64, rows of x.
        order: (K,) int64, places in `index` sorted by row, places of a row in rising order.
        bounds: (T + 1,) int64, where each row's places begin in `order`.
    """

    index: Tensor
    order: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, index: Tensor, num_rows: int) -> RowIndex:
        """The way back of (K,) int64 `index` into `num_rows` rows."""
        order = torch.sort(index, stable=True).indices
        # Counted by additions of integers, which have no order; bincount would wait for a GPU.
        counts = index.new_zeros(num_rows).index_add_(0, index, torch.ones_like(index))
        return cls(index, order, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def forward(x: Tensor, rows: RowIndex) -> Tensor:
    """(K, ...) gathered rows, contiguous."""
    return x.index_select(0, rows.index)


def backward(grad: Tensor, rows: RowIndex) -> Tensor:
    """(T, ...) sums over the places of each row."""
    sums = grad.new_zeros(
        rows.bounds.shape[0] - 1, *grad.shape[1:], dtype=torch.promote_types(grad.dtype, torch.float32)
    )
    # A CPU adds in the order of the index.
    return sums.index_add_(0, rows.index, grad.to(sums.dtype)).to(grad.dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: RowIndex, backend: str) -> Tensor:
        ctx.rows, ctx.module = rows, _implementation(backend)
        return ctx.module.forward(x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.module.backward(grad.contiguous(), ctx.rows), None, None


def _implementation(backend: str) -> Any:
    return import_module(f"dpo_fast.kernels.gather_rows{'' if backend == 'torch' else '_triton'}")


def gather_rows(x: Tensor, rows: RowIndex, *, backend: Backend = "auto") -> Tensor:
    """Rows of `x`, differentiable in `x`.

    Args:
        x: (T, ...) floating point, any strides.
        rows: which; every row may be taken any number of times.
        backend: "torch", "triton" (CUDA), or "auto".

    Returns:
        (K, ...), contiguous.
    """
    if x.shape[0] != rows.bounds.shape[0] - 1:
        raise ValueError(f"x: expected {rows.bounds.shape[0] - 1} rows as the index was made for, got {x.shape[0]}")
    return _GatherRows.apply(x, rows, choose_backend(backend, x))
