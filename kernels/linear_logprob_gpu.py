"""The head on a GPU: exponentials by Triton, all other products by cuBLAS.

The maths and the names are those of `linear_logprob.py`. Two ways lead from hidden states to exponentials:

- *fused*: a product kernel whose epilogue makes them. N·V·2 bytes are written and nothing is read again; to score,
  nothing of size N x V is written at all.
- *sliced*: cuBLAS makes fp32 products of a slice of columns that stays in the L2 cache, and one pass does the rest: a
  better product where D is large, for one more trip through the L2.

E is kept row-major, rows padded to 16 bytes, so that the backward is two plain products. It is bf16 for bf16
and fp16 inputs (fp16 has not the range for unnormalised exponentials, so an fp16 model's gradients carry
bf16's 8 bits), fp32 for fp32. Rows whose odds leave the range are found and redone on the device, by two
launches that return at once where there are none: the host never waits.

A head without gradient needs no exponentials kept: d logp / d hidden is a row of its own, which the forward
makes block by block, so that the backward is a scaling. Two products in all, and one block of exponentials in
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dpo_fast.kernels.autotune import choose
from dpo_fast.kernels.linear_logprob_torch import MAX_ODDS, Head, log1p_odds
from dpo_fast.kernels.linear_logprob_triton import (
    FILL,
    FUSED_REDO,
    PEAK,
    REDO,
    add_slice,
    fused,
    fused_choices,
    scale_rows,
    target_logits,
)
from dpo_fast.kernels.token_stats import StatsSums, TokenStats

# The default where nothing was timed: beyond this hidden size cuBLAS's better product is expected to outweigh the
# slice's trip through the L2 cache.
FUSED_MAX_DIM = 3072
# Fewer rows are not worth a timing.
AUTOTUNE_MIN_ROWS = 1024
# fp32 products of a slice: with the exponentials' writes they stay within the 50 MB of L2 of an H100.
SLICE_BYTES = 32 * 2**20
# Partial sums of a block of rows, 4·V / BLOCK_N bytes a row, five times that with `TokenStats`.
PARTIAL_BYTES = 32 * 2**20
# Exponentials of a block that is not kept.
SCRATCH_BYTES = 256 * 2**20


@dataclass
class State:
    """What the forward leaves for the backward.

    Attributes:
        anchor: (N,) fp32, what was subtracted from a row's logits.
        odds: (N,) fp32, S.
        total: (N,) fp32, S + e^(z_y - anchor).
        slope: (N,) fp32, the softcap's slope at the target.
        kept: (K, V) finished exponentials of the first K rows, or None.
        unit_grad: (N, D) d logp / d hidden in the dtype of hidden, for a head without gradient; or None.
        sums: of `TokenStats`, or None where they are not wanted.
        lost: (N,) int32, 1 for rows that were made again in fp64.
    """

    anchor: Tensor
    odds: Tensor
    total: Tensor
    slope: Tensor
    kept: Tensor | None
    unit_grad: Tensor | None
    sums: StatsSums | None
    lost: Tensor


def forward(
    head: Head, hidden: Tensor, target: Tensor, memory_budget: int, *, frozen: bool = False, want_stats: bool = False
) -> tuple[Tensor, State, TokenStats | None]:
    """As `linear_logprob_torch.forward`, with weight and hidden of one dtype."""
    head, hidden = replace(head, weight=head.weight.contiguous()), hidden.contiguous()
    num_rows, vocab = hidden.shape[0], head.weight.shape[0]
    logit, slope = target_logits(head, hidden, target)
    sums = StatsSums.zeros_like(slope) if want_stats else None
    lost = torch.zeros_like(target, dtype=torch.int32)
    state = State(logit.float(), torch.zeros_like(slope), slope, slope, None, None, sums, lost)
    num_kept = 0 if frozen else min(num_rows, memory_budget // _row_bytes(hidden, vocab))
    if num_kept:
        state.kept = _empty_exponentials(hidden, num_kept, vocab)
    _make_blocks(head, hidden, target, state, slice(0, num_kept), state.kept)
    if frozen:
        _make_unit_grad(head, hidden, target, state, logit)
    else:
        _make_blocks(head, hidden, target, state, slice(num_kept, num_rows), None)
    shift = state.anchor - logit
    state.total = state.odds + torch.exp(-shift).float()
    stats = None if sums is None else sums.finish(state.odds, shift, state.anchor, vocab)
    return -log1p_odds(state.odds, shift).float(), state, stats


def backward(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    state: State,
    grad: Tensor,
    wanted: tuple[bool, bool, bool],
    main_grad: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `linear_logprob_torch.backward`. Exponentials that were not kept are made again, block by block."""
    kept, unit_grad = state.kept, state.unit_grad
    state.kept, state.unit_grad = None, None
    grad = grad.contiguous()
    if unit_grad is not None:
        scale_rows(unit_grad, grad, unit_grad)
        return unit_grad, None, None
    head, hidden = replace(head, weight=head.weight.contiguous()), hidden.contiguous()
    num_rows, vocab = hidden.shape[0], head.weight.shape[0]
    gradients = _Gradients(head, hidden, -head.scale * grad / state.total, wanted, main_grad)
    num_kept = 0 if kept is None else kept.shape[0]
    if kept is not None:
        gradients.add(slice(0, num_kept), kept)
    if num_kept < num_rows:
        scratch = _empty_exponentials(hidden, _scratch_rows(hidden, vocab), vocab) if kept is None else kept
        for start in range(num_kept, num_rows, scratch.shape[0]):
            rows = slice(start, min(start + scratch.shape[0], num_rows))
            e = scratch[: rows.stop - start]
            arguments = (head, hidden[rows], target[rows], state.anchor[rows])
            _exponentials(*arguments, torch.zeros_like(grad[rows]), e, None)
            fused(REDO, *arguments, e, lost=state.lost[rows])
            _finish(e, target[rows], state.odds[rows], state.slope[rows])
            gradients.add(rows, e)
    return gradients.hidden, gradients.finished_weight(), gradients.finished_bias()


def _row_bytes(hidden: Tensor, vocab: int) -> int:
    itemsize = _exponentials_dtype(hidden).itemsize
    return -(-vocab * itemsize // 16) * 16


def _exponentials_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float32 if hidden.dtype == torch.float32 else torch.bfloat16


def _empty_exponentials(hidden: Tensor, num_rows: int, vocab: int) -> Tensor:
    """(R, V), its rows 16 bytes aligned, as TMA stores and fast products want."""
    dtype = _exponentials_dtype(hidden)
    width = _row_bytes(hidden, vocab) // dtype.itemsize
    return torch.empty(num_rows, width, dtype=dtype, device=hidden.device)[:, :vocab]


def _scratch_rows(hidden: Tensor, vocab: int) -> int:
    return max(min(SCRATCH_BYTES // _row_bytes(hidden, vocab), hidden.shape[0]), 1)


def _make_blocks(head: Head, hidden: Tensor, target: Tensor, state: State, rows: slice, kept: Tensor | None) -> None:
    """Odds, anchors and, where there is room, finished exponentials of `rows`, in blocks bounded by their sums."""
    row_bytes = (4 if state.sums is None else 20) * -(-head.weight.shape[0] // FUSED_REDO["BLOCK_N"])
    step = max(PARTIAL_BYTES // row_bytes // 128 * 128, 128)
    for start in range(rows.start, rows.stop, step):
        block = slice(start, min(start + step, rows.stop))
        e = None if kept is None else kept[start - rows.start : block.stop - rows.start]
        anchor, odds = state.anchor[block], state.odds[block]
        sums = None if state.sums is None else state.sums.rows(block)
        _exponentials(head, hidden[block], target[block], anchor, odds, e, sums)
        state.lost[block] = ~(odds <= MAX_ODDS)
        _redo(head, hidden[block], target[block], state.lost[block], anchor, odds, e, sums)
        if e is not None:
            _finish(e, target[block], odds, state.slope[block])


def _exponentials(
    head: Head, hidden: Tensor, target: Tensor, anchor: Tensor, odds: Tensor, e: Tensor | None, sums: StatsSums | None
) -> None:
    """Write exponentials to `e`, if there is one, and their sums to `odds` and `sums`, by the way that is fastest."""
    arguments = (head, hidden, target, anchor, odds, e, sums)
    if hidden.dtype == torch.float32:
        _sliced(*arguments)
        return
    rich, stats = head.bias is not None or head.softcap is not None, sums is not None
    num_fused = len(fused_choices(hidden, rich=rich, stats=stats))
    ways: dict[str, Callable[[], None]] = {f"fused {i}": partial(_fused, i, *arguments) for i in range(num_fused)}
    ways["sliced"] = partial(_sliced, *arguments)
    (rows, dim), vocab = hidden.shape, head.weight.shape[0]
    default = "fused 0" if e is None or dim <= FUSED_MAX_DIM else "sliced"
    if rows < AUTOTUNE_MIN_ROWS:
        ways[default]()
        return
    # Sizes of packs vary from step to step: a choice serves all of about one size.
    about = 1 << (rows - 1).bit_length()
    key = f"head, N {about}, V {vocab}, D {dim}, {hidden.dtype}, rich {rich}, stats {stats}, kept {e is not None}"
    ways[choose(key, default, ways, hidden.device)]()


def _fused(
    choice: int,
    head: Head,
    hidden: Tensor,
    target: Tensor,
    anchor: Tensor,
    odds: Tensor,
    e: Tensor | None,
    sums: StatsSums | None,
) -> None:
    made = fused(FILL, head, hidden, target, anchor, e, stats=sums is not None, choice=choice)
    torch.sum(made[0], 0, out=odds)
    for out, stats in zip(sums or (), _reduce_stats(made), strict=False):
        out.copy_(stats)


def _sliced(
    head: Head, hidden: Tensor, target: Tensor, anchor: Tensor, odds: Tensor, e: Tensor | None, sums: StatsSums | None
) -> None:
    odds.zero_()
    if sums is not None:
        sums.clear_()
    vocab = head.weight.shape[0]
    width = max(SLICE_BYTES // (4 * hidden.shape[0]) // 128 * 128, 128)
    for start in range(0, vocab, width):
        z = product_fp32(hidden, head.weight[start : start + width].t())
        add_slice(z, start, head, target, anchor, odds, e, sums)


def _reduce_stats(made: Tensor) -> tuple[Tensor, ...]:
    """`StatsSums` of the kernel's partial results, whose last plane holds maxima; nothing where it made none."""
    return (*made[1:4].sum(1), *made[4:].amax(1))


def _redo(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    lost: Tensor,
    anchor: Tensor,
    odds: Tensor,
    e: Tensor | None,
    sums: StatsSums | None,
) -> None:
    """Do rows whose odds left the range again, in fp64 and with their largest logit as anchor; all in place."""
    peak = fused(PEAK, head, hidden, target, anchor, None, lost=lost)[0].amax(0)
    anchor.copy_(torch.where(lost != 0, peak, anchor))
    made = fused(REDO, head, hidden, target, anchor, e, lost=lost, stats=sums is not None)
    odds.copy_(torch.where(lost != 0, made[0].sum(0), odds))
    for out, stats in zip(sums or (), _reduce_stats(made), strict=False):
        out.copy_(torch.where(lost != 0, stats, out))


def _finish(e: Tensor, target: Tensor, odds: Tensor, slope: Tensor) -> None:
    """Put -S, times the softcap's slope, at the targets: what the products want there."""
    e.scatter_(1, target[:, None], (-odds * slope).to(e.dtype)[:, None])


def _make_unit_grad(head: Head, hidden: Tensor, target: Tensor, state: State, logit: Tensor) -> None:
    """d logp / d hidden of all rows, one block of exponentials at a time."""
    state.unit_grad = torch.empty_like(hidden)
    step = _scratch_rows(hidden, head.weight.shape[0])
    scratch = _empty_exponentials(hidden, step, head.weight.shape[0])
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, min(start + step, hidden.shape[0]))
        e = scratch[: rows.stop - start]
        _make_blocks(head, hidden, target, state, rows, e)
        total = state.odds[rows] + torch.exp(logit[rows] - state.anchor[rows]).float()
        _scaled_product(e, head.weight, -head.scale / total, state.unit_grad[rows])


def _scaled_product(e: Tensor, weight: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor ⊙ (E·W), in fp32 until it is rounded to the dtype of `out`."""
    weight = weight.to(e.dtype)
    step = max(SLICE_BYTES // (4 * weight.shape[1]), 128)
    for start in range(0, e.shape[0], step):
        rows = slice(start, start + step)
        scale_rows(product_fp32(e[rows], weight), factor[rows], out[rows])


class _Gradients:
    """Products of blocks of exponentials, summed in fp32 where there is more than one block."""

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
        # Where it is the caller's own, it is added to and not returned.
        self.weight, self.is_callers = main_grad, main_grad is not None
        self.bias = torch.zeros_like(head.bias, dtype=torch.float32) if wanted[2] and head.bias is not None else None

    def add(self, rows: slice, e: Tensor) -> None:
        """Add the block `rows` with finished exponentials `e`."""
        factor = self.factor[rows]
        if self.hidden is not None:
            _scaled_product(e, self.head.weight, factor, self.hidden[rows])
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
    # CPUs have no such product; tests come here, in Triton's interpreter.
    return a.float() @ b.float()
