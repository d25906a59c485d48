"""The head in plain PyTorch: tiles of columns that stay in the cache, two products in the backward.

The maths and the names are those of `linear_logprob.py`. Products and exponentials are made in fp32 (fp64 for
fp64 inputs) whatever the inputs' dtype. Columns are the outer loop, so that a tile of the head is read, and
converted, once for all rows; a tile of R x C exponentials is made by one product and three passes while it is
in the cache:

    forward     V / C times: z = H·W_cᵀ;  E = e^(z - anchor);  E[i, y_i] = 0;  S += Σ E
    backward    V / C times: dH += E·W_c;  dW_c = Eᵀ·(v ⊙ H)

A kept row's tiles lie one after the other, each contiguous. Rows over the memory budget keep S alone, and
make their tiles again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# 2^21 fp32 exponentials, 8 MiB: a share of the last-level cache, and enough for a product at full speed.
TILE = 2**21
MAX_ROWS = 1024
# 2^22 fp32 weights, 16 MiB, is the largest slice of a half-precision head that is converted at a time.
WEIGHT_TILE = 2**22
# 69 nats against the target. Beyond, v ⊙ H would near fp32's smallest numbers: the maximum becomes the anchor.
MAX_ODDS = 2.0**100


@dataclass(frozen=True)
class Head:
    """logits = scale · cap(hidden·weightᵀ + bias), cap(x) = softcap · tanh(x / softcap) where there is one."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    dtype: torch.dtype

    def columns(self, num_rows: int) -> list[slice]:
        """Tiles of the vocabulary for blocks of up to `num_rows` rows."""
        vocab, dim = self.weight.shape
        width = TILE // min(max(num_rows, 1), MAX_ROWS)
        if self.weight.dtype != self.dtype:
            width = min(width, max(WEIGHT_TILE // dim, 64))
        return [slice(start, min(start + width, vocab)) for start in range(0, vocab, width)]

    def tile(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """(C, D) weight and (C,) bias of a tile in the dtype of the products."""
        bias = None if self.bias is None else self.bias[columns].to(self.dtype)
        return self.weight[columns].to(self.dtype), bias

    def logits_(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Fill `out` (R, C) with logits; returns cap', the softcap's slope, or None for 1 everywhere."""
        factor = self.scale if self.softcap is None else 1 / self.softcap
        if bias is None:
            torch.addmm(out, hidden, weight.t(), beta=0, alpha=factor, out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), beta=factor, alpha=factor, out=out)
        return self.cap_(out)

    def cap_(self, product: Tensor) -> Tensor | None:
        """Turn a product, already times scale or 1 / softcap, into logits; returns what `logits_` does."""
        if self.softcap is None:
            return None
        product.tanh_()
        slope = 1 - product * product
        product.mul_(self.softcap * self.scale)
        return slope

    def target_logits(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """(R,) logit of every row's target and its slope: one dot product a row, before any tile is made."""
        product = (hidden.to(self.dtype) * self.weight[target].to(self.dtype)).sum(1)
        if self.bias is not None:
            product += self.bias[target].to(self.dtype)
        product *= self.scale if self.softcap is None else 1 / self.softcap
        slope = self.cap_(product)
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
class Rows:
    """N rows cut into blocks, the vocabulary cut into tiles, and what is known of each row.

    Attributes:
        hidden: (N, D).
        target: (N,) int64, all >= 0.
        blocks: slices of rows.
        columns: slices of the vocabulary.
        anchor: (N,) what is subtracted from a row's logits.
        odds: (N,) S, the sum of a row's exponentials without its target's.
        kept: exponentials of the first blocks, one flat tensor each; fewer than blocks where the budget ran
            out.
    """

    hidden: Tensor
    target: Tensor
    blocks: list[slice]
    columns: list[slice]
    anchor: Tensor
    odds: Tensor
    kept: list[Tensor]

    def tile(self, k: int, columns: slice) -> Tensor:
        """An (R, C) tile of block k: the kept one, or an empty one."""
        num_rows = self.blocks[k].stop - self.blocks[k].start
        width = columns.stop - columns.start
        if k >= len(self.kept):
            return self.anchor.new_empty(num_rows, width)
        return self.kept[k][num_rows * columns.start : num_rows * columns.stop].view(num_rows, width)


def forward(head: Head, hidden: Tensor, target: Tensor, memory_budget: int) -> tuple[Tensor, Tensor, Rows]:
    """Log-probs of the targets.

    Args:
        head: the head, V x D.
        hidden: (N, D).
        target: (N,) int64, all of them in 0 .. V - 1.
        memory_budget: bytes that kept exponentials may take; 0 keeps none.

    Returns:
        (N,) log-probs in `head.dtype`; (N,) S + e^(z_y - anchor); the rows, with their kept exponentials
        ready for the products.
    """
    num_rows, vocab = hidden.shape[0], head.weight.shape[0]
    num_kept = min(num_rows, memory_budget // (vocab * head.dtype.itemsize))
    blocks = row_blocks(num_rows, num_kept)
    kept = [hidden.new_empty((b.stop - b.start) * vocab, dtype=head.dtype) for b in blocks if b.stop <= num_kept]
    z_target = torch.cat([head.target_logits(hidden[b], target[b])[0] for b in blocks])
    rows = Rows(hidden, target, blocks, head.columns(num_rows), z_target.clone(), torch.zeros_like(z_target), kept)
    _sum_exponentials(head, rows)
    for block in range(len(blocks)):
        _reanchor(head, rows, block)
    for k in range(len(kept)):
        entries = _target_entries(head, rows, k)
        for columns in rows.columns:
            _set_targets(rows.tile(k, columns), target[blocks[k]] - columns.start, entries)
    shift = rows.anchor - z_target
    return -log1p_odds(rows.odds, shift), rows.odds + torch.exp(-shift), rows


def log1p_odds(odds: Tensor, shift: Tensor) -> Tensor:
    """log(1 + odds · e^shift), relatively exact where the product is tiny and finite where it overflows."""
    log_odds = odds.log() + shift
    small = torch.log1p(odds * shift.exp())
    large = log_odds + torch.log1p(torch.exp(-log_odds))
    return torch.where(log_odds < 0, small, large)


def _sum_exponentials(head: Head, rows: Rows) -> None:
    for columns in rows.columns:
        weight, bias = head.tile(columns)
        for k, block in enumerate(rows.blocks):
            hidden = rows.hidden[block].to(head.dtype)
            labels = rows.target[block] - columns.start
            tile = rows.tile(k, columns)
            rows.odds[block] += _exponentials_(tile, head, hidden, weight, bias, rows.anchor[block], labels)


def _exponentials_(
    tile: Tensor,
    head: Head,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    anchor: Tensor,
    labels: Tensor,
) -> Tensor:
    """Fill `tile` (R, C) with E times the softcap's slope, 0 at the targets; returns the (R,) sums of E."""
    slope = head.logits_(tile, hidden, weight, bias)
    tile.sub_(anchor[:, None]).exp_()
    _set_targets(tile, labels, tile.new_zeros(tile.shape[0]))
    sums = tile.sum(1)
    if slope is not None:
        tile.mul_(slope)
    return sums


def _set_targets(tile: Tensor, labels: Tensor, values: Tensor) -> None:
    """tile[i, labels[i]] = values[i] where labels[i] lies in the tile; no wait for a device."""
    inside = ((labels >= 0) & (labels < tile.shape[1]))[:, None]
    index = labels.clamp(0, tile.shape[1] - 1)[:, None]
    tile.scatter_(1, index, torch.where(inside, values[:, None], tile.gather(1, index)))


def _target_entries(head: Head, rows: Rows, k: int) -> Tensor:
    """What the products want at a block's targets: -S times the softcap's slope, (R,)."""
    block = rows.blocks[k]
    slope = head.target_logits(rows.hidden[block], rows.target[block])[1]
    return -rows.odds[block] if slope is None else -rows.odds[block] * slope


def _reanchor(head: Head, rows: Rows, k: int) -> None:
    """Redo the rows of a block whose odds left the range, with their largest logit as anchor."""
    block = rows.blocks[k]
    lost = (~(rows.odds[block] <= MAX_ODDS)).nonzero()[:, 0]
    if lost.numel() == 0:
        return
    hidden, target = rows.hidden[block][lost].to(head.dtype), rows.target[block][lost]
    peak = torch.full_like(rows.odds[block][lost], -torch.inf)
    for columns in rows.columns:
        weight, bias = head.tile(columns)
        tile = hidden.new_empty(hidden.shape[0], weight.shape[0])
        head.logits_(tile, hidden, weight, bias)
        peak = torch.maximum(peak, tile.amax(1))
    odds = torch.zeros_like(peak)
    for columns in rows.columns:
        weight, bias = head.tile(columns)
        tile = hidden.new_empty(hidden.shape[0], weight.shape[0])
        odds += _exponentials_(tile, head, hidden, weight, bias, peak, target - columns.start)
        if k < len(rows.kept):
            rows.tile(k, columns)[lost] = tile
    rows.anchor[block][lost] = peak
    rows.odds[block][lost] = odds


def backward(
    head: Head, rows: Rows, factor: Tensor, *, hidden_grad: bool, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients from the finished exponentials: dH = v ⊙ (E·W), dW = Eᵀ·(v ⊙ H), db = Eᵀ·v.

    Args:
        head: as in `forward`.
        rows: what `forward` returned.
        factor: (N,) v = -scale · d loss / d logp / (S + e^(z_y - anchor)).
        hidden_grad, weight_grad, bias_grad: which of the three are wanted.
    """
    d_hidden = torch.zeros_like(rows.hidden, dtype=head.dtype) if hidden_grad else None
    d_weight = torch.empty_like(head.weight) if weight_grad else None
    d_bias = torch.empty_like(head.bias) if bias_grad and head.bias is not None else None
    entries = [_target_entries(head, rows, k) for k in range(len(rows.blocks))]
    for columns in rows.columns:
        weight, bias = head.tile(columns)
        sums = None if d_weight is None else _accumulator(d_weight[columns], head.dtype)
        bias_sums = torch.zeros_like(weight[:, 0])
        for k, block in enumerate(rows.blocks):
            hidden, tile = rows.hidden[block].to(head.dtype), rows.tile(k, columns)
            if k >= len(rows.kept):
                labels = rows.target[block] - columns.start
                _exponentials_(tile, head, hidden, weight, bias, rows.anchor[block], labels)
                _set_targets(tile, labels, entries[k])
            if d_hidden is not None:
                d_hidden[block].addmm_(tile, weight)
            if sums is not None:
                sums.addmm_(tile.t(), hidden * factor[block, None], beta=0 if k == 0 else 1)
            if d_bias is not None:
                bias_sums += tile.t() @ factor[block]
        if d_weight is not None and sums is not None and sums.dtype != d_weight.dtype:
            d_weight[columns] = sums
        if d_bias is not None:
            d_bias[columns] = bias_sums
    if d_hidden is not None:
        d_hidden = d_hidden.mul_(factor[:, None]).to(rows.hidden.dtype)
    return d_hidden, d_weight, d_bias


def _accumulator(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a slice of dW is summed: in place if it has the products' dtype, else in a wider copy."""
    return gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
