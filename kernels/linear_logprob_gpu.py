"""The head on a GPU: exponentials by Triton, all other products by cuBLAS.

The maths and the names are those of `linear_logprob.py`. Two variants lead from hidden states to exponentials:

- *fused*: a product kernel whose epilogue makes them. N·V·2 bytes are written and nothing is read again; to score,
  nothing of size N x V is written at all.
- *sliced*: cuBLAS makes fp32 products of a slice of columns that stays in the L2 cache, and one pass does the rest: one
  more trip through the L2, for GPUs on which the fused product is slow, and for fp32.

E is kept row-major, rows padded to 16 numbers, so that the backward is two plain products. It is bf16 for bf16
and fp16 inputs (fp16 has not the range for unnormalised exponentials, so an fp16 model's gradients carry
bf16's 8 bits), fp32 for fp32. Rows whose odds leave the range are found and recomputed on the device, by two
launches that return at once if there are none: the host never waits.

A head without gradient needs no exponentials kept: the forward computes d logp / d hidden block by block, so that the
backward only scales it. Two products in all, and one block of exponentials in
memory.

Rows are cut into the same blocks, and a block takes the same variant, whether it is scored, trained or trained under a
frozen head: sums are taken in one order, and a row's log-prob is bit-identical in all three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dpo_fast.kernels.autotune import Trial, choose
from dpo_fast.kernels.backends import on_its_device
from dpo_fast.kernels.head import Head
from dpo_fast.kernels.linear_logprob_products import Gradients, pieces, product_fp32, scaled_product, slice_width
from dpo_fast.kernels.linear_logprob_torch import MAX_ODDS, log1p_odds
from dpo_fast.kernels.linear_logprob_trial import make_trial
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

# Rows of a block: a power of two, which fills the tiles of a product.
MAX_BLOCK_ROWS = 1024
# Exponentials of a block, if they are not kept.
BLOCK_BYTES = 512 * 2**20
# Partial sums of a block, 4·V / BLOCK_N bytes a row, five times that with `TokenStats`.
PARTIAL_BYTES = 32 * 2**20
# Writes exponentials of hidden states, targets and anchors to `e`, if there is one, and sums to `odds` and `sums`.
Variant = Callable[[Head, Tensor, Tensor, Tensor, Tensor, Tensor | None, StatsSums | None], None]


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
        sums: of `TokenStats`, or None if they are not wanted.
        out_of_range: (N,) int32, 1 for rows that were recomputed in fp64.
    """

    anchor: Tensor
    odds: Tensor
    total: Tensor
    slope: Tensor
    kept: Tensor | None
    unit_grad: Tensor | None
    sums: StatsSums | None
    out_of_range: Tensor


@on_its_device
def forward(
    head: Head, hidden: Tensor, target: Tensor, memory_budget: int, *, frozen: bool = False, want_stats: bool = False
) -> tuple[Tensor, State, TokenStats | None]:
    """As `linear_logprob_torch.forward`, with weight and hidden of one dtype."""
    head, hidden = replace(head, weight=head.weight.contiguous()), hidden.contiguous()
    num_rows, vocab = hidden.shape[0], head.weight.shape[0]
    logit, slope = target_logits(head, hidden, target)
    sums = StatsSums.zeros_like(slope) if want_stats else None
    out_of_range = torch.zeros_like(target, dtype=torch.int32)
    state = State(logit.float(), torch.zeros_like(slope), slope, slope, None, None, sums, out_of_range)
    num_kept = 0 if frozen else _num_kept(hidden, vocab, memory_budget, want_stats=want_stats)
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


@on_its_device
def backward(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    state: State,
    grad: Tensor,
    wanted: tuple[bool, bool, bool],
    main_grad: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `linear_logprob_torch.backward`. Exponentials that were not kept are recomputed, block by block."""
    kept, unit_grad = state.kept, state.unit_grad
    state.kept, state.unit_grad = None, None
    grad = grad.contiguous()
    if unit_grad is not None:
        scale_rows(unit_grad, grad, unit_grad)
        return unit_grad, None, None
    head, hidden = replace(head, weight=head.weight.contiguous()), hidden.contiguous()
    num_rows, vocab = hidden.shape[0], head.weight.shape[0]
    gradients = Gradients(head, hidden, -head.scale * grad / state.total, wanted, main_grad)
    num_kept = 0 if kept is None else kept.shape[0]
    if kept is not None:
        gradients.add(slice(0, num_kept), kept)
    if num_kept < num_rows:
        scratch = kept if kept is not None else _empty_block(hidden, vocab)
        for rows in pieces(num_kept, num_rows, scratch.shape[0]):
            e = scratch[: rows.stop - rows.start]
            _recompute(head, hidden, target, state, rows, e)
            gradients.add(rows, e)
    return gradients.hidden, gradients.finished_weight(), gradients.finished_bias()


def _row_bytes(hidden: Tensor, vocab: int) -> int:
    """Of exponentials: 16 numbers at a time, as aligned as Triton asks for, whatever the vocabulary."""
    return -(-vocab // 16) * 16 * _exponentials_dtype(hidden).itemsize


def _exponentials_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float32 if hidden.dtype == torch.float32 else torch.bfloat16


def _empty_exponentials(hidden: Tensor, num_rows: int, vocab: int) -> Tensor:
    """(R, V), its rows aligned as TMA stores and fast products want."""
    dtype = _exponentials_dtype(hidden)
    width = _row_bytes(hidden, vocab) // dtype.itemsize
    return torch.empty(num_rows, width, dtype=dtype, device=hidden.device)[:, :vocab]


def _block_rows(hidden: Tensor, vocab: int, *, want_stats: bool = False) -> int:
    """Rows of a block: as many as its exponentials and its partial sums have room for."""
    partial_bytes = (20 if want_stats else 4) * -(-vocab // FUSED_REDO["BLOCK_N"])
    rows = min(MAX_BLOCK_ROWS, BLOCK_BYTES // _row_bytes(hidden, vocab), PARTIAL_BYTES // partial_bytes)
    return 1 << (max(rows, 1).bit_length() - 1)


def _empty_block(hidden: Tensor, vocab: int, *, want_stats: bool = False) -> Tensor:
    """Exponentials of a block, or of all rows if there are fewer."""
    return _empty_exponentials(hidden, min(_block_rows(hidden, vocab, want_stats=want_stats), len(hidden)), vocab)


def _num_kept(hidden: Tensor, vocab: int, memory_budget: int, *, want_stats: bool) -> int:
    """Rows whose exponentials are kept: whole blocks of them, so that the budget moves no block's border."""
    room = memory_budget // _row_bytes(hidden, vocab)
    step = _block_rows(hidden, vocab, want_stats=want_stats)
    return hidden.shape[0] if hidden.shape[0] <= room else room // step * step


def _make_blocks(head: Head, hidden: Tensor, target: Tensor, state: State, rows: slice, kept: Tensor | None) -> None:
    """Odds, anchors and, given `kept`, finished exponentials of `rows`, which begin at a block's border."""
    step = _block_rows(hidden, head.weight.shape[0], want_stats=state.sums is not None)
    for block in pieces(rows.start, rows.stop, step):
        e = None if kept is None else kept[block.start - rows.start : block.stop - rows.start]
        anchor, odds = state.anchor[block], state.odds[block]
        sums = None if state.sums is None else state.sums.rows(block)
        arguments = (head, hidden[block], target[block], anchor)
        _exponentials(*arguments, odds, e, sums)
        state.out_of_range[block] = ~(odds <= MAX_ODDS)
        _redo(*arguments, state.out_of_range[block], odds, e, sums)
        if e is not None:
            _finish(e, target[block], odds, state.slope[block])


def _recompute(head: Head, hidden: Tensor, target: Tensor, state: State, rows: slice, e: Tensor) -> None:
    """Finished exponentials of `rows` in `e`, from the anchors that the forward found."""
    step = _block_rows(hidden, head.weight.shape[0])
    for block in pieces(rows.start, rows.stop, step):
        part = e[block.start - rows.start : block.stop - rows.start]
        arguments = (head, hidden[block], target[block], state.anchor[block])
        odds = torch.empty_like(state.odds[block])
        _exponentials(*arguments, odds, part, None)
        fused(REDO, *arguments, part, out_of_range=state.out_of_range[block])
        _finish(part, target[block], state.odds[block], state.slope[block])


def _exponentials(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    anchor: Tensor,
    odds: Tensor,
    e: Tensor | None,
    sums: StatsSums | None,
) -> None:
    """Write exponentials to `e`, if there is one, and their sums to `odds` and `sums`.

    Full blocks take the fastest variant, shorter ones the default, since they are not worth timing: so the variant
    depends on the block alone, not on the blocks before it.
    """
    want_stats, (vocab, dim) = sums is not None, head.weight.shape
    variants = _variants(head, hidden, want_stats=want_stats)
    name = next(iter(variants))
    if head.autotune and len(variants) > 1 and len(hidden) == _block_rows(hidden, vocab, want_stats=want_stats):
        epilogue = f"bias {head.bias is not None}, softcap {head.softcap is not None}, stats {want_stats}"
        key = f"head, rows {len(hidden)}, V {vocab}, D {dim}, {hidden.dtype}, {epilogue}"

        def trial() -> Trial | None:
            scratch = _empty_exponentials(hidden, len(hidden), vocab)
            return make_trial(variants, head, hidden, target, anchor, scratch, want_stats=want_stats)

        name = choose(key, list(variants), hidden.device, trial)
    variants[name](head, hidden, target, anchor, odds, e, sums)


def _variants(head: Head, hidden: Tensor, *, want_stats: bool) -> dict[str, Variant]:
    """All that can run here, the default first."""
    if hidden.dtype == torch.float32:
        return {"sliced": _sliced}
    choices = fused_choices(hidden, has_epilogue=head.has_epilogue, stats=want_stats)
    return {**{name: partial(_fused, name) for name in choices}, "sliced": _sliced}


def _fused(
    choice: str,
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
    width = slice_width(hidden.shape[0])
    # Unwanted exponentials are written nevertheless, all slices to the same memory: without that store the kernel would
    # be compiled to add in another order.
    unwanted = _empty_exponentials(hidden, hidden.shape[0] if e is None else 0, width)
    for columns in pieces(0, vocab, width):
        z = product_fp32(hidden, head.weight[columns].t())
        part = unwanted[:, : z.shape[1]] if e is None else e[:, columns]
        add_slice(z, columns.start, head, target, anchor, odds, part, sums)
        del z  # before the next one is made


def _reduce_stats(made: Tensor) -> tuple[Tensor, ...]:
    """`StatsSums` of the kernel's partial results, whose last plane holds maxima; empty if it made none."""
    return (*made[1:4].sum(1), *made[4:].amax(1))


def _redo(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    anchor: Tensor,
    out_of_range: Tensor,
    odds: Tensor,
    e: Tensor | None,
    sums: StatsSums | None,
) -> None:
    """Recompute rows whose odds left the range, in fp64 with their largest logit as anchor; all in place."""
    peak = fused(PEAK, head, hidden, target, anchor, None, out_of_range=out_of_range)[0].amax(0)
    anchor.copy_(torch.where(out_of_range != 0, peak, anchor))
    made = fused(REDO, head, hidden, target, anchor, e, out_of_range=out_of_range, stats=sums is not None)
    odds.copy_(torch.where(out_of_range != 0, made[0].sum(0), odds))
    for out, stats in zip(sums or (), _reduce_stats(made), strict=False):
        out.copy_(torch.where(out_of_range != 0, stats, out))


def _finish(e: Tensor, target: Tensor, odds: Tensor, slope: Tensor) -> None:
    """Put -S, times the softcap's slope, at the targets: what the products want there."""
    e.scatter_(1, target[:, None], (-odds * slope).to(e.dtype)[:, None])


def _make_unit_grad(head: Head, hidden: Tensor, target: Tensor, state: State, logit: Tensor) -> None:
    """d logp / d hidden of all rows, one block of exponentials at a time."""
    state.unit_grad = torch.empty_like(hidden)
    scratch = _empty_block(hidden, head.weight.shape[0], want_stats=state.sums is not None)
    for rows in pieces(0, hidden.shape[0], max(len(scratch), 1)):
        e = scratch[: rows.stop - rows.start]
        _make_blocks(head, hidden, target, state, rows, e)
        total = state.odds[rows] + torch.exp(logit[rows] - state.anchor[rows]).float()
        scaled_product(e, head.weight, -head.scale / total, state.unit_grad[rows])
