"""Triton kernels of `gather_rows.py`, where the maths is: one program a row and a block of its numbers.

gather_kernel reads and writes K·C numbers, sum_kernel reads K·C and writes T·C. x may be a transposed view, as keys are
when they come out of a model: (T, H, d) with any strides but d's, which is 1.
"""

# Kernels take pointers and numbers that Triton types at launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.backends import on_its_device

if TYPE_CHECKING:
    from dpo_fast.kernels.gather_rows import RowIndex

MAX_BLOCK = 1024
# Triton 3.10 changes the default; stated, so that it does not warn.
FP_FUSION = {"enable_fp_fusion": True}


@triton.jit
def gather_kernel(x_ptr, index_ptr, out_ptr, width, dim, row_stride, head_stride, BLOCK: tl.constexpr):
    """out[k] = x[index[k]], where number c of a row lies in head c / dim."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    source = tl.load(index_ptr + row)
    place = source * row_stride + (columns // dim).to(tl.int64) * head_stride + columns % dim
    tl.store(out_ptr + row * width + columns, tl.load(x_ptr + place, mask=inside), mask=inside)


@triton.jit
def sum_kernel(grad_ptr, order_ptr, bounds_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """out[t] = sum of grad[order[i]] over the row's places i, in order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(bounds_ptr + row), tl.load(bounds_ptr + row + 1)):
        place = tl.load(order_ptr + i)
        total += tl.load(grad_ptr + place * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def _grid(num_rows: int, width: int) -> tuple[tuple[int, int], int]:
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    return (num_rows, triton.cdiv(width, block)), block


@on_its_device
def forward(x: Tensor, rows: RowIndex) -> Tensor:
    """(K, ...) gathered rows, contiguous."""
    num_rows, tail = rows.index.shape[0], x.shape[1:]
    heads = x.reshape(x.shape[0], -1, tail[-1] if tail else 1) if x.dim() != 3 else x
    heads = heads if heads.stride(2) == 1 else heads.contiguous()
    out = torch.empty(num_rows, *tail, dtype=x.dtype, device=x.device)
    if out.numel():
        grid, block = _grid(num_rows, tail.numel())
        gather_kernel[grid](
            heads, rows.index, out, tail.numel(), heads.shape[2], heads.stride(0), heads.stride(1), BLOCK=block,
            **FP_FUSION,
        )  # fmt: skip
    return out


@on_its_device
def backward(grad: Tensor, rows: RowIndex) -> Tensor:
    """(T, ...) sums over the places of each row; `grad` is contiguous."""
    num_rows, tail = rows.bounds.shape[0] - 1, grad.shape[1:]
    out = torch.empty(num_rows, *tail, dtype=grad.dtype, device=grad.device)
    if out.numel():
        grid, block = _grid(num_rows, tail.numel())
        sum_kernel[grid](grad, rows.order, rows.bounds, out, tail.numel(), BLOCK=block, **FP_FUSION)
    return out
