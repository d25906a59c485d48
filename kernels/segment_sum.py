"""Sums and means over the segments of a packed batch: the same bits on every run, and no atomics.

    sum_s = Σ_{cu[s] <= n < cu[s + 1]} values_n          d values_n = d sum_{segment of n}

N values and S segments; N reads and S writes. Additions are made in fp64, so that a sequence of thousands of
token log-probs keeps every digit that fp32 can show: the loss is a difference of such sums. A running total
would be shorter, but one NaN or infinity in it would reach every later segment; here it stays in its own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def segment_sum_ref(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`segment_sum` as a plain loop, in the dtype of `values`: the truth in tests."""
    bounds = cu_seqlens.tolist()
    sums = [values[start:stop].sum() for start, stop in pairwise(bounds)]
    return torch.stack(sums) if sums else values.new_zeros(0)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.num_values = values.shape[0]
        return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens, initial=0, unsafe=True).to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (cu_seqlens,) = ctx.saved_tensors
        positions = torch.arange(ctx.num_values, device=grad.device)
        return grad[torch.bucketize(positions, cu_seqlens[1:], right=True)], None


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Deterministic sums over consecutive segments.

    Args:
        values: (N,) floating point.
        cu_seqlens: (S + 1,) int64 bounds, not decreasing, from 0 to N; equal neighbours are an empty segment.

    Returns:
        (S,) in the dtype of `values`, accumulated in fp64; 0 for an empty segment. Differentiable in
        `values`.

    Raises:
        ValueError: a shape or dtype is wrong, or (looked at on the CPU only, where it costs no wait) the
            bounds are.
    """
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(f"values: expected (N,) floating point, got {tuple(values.shape)} {values.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype != torch.int64:
        raise ValueError(f"cu_seqlens: expected (S + 1,) int64, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if cu_seqlens.device.type == "cpu":
        _check_bounds(cu_seqlens, values.shape[0])
    if cu_seqlens.shape[0] == 1 or values.shape[0] == 0:
        return values.new_zeros(cu_seqlens.shape[0] - 1) + values.sum()
    return _SegmentSum.apply(values, cu_seqlens.to(values.device))


def segment_mean(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`segment_sum` over the segments' lengths: deterministic means, and 0 for an empty segment."""
    lengths = cu_seqlens.diff().to(values.device).clamp(min=1)
    return segment_sum(values, cu_seqlens) / lengths


def _check_bounds(cu_seqlens: Tensor, num_values: int) -> None:
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != num_values or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens: expected bounds that rise from 0 to the number of values, {num_values}; "
            f"got {first} .. {last}{', decreasing in between' if first == 0 and last == num_values else ''}"
        )
