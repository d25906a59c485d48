"""The head in plain PyTorch: tiles of columns that stay in the cache, two products in the backward.

The maths and the names are those of `linear_logprob.py`. Products and exponentials are made in fp32 (fp64 for
fp64 inputs) whatever the inputs' dtype. Columns are the outer loop, so that a tile of the head is read, and
converted, once for all rows; a tile of R x C exponentials is made by one product and three passes while it is
in the cache:

    forward     V / C times: z = H·W_cᵀ;  E = e^(z - anchor);  E[i, y_i] = 0;  S += Σ E
    backward    V / C times: dH += E·W_c;  dW_c = Eᵀ·(v ⊙ H)

A kept row's tiles lie one after the other, each contiguous. Rows over the memory budget keep S alone, and
recompute their tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from dpo_fast.kernels.head import Head
from dpo_fast.kernels.token_stats import StatsSums, TokenStats

# 2^21 fp32 exponentials, 8 MiB: a share of the last-level cache, and enough for a product at full speed.
TILE = 2**21
MAX_ROWS = 1024
# 2^21 fp32 weights, 8 MiB, is the largest slice of a half-precision head that is converted at a time.
WEIGHT_TILE = 2**21
# 2^20 fp64 numbers, 8 MiB, are what fp64 gets of rows or weights at a time.
EXACT_TILE = 2**20
# 32 nats against the target. Beyond, fp32's roundings of z - z_y would show in the fifth digit behind the point: such
# rows, which are very rare, are recomputed in fp64 with their largest logit as anchor.
MAX_ODDS = 2.0**46


def column_tiles(head: Head, num_rows: int) -> list[slice]:
    """Tiles of the vocabulary for blocks of up to `num_rows` rows."""
    vocab, dim = head.weight.shape
    width = TILE // min(max(num_rows, 1), MAX_ROWS)
    if head.weight.dtype != head.dtype:
        width = min(width, max(WEIGHT_TILE // dim, 64))
    return [slice(start, min(start + width, vocab)) for start in range(0, vocab, width)]


def target_logits(head: Head, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
    """(R,) fp64 logit of every row's target and the softcap's slope there: one dot product a row."""
    step = max(EXACT_TILE // hidden.shape[1], 1)
    pieces = zip(hidden.split(step), target.split(step), strict=True)
    product = torch.cat([(rows.double() * head.weight[ids].double()).sum(1) for rows, ids in pieces])
    if head.bias is not None:
        product += head.bias[target].double()
    product *= head.scale if head.softcap is None else 1 / head.softcap
    slope = head.cap_(product)
    return product, slope


def row_blocks(num_rows: int, num_kept: int) -> list[slice]:
    """Blocks of at most MAX_ROWS rows, about equal; none spans the border between kept and other rows."""
    blocks = [] if num_rows else [slice(0, 0)]
    for start, stop in ((0, num_kept), (num_kept, num_rows)):
        count = -(-(stop - start) // MAX_ROWS)
        bounds = [start + (stop - start) * i // max(count, 1) for i in range(count + 1)]
        blocks += [slice(a, b) for a, b in pairwise(bounds)]
    return blocks


@dataclass
class State:
    """N rows cut into blocks, the vocabulary cut into tiles, and the results of the forward.

    Attributes:
        blocks: slices of rows.
        columns: slices of the vocabulary.
        anchor: (N,) what is subtracted from a row's logits: a rounded z_y, or the largest logit.
        odds: (N,) S, the sum of a row's exponentials without its target's.
        total: (N,) S + e^(z_y - anchor).
        kept: exponentials of the first blocks, one flat tensor each; fewer than blocks if the budget ran out.
        unit_grad: (N, D) d logp / d hidden, for a head without gradient, whose exponentials need not be kept; or None.
        sums: of `TokenStats`, or None if they are not wanted.
        out_of_range: for each block the rows in it that were recomputed in fp64.
    """

    blocks: list[slice]
    columns: list[slice]
    anchor: Tensor
    odds: Tensor
    total: Tensor
    kept: list[Tensor]
    unit_grad: Tensor | None
    sums: StatsSums | None
    out_of_range: list[Tensor] = field(default_factory=list)

    def tile(self, k: int, columns: slice) -> Tensor:
        """An (R, C) tile of block k: the kept one, or an empty one."""
        num_rows = self.blocks[k].stop - self.blocks[k].start
        width = columns.stop - columns.start
        if k >= len(self.kept):
            return self.anchor.new_empty(num_rows, width)
        return self.kept[k][num_rows * columns.start : num_rows * columns.stop].view(num_rows, width)


def forward(
    head: Head, hidden: Tensor, target: Tensor, memory_budget: int, *, frozen: bool = False, want_stats: bool = False
) -> tuple[Tensor, State, TokenStats | None]:
    """Log-probs of the targets.

    Args:
        head: the head, V x D.
        hidden: (N, D).
        target: (N,) int64, all of them in 0 .. V - 1.
        memory_budget: bytes that kept exponentials may take; 0 keeps none.
        frozen: keep d logp / d hidden instead; for a head that has no gradient.
        want_stats: also make the rows' `TokenStats`.

    Returns:
        (N,) log-probs in `head.dtype`, what `backward` needs, and the figures if they are wanted.
    """
    num_rows, vocab = hidden.shape[0], head.weight.shape[0]
    num_kept = 0 if frozen else min(num_rows, memory_budget // (vocab * head.dtype.itemsize))
    blocks = row_blocks(num_rows, num_kept)
    kept = [hidden.new_empty((b.stop - b.start) * vocab, dtype=head.dtype) for b in blocks if b.stop <= num_kept]
    z_target = torch.cat([target_logits(head, hidden[b], target[b])[0] for b in blocks])
    unit_grad = torch.zeros_like(hidden, dtype=head.dtype) if frozen else None
    anchor = z_target.to(head.dtype, copy=True)
    odds = torch.zeros_like(anchor)
    sums = StatsSums.zeros_like(odds) if want_stats else None
    state = State(blocks, column_tiles(head, num_rows), anchor, odds, odds, kept, unit_grad, sums)
    _sum_exponentials(head, hidden, target, state)
    state.out_of_range = [_reanchor(head, hidden, target, state, k) for k in range(len(blocks))]
    shift = state.anchor - z_target
    state.total = odds + torch.exp(-shift).to(head.dtype)
    _finish(head, hidden, target, state)
    stats = None if sums is None else sums.finish(odds, shift, state.anchor, vocab)
    return -log1p_odds(odds, shift).to(head.dtype), state, stats


def log1p_odds(odds: Tensor, shift: Tensor) -> Tensor:
    """log(1 + odds · e^shift) in fp64, relatively exact where the product is tiny and finite where it overflows."""
    odds, shift = odds.double(), shift.double()
    log_odds = odds.log() + shift
    small = torch.log1p(odds * shift.exp())
    large = log_odds + torch.log1p(torch.exp(-log_odds))
    return torch.where(log_odds < 0, small, large)


def _sum_exponentials(head: Head, hidden: Tensor, target: Tensor, state: State) -> None:
    for columns in state.columns:
        weight, bias = head.tile(columns)
        for k in range(len(state.blocks)):
            _add_tile(head, hidden, target, state, k, columns, weight, bias)


def _add_tile(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    state: State,
    k: int,
    columns: slice,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    """Add a tile of block k to what is summed; its converted rows are gone before the next one's are made."""
    block = state.blocks[k]
    rows, tile = hidden[block].to(head.dtype), state.tile(k, columns)
    labels = target[block] - columns.start
    sums = None if state.sums is None else state.sums.rows(block)
    state.odds[block] += exponentials_(tile, head, rows, weight, bias, state.anchor[block], labels, sums)
    if state.unit_grad is not None:
        state.unit_grad[block].addmm_(tile, weight)


def exponentials_(
    tile: Tensor,
    head: Head,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    anchor: Tensor,
    labels: Tensor,
    stats: StatsSums | None = None,
) -> Tensor:
    """Fill `tile` (R, C) with E times the softcap's slope, 0 at the targets; returns the (R,) sums of E."""
    slope = head.logits_(tile, hidden, weight, bias)
    tile.sub_(anchor[:, None])
    shifted = None if stats is None else tile.clone()
    tile.exp_()
    _set_targets(tile, labels, tile.new_zeros(tile.shape[0]))
    sums = tile.sum(1)
    if stats is not None and shifted is not None:
        _add_stats(stats, tile, shifted, labels)
    if slope is not None:
        tile.mul_(slope)
    return sums


def _add_stats(stats: StatsSums, tile: Tensor, shifted: Tensor, labels: Tensor) -> None:
    stats.square.add_((tile * tile).sum(1))
    # Where E is 0 so is the term, although z - a may be -inf.
    stats.energy.add_(torch.where(tile > 0, tile * shifted, 0.0).sum(1))
    stats.shifted.add_(shifted.sum(1))
    _set_targets(shifted, labels, torch.full_like(stats.peak, -torch.inf))
    torch.maximum(stats.peak, shifted.amax(1), out=stats.peak)


def _set_targets(tile: Tensor, labels: Tensor, values: Tensor) -> None:
    """tile[i, labels[i]] = values[i] where labels[i] lies in the tile; no wait for a device."""
    inside = ((labels >= 0) & (labels < tile.shape[1]))[:, None]
    index = labels.clamp(0, tile.shape[1] - 1)[:, None]
    tile.scatter_(1, index, torch.where(inside, values[:, None], tile.gather(1, index)))


def _reanchor(head: Head, hidden: Tensor, target: Tensor, state: State, k: int) -> Tensor:
    """Redo the rows of block k whose odds left the range, in fp64 and with their largest logit as anchor.

    Returns:
        Their places in the block.
    """
    places = (~(state.odds[state.blocks[k]] <= MAX_ODDS)).nonzero()[:, 0]
    widest = max(hidden.shape[1], state.columns[0].stop)
    for some in places.split(max(EXACT_TILE // widest, 1)):
        if some.numel():
            _reanchor_rows(head, hidden, target, state, k, some)
    return places


def _reanchor_rows(head: Head, hidden: Tensor, target: Tensor, state: State, k: int, places: Tensor) -> None:
    """`_reanchor` for the rows at `places`."""
    block = state.blocks[k]
    exact = replace(head, dtype=torch.float64)
    rows = hidden[block][places].double()
    peak = torch.full_like(rows[:, 0], -torch.inf)
    for columns in state.columns:
        for part in _exact_parts(head, columns):
            weight, bias = exact.tile(part)
            tile = rows.new_empty(rows.shape[0], weight.shape[0])
            exact.logits_(tile, rows, weight, bias)
            peak = torch.maximum(peak, tile.amax(1))
    state.anchor[block][places] = peak.to(head.dtype)
    odds, unit_grad = torch.zeros_like(peak), torch.zeros_like(rows)
    sums = None if state.sums is None else StatsSums.zeros_like(peak)
    for columns in state.columns:
        tile, more = _exact_tile(head, hidden, target, state, k, places, columns, sums)
        odds += more
        if k < len(state.kept):
            state.tile(k, columns)[places] = tile.to(head.dtype)
        if state.unit_grad is not None:
            for part in _exact_parts(head, columns):
                inside = slice(part.start - columns.start, part.stop - columns.start)
                unit_grad.addmm_(tile[:, inside], exact.tile(part)[0])
    state.odds[block][places] = odds.to(head.dtype)
    if state.sums is not None and sums is not None:
        state.sums.rows(block).put(places, sums)
    if state.unit_grad is not None:
        state.unit_grad[block][places] = unit_grad.to(head.dtype)


def _exact_parts(head: Head, columns: slice) -> list[slice]:
    """A tile's columns in parts whose weights are small in fp64, too."""
    width = max(EXACT_TILE // head.weight.shape[1], 64)
    return [slice(start, min(start + width, columns.stop)) for start in range(columns.start, columns.stop, width)]


def _exact_tile(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    state: State,
    k: int,
    places: Tensor,
    columns: slice,
    sums: StatsSums | None = None,
) -> tuple[Tensor, Tensor]:
    """A tile of the rows at `places` of block k in fp64, and its sums."""
    block = state.blocks[k]
    exact = replace(head, dtype=torch.float64)
    rows, labels, anchor = hidden[block][places].double(), target[block][places], state.anchor[block][places].double()
    tile, odds = rows.new_empty(rows.shape[0], columns.stop - columns.start), torch.zeros_like(anchor)
    for part in _exact_parts(head, columns):
        out = tile[:, part.start - columns.start : part.stop - columns.start]
        odds += exponentials_(out, exact, rows, *exact.tile(part), anchor, labels - part.start, sums)
    return tile, odds


def _target_entries(head: Head, hidden: Tensor, target: Tensor, state: State, block: slice) -> Tensor:
    """What the products want at a block's targets: -S times the softcap's slope, (R,)."""
    slope = target_logits(head, hidden[block], target[block])[1]
    return -state.odds[block] if slope is None else -state.odds[block] * slope.to(head.dtype)


def _finish(head: Head, hidden: Tensor, target: Tensor, state: State) -> None:
    """Put the targets into what is kept, now that their odds are known."""
    for k, block in enumerate(state.blocks):
        if k >= len(state.kept) and state.unit_grad is None:
            return
        entries = _target_entries(head, hidden, target, state, block)
        for columns in state.columns if k < len(state.kept) else ():
            _set_targets(state.tile(k, columns), target[block] - columns.start, entries)
        if state.unit_grad is not None:
            unit_grad = state.unit_grad[block]
            unit_grad += entries[:, None] * head.weight[target[block]].to(head.dtype)
            unit_grad *= (-head.scale / state.total[block])[:, None]


def backward(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    state: State,
    grad: Tensor,
    wanted: tuple[bool, bool, bool],
    main_grad: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients from the exponentials: dH = v ⊙ (E·W), dW = Eᵀ·(v ⊙ H), db = Eᵀ·v.

    Consumes what the forward kept: a second backward recomputes it.

    Args:
        head, hidden, target: as in `forward`.
        state: from `forward`.
        grad: (N,) d loss / d logp.
        wanted: which of the gradients of hidden, weight and bias to make.
        main_grad: (V, D) in `head.dtype` that dW is added to; there is none to return then.
    """
    kept, unit_grad = state.kept, state.unit_grad
    state.kept, state.unit_grad = [], None
    if unit_grad is not None:
        return unit_grad.mul_(grad[:, None]).to(hidden.dtype), None, None
    factor = -head.scale * grad / state.total
    d_hidden = torch.zeros_like(hidden, dtype=head.dtype) if wanted[0] else None
    d_weight = torch.empty_like(head.weight) if wanted[1] and main_grad is None else None
    d_bias = torch.empty_like(head.bias) if wanted[2] and head.bias is not None else None
    work = replace(state, kept=kept)
    entries = [_target_entries(head, hidden, target, state, block) for block in state.blocks]
    for columns in state.columns:
        weight, bias = head.tile(columns)
        sums = main_grad[columns] if main_grad is not None else None
        if d_weight is not None:
            sums = _accumulator(d_weight[columns], head.dtype)
        bias_sums = torch.zeros_like(weight[:, 0])
        for k, block in enumerate(state.blocks):
            rows, tile = hidden[block].to(head.dtype), work.tile(k, columns)
            if k >= len(kept):
                labels = target[block] - columns.start
                exponentials_(tile, head, rows, weight, bias, state.anchor[block], labels)
                if state.out_of_range[k].numel():
                    exact, _ = _exact_tile(head, hidden, target, state, k, state.out_of_range[k], columns)
                    tile[state.out_of_range[k]] = exact.to(head.dtype)
                _set_targets(tile, labels, entries[k])
            if d_hidden is not None:
                d_hidden[block].addmm_(tile, weight)
            if sums is not None:
                sums.addmm_(tile.t(), rows * factor[block, None], beta=0 if k == 0 and main_grad is None else 1)
            if d_bias is not None:
                bias_sums += tile.t() @ factor[block]
        if d_weight is not None and sums is not None and sums.dtype != d_weight.dtype:
            d_weight[columns] = sums
        if d_bias is not None:
            d_bias[columns] = bias_sums
    if d_hidden is not None:
        d_hidden = d_hidden.mul_(factor[:, None]).to(hidden.dtype)
    return d_hidden, d_weight, d_bias


def _accumulator(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a slice of dW is summed: in place if it has the products' dtype, else in a wider copy."""
    return gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
