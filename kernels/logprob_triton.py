"""Triton kernels of `logprob.py`, where the maths is: logits are read once, and once more to be replaced by gradients.

forward_kernel reads N·V logits and writes 3·N numbers; gradient_kernel reads N·V logits and writes as many gradients,
in place if asked. A row's target is the anchor of its exponentials, as in `linear_logprob.py`; a row whose odds leave
the range reads its logits twice more, with their maximum as anchor. One row a program: no atomics, 64-bit offsets.
"""

# Kernels take pointers and numbers that Triton types at launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.backends import on_its_device
from dpo_fast.kernels.linear_logprob_torch import MAX_ODDS, log1p_odds

LOG2E = tl.constexpr(1.4426950408889634)
OPTIONS = {"BLOCK": 4096, "num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _odds(row_ptr, vocab, label, anchor, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        sums += tl.where((columns < vocab) & (columns != label), tl.exp2((z - anchor) * LOG2E), 0.0)
    return tl.sum(sums, 0)


@triton.jit
def forward_kernel(
    logits_ptr, label_ptr, odds_ptr, shift_ptr, target_ptr, vocab, stride, max_odds, BLOCK: tl.constexpr
):  # fmt: skip
    """S, anchor - z_y and z_y of one row."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.maximum(tl.load(label_ptr + row), 0)
    row_ptr = logits_ptr + row * stride
    z_target = tl.load(row_ptr + label).to(tl.float32)
    anchor = z_target
    odds = _odds(row_ptr, vocab, label, anchor, BLOCK)
    if (odds <= max_odds) == 0:
        peak = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(row_ptr + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
            peak = tl.maximum(peak, z)
        anchor = tl.max(peak, 0)
        odds = _odds(row_ptr, vocab, label, anchor, BLOCK)
    tl.store(odds_ptr + row, odds)
    tl.store(shift_ptr + row, anchor - z_target)
    tl.store(target_ptr + row, z_target)


@triton.jit
def gradient_kernel(
    logits_ptr, out_ptr, label_ptr, lse_ptr, miss_ptr, grad_ptr, vocab, stride, BLOCK: tl.constexpr
):  # fmt: skip
    """c (δ - p) of one row and one block of columns, `miss` = 1 - p_y; `out_ptr` may be `logits_ptr`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(label_ptr + row)
    grad = tl.where(label >= 0, tl.load(grad_ptr + row), 0.0)
    z = tl.load(logits_ptr + row * stride + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
    p = tl.exp2((z - tl.load(lse_ptr + row)) * LOG2E)
    p = tl.where(columns == label, -tl.load(miss_ptr + row), p)
    # A row without a target has no gradient, whatever its logits: 0 · NaN would be one.
    out = tl.where(label >= 0, -grad * p, 0.0)
    tl.store(out_ptr + row * stride + columns, out.to(out_ptr.dtype.element_ty), mask=columns < vocab)


@on_its_device
def forward(logits_NV: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) fp32 log-probs, 0 where `target` < 0, and (N,) log-sum-exp of the logits."""
    odds = torch.empty(target.shape, dtype=torch.float32, device=logits_NV.device)
    shift, z_target = torch.empty_like(odds), torch.empty_like(odds)
    if target.numel():
        forward_kernel[(target.shape[0],)](
            logits_NV, target, odds, shift, z_target, logits_NV.shape[1], logits_NV.stride(0), MAX_ODDS, **OPTIONS
        )
    logp = -log1p_odds(odds, shift).float()
    return torch.where(target >= 0, logp, 0.0), z_target - logp


@on_its_device
def backward(logits_NV: Tensor, target: Tensor, lse: Tensor, logp: Tensor, grad: Tensor, out: Tensor) -> None:
    """Write the gradient to `out`, which may be `logits_NV` and has its strides."""
    if target.numel():
        vocab = logits_NV.shape[1]
        gradient_kernel[(target.shape[0], triton.cdiv(vocab, OPTIONS["BLOCK"]))](
            logits_NV, out, target, lse, -torch.expm1(logp), grad.contiguous(), vocab, logits_NV.stride(0), **OPTIONS
        )
