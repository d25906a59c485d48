"""Products of the head on a GPU by cuBLAS, and the gradients that are made of them; see `linear_logprob_gpu.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpo_fast.kernels.head import Head
from dpo_fast.kernels.linear_logprob_triton import scale_rows

# fp32 products of a slice: with the exponentials' writes they stay within the 50 MB of L2 of an H100.
SLICE_BYTES = 32 * 2**20


def pieces(start: int, stop: int, step: int) -> Iterator[slice]:
    """start .. stop in slices of `step`; the last may be shorter."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def slice_width(num_rows: int) -> int:
    """Columns of a slice of `num_rows` rows."""
    return max(SLICE_BYTES // (4 * num_rows) // 128 * 128, 128)


def scaled_product(e: Tensor, weight: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor ⊙ (E·W), in fp32 until it is rounded to the dtype of `out`."""
    weight = weight.to(e.dtype)
    step = max(SLICE_BYTES // (4 * weight.shape[1]), 128)
    for rows in pieces(0, e.shape[0], step):
        scale_rows(product_fp32(e[rows], weight), factor[rows], out[rows])


class Gradients:
    """Products of blocks of exponentials, summed in fp32 if there is more than one block."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        factor: Tensor,
        wanted: tuple[bool, bool, bool],
        main_grad: Tensor | None,
    ) -> None:
        self.head, self.rows, self.factor = head, hidden, factor
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.wants_weight = wanted[1]
        # A buffer of the caller's is added to and not returned.
        self.weight, self.is_callers = main_grad, main_grad is not None
        self.bias = torch.zeros_like(head.bias, dtype=torch.float32) if wanted[2] and head.bias is not None else None

    def add(self, rows: slice, e: Tensor) -> None:
        """Add the block `rows` with finished exponentials `e`."""
        factor = self.factor[rows]
        if self.hidden is not None:
            scaled_product(e, self.head.weight, factor, self.hidden[rows])
        if self.wants_weight:
            scaled = torch.empty_like(self.rows[rows], dtype=e.dtype)
            scale_rows(self.rows[rows], factor, scaled)
            self._add_weight(e, scaled)
        if self.bias is not None:
            # The factor in two parts, so that E's own rounding is the only one.
            high = factor.to(e.dtype)
            parts = torch.stack((high, (factor - high).to(e.dtype)), 1)
            self.bias += product_fp32(e.t(), parts).sum(1)

    def _add_weight(self, e: Tensor, scaled: Tensor) -> None:
        if not self.is_callers and e.shape[0] == self.rows.shape[0] and e.dtype == self.head.weight.dtype:
            self.weight = torch.mm(e.t(), scaled)
            return
        if self.weight is None:
            self.weight = torch.zeros_like(self.head.weight, dtype=torch.float32)
        if e.is_cuda and e.dtype != torch.float32:
            torch.addmm(self.weight, e.t(), scaled, out_dtype=torch.float32, out=self.weight)
        else:
            self.weight += product_fp32(e.t(), scaled)

    def finished_weight(self) -> Tensor | None:
        """(V, D) in the head's dtype, or None if it is not wanted."""
        if not self.wants_weight or self.is_callers:
            return None
        return torch.zeros_like(self.head.weight) if self.weight is None else self.weight.to(self.head.weight.dtype)

    def finished_bias(self) -> Tensor | None:
        """(V,) in the bias's dtype, or None if it is not wanted."""
        return None if self.bias is None or self.head.bias is None else self.bias.to(self.head.bias.dtype)


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a·b in fp32 from operands of any precision; bf16 results would cost three digits."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    # CPUs have no such product; tests in Triton's interpreter need one.
    return a.float() @ b.float()
