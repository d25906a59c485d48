"""The head on a GPU: exponentials by Triton, all other products by cuBLAS.

The maths and the names are those of `linear_logprob.py`. Two ways lead from hidden states to exponentials:

- *fused*: a product kernel whose epilogue makes them. N·V·2 bytes are written and nothing is read again; to score,
  nothing of size N x V is written at all.
- *sliced*: cuBLAS makes fp32 products of a slice of columns that stays in the L2 cache, and one pass does the rest: one
  more trip through the L2, for GPUs on which the fused product is poor, and for fp32.

E is kept row-major, rows padded to 16 numbers, so that the backward is two plain products. It is bf16 for bf16
and fp16 inputs (fp16 has not the range for unnormalised exponentials, so an fp16 model's gradients carry
bf16's 8 bits), fp32 for fp32. Rows whose odds leave the range are found and redone on the device, by two
launches that return at once where there are none: the host never waits.

A head without gradient needs no exponentials kept: d logp / d hidden is a row of its own, which the forward
makes block by block, so that the backward is a scaling. Two products in all, and one block of exponentials in
memory.

Rows are cut into the same blocks, and a block goes the same way, whether it is scored, trained or trained under a
frozen head: sums are taken in one order, and a row's log-prob is the same to the bit in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dpo_fast.kernels.autotune import Trial, choose
from dpo_fast.kernels.backends import on_its_device
from dpo_fast.kernels.linear_logprob_torch import MAX_ODDS, Head, exponentials_, log1p_odds
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
# Exponentials of a block, where they are not kept.
BLOCK_BYTES = 512 * 2**20
# Partial sums of a block, 4·V / BLOCK_N bytes a row, five times that with `TokenStats`.
PARTIAL_BYTES = 32 * 2**20
# fp32 products of a slice: with the exponentials' writes they stay within the 50 MB of L2 of an H100.
SLICE_BYTES = 32 * 2**20
# Rows that a way is checked on before it may be chosen, and how far its exponentials and their sums may be off: they
# carry bf16's 8 bits, and the products' fp32 roundings in the exponent.
CHECKED_ROWS = 8
CHECKED_ERROR = 2e-2


# Writes exponentials of hidden states, targets and anchors to `e`, if there is one, and sums to `odds` and `sums`.
Way = Callable[[Head, Tensor, Tensor, Tensor, Tensor, Tensor | None, StatsSums | None], None]


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


@on_its_device
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
        scratch = kept if kept is not None else _empty_block(hidden, vocab)
        for rows in _pieces(num_kept, num_rows, scratch.shape[0]):
            e = scratch[: rows.stop - rows.start]
            _make_again(head, hidden, target, state, rows, e)
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
    """Exponentials of a block, or of all rows where there are fewer."""
    return _empty_exponentials(hidden, min(_block_rows(hidden, vocab, want_stats=want_stats), len(hidden)), vocab)


def _pieces(start: int, stop: int, step: int) -> Iterator[slice]:
    """start .. stop in slices of `step`, the last of what is left."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _num_kept(hidden: Tensor, vocab: int, memory_budget: int, *, want_stats: bool) -> int:
    """Rows whose exponentials are kept: whole blocks of them, so that the budget moves no block's border."""
    room = memory_budget // _row_bytes(hidden, vocab)
    step = _block_rows(hidden, vocab, want_stats=want_stats)
    return hidden.shape[0] if hidden.shape[0] <= room else room // step * step


def _make_blocks(head: Head, hidden: Tensor, target: Tensor, state: State, rows: slice, kept: Tensor | None) -> None:
    """Odds, anchors and, where there is room, finished exponentials of `rows`, which begin at a block's border."""
    step = _block_rows(hidden, head.weight.shape[0], want_stats=state.sums is not None)
    for block in _pieces(rows.start, rows.stop, step):
        e = None if kept is None else kept[block.start - rows.start : block.stop - rows.start]
        anchor, odds = state.anchor[block], state.odds[block]
        sums = None if state.sums is None else state.sums.rows(block)
        arguments = (head, hidden[block], target[block], anchor)
        _exponentials(*arguments, odds, e, sums, is_whole=block.stop - block.start == step)
        state.lost[block] = ~(odds <= MAX_ODDS)
        _redo(*arguments, state.lost[block], odds, e, sums)
        if e is not None:
            _finish(e, target[block], odds, state.slope[block])


def _make_again(head: Head, hidden: Tensor, target: Tensor, state: State, rows: slice, e: Tensor) -> None:
    """Finished exponentials of `rows` in `e`, from the anchors that the forward found."""
    step = _block_rows(hidden, head.weight.shape[0])
    for block in _pieces(rows.start, rows.stop, step):
        part = e[block.start - rows.start : block.stop - rows.start]
        arguments = (head, hidden[block], target[block], state.anchor[block])
        odds = torch.empty_like(state.odds[block])
        _exponentials(*arguments, odds, part, None, is_whole=block.stop - block.start == step)
        fused(REDO, *arguments, part, lost=state.lost[block])
        _finish(part, target[block], state.odds[block], state.slope[block])


def _exponentials(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    anchor: Tensor,
    odds: Tensor,
    e: Tensor | None,
    sums: StatsSums | None,
    *,
    is_whole: bool,
) -> None:
    """Write exponentials to `e`, if there is one, and their sums to `odds` and `sums`.

    Whole blocks go the way that is fastest, others the default one, which is not worth a timing: so the way depends on
    the block alone, not on which blocks came before it.
    """
    ways = _ways(head, hidden, want_stats=sums is not None)
    name = next(iter(ways))
    if is_whole and len(ways) > 1:
        vocab, dim = head.weight.shape
        epilogue = f"bias {head.bias is not None}, softcap {head.softcap is not None}, stats {sums is not None}"
        key = f"head, rows {len(hidden)}, V {vocab}, D {dim}, {hidden.dtype}, {epilogue}"
        trial = partial(_trial, ways, head, hidden, target, anchor, want_stats=sums is not None)
        name = choose(key, list(ways), hidden.device, trial)
    ways[name](head, hidden, target, anchor, odds, e, sums)


def _ways(head: Head, hidden: Tensor, *, want_stats: bool) -> dict[str, Way]:
    """All that can be done here, the default first."""
    if hidden.dtype == torch.float32:
        return {"sliced": _sliced}
    has_epilogue = head.bias is not None or head.softcap is not None
    choices = fused_choices(hidden, rich=has_epilogue, stats=want_stats)
    return {**{name: partial(_fused, name) for name in choices}, "sliced": _sliced}


def _trial(
    ways: dict[str, Way], head: Head, hidden: Tensor, target: Tensor, anchor: Tensor, *, want_stats: bool
) -> Trial | None:
    """The ways on a block of exponentials of their own, and what a few of its rows are in plain PyTorch.

    None where none of these rows could tell right from wrong.
    """
    vocab = head.weight.shape[0]
    e, odds = _empty_exponentials(hidden, len(hidden), vocab), torch.empty_like(anchor)
    sums = StatsSums.zeros_like(odds) if want_stats else None
    calls = {name: partial(way, head, hidden, target, anchor, odds, e, sums) for name, way in ways.items()}
    rows = torch.linspace(0, len(hidden) - 1, min(CHECKED_ROWS, len(hidden)), device=hidden.device).long()
    true_e = torch.empty(len(rows), vocab, dtype=head.dtype, device=hidden.device)
    true_odds = torch.zeros_like(true_e[:, 0])
    true_sums = StatsSums.zeros_like(true_odds) if want_stats else None
    some_hidden, some_anchor, some_target = hidden[rows].to(head.dtype), anchor[rows], target[rows]
    for columns in head.columns(len(rows)):
        tile = (true_e[:, columns], head, some_hidden, *head.tile(columns), some_anchor, some_target - columns.start)
        true_odds += exponentials_(*tile, true_sums)
    # Rows out of range are not the ways' to get right: they are made again. Nor are rows that are not finite.
    near = (true_odds <= MAX_ODDS) & true_e.isfinite().all(1)
    if not near.any():
        return None
    places = rows[near]

    def is_right(name: str) -> bool:
        for x in (e, odds, *(sums or ())):
            x.fill_(-1)  # which no exponential is
        calls[name]()
        pairs = [(e[places].to(head.dtype), true_e[near]), (odds[places, None], true_odds[near, None])]
        if sums is not None and true_sums is not None:
            got, want = sums.rows(places), true_sums.rows(near)
            pairs += [(got.square[:, None], want.square[:, None]), (got.energy[:, None], want.energy[:, None])]
            # These may be near 0 in a row, and are as large in all others: compared as one.
            pairs.append((torch.cat([got.shifted, got.peak])[None], torch.cat([want.shifted, want.peak])[None]))
        # Of the other rows it is known that all is written, and that exponentials are finite where their sum is.
        unwritten = (e.amin(1) < 0) | (odds < 0)
        whole = e.sum(1, dtype=torch.float32).isfinite() | ~(odds <= MAX_ODDS)
        return all(_are_close(*pair) for pair in pairs) and bool(whole.all() and not unwritten.any())

    return Trial(calls, is_right)


def _are_close(got: Tensor, want: Tensor) -> bool:
    """Row by row: exponentials of one row may be larger than all of another's by many digits."""
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return False
    got, want = got.where(finite, 0.0), want.where(finite, 0.0)
    return bool(((got - want).norm(dim=1) <= CHECKED_ERROR * want.norm(dim=1) + 1e-30).all())


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
    width = max(SLICE_BYTES // (4 * hidden.shape[0]) // 128 * 128, 128)
    # Where nobody wants them they are written all the same, over and over at one place: a kernel without that store
    # would be compiled to add up in another order.
    unwanted = _empty_exponentials(hidden, hidden.shape[0] if e is None else 0, width)
    for columns in _pieces(0, vocab, width):
        z = product_fp32(hidden, head.weight[columns].t())
        part = unwanted[:, : z.shape[1]] if e is None else e[:, columns]
        add_slice(z, columns.start, head, target, anchor, odds, part, sums)
        del z  # before the next one is made


def _reduce_stats(made: Tensor) -> tuple[Tensor, ...]:
    """`StatsSums` of the kernel's partial results, whose last plane holds maxima; nothing where it made none."""
    return (*made[1:4].sum(1), *made[4:].amax(1))


def _redo(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    anchor: Tensor,
    lost: Tensor,
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
    scratch = _empty_block(hidden, head.weight.shape[0], want_stats=state.sums is not None)
    for rows in _pieces(0, hidden.shape[0], max(len(scratch), 1)):
        e = scratch[: rows.stop - rows.start]
        _make_blocks(head, hidden, target, state, rows, e)
        total = state.odds[rows] + torch.exp(logit[rows] - state.anchor[rows]).float()
        _scaled_product(e, head.weight, -head.scale / total, state.unit_grad[rows])


def _scaled_product(e: Tensor, weight: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor ⊙ (E·W), in fp32 until it is rounded to the dtype of `out`."""
    weight = weight.to(e.dtype)
    step = max(SLICE_BYTES // (4 * weight.shape[1]), 128)
    for rows in _pieces(0, e.shape[0], step):
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
