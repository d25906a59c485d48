"""What else is known about a token once its row of exponentials has been made; nothing here has a gradient.

With the names of `linear_logprob.py`, a the anchor, Z = S + e^(z_y - a) and sums over j ≠ y, made beside S:

    Σ p²     = (Σ E² + e^(2(z_y - a))) / Z²       for WPO's weights, arXiv:2406.11827
    entropy  = log Z - Σ E·(z - a) / Z
    mean z   = a + Σ_all (z - a) / V
    hit      = max (z - a) <= z_y - a
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Figures of each row's softmax, (N,) each; a row without a target has zeros and False.

    Attributes:
        sum_p2: Σ_j p_j², fp32.
        entropy: -Σ_j p_j log p_j in nats, fp32.
        mean_logit: mean over the vocabulary of the logits, after softcap and temperature, fp32.
        is_argmax: whether no token is likelier than the target, bool.
    """

    sum_p2: Tensor
    entropy: Tensor
    mean_logit: Tensor
    is_argmax: Tensor


class StatsSums(NamedTuple):
    """(N,) sums that a pass over the logits adds to; the target's own share is left out of all but `shifted`.

    Attributes:
        square: Σ E².
        energy: Σ E·(z - a).
        shifted: Σ (z - a), the target's included.
        peak: max (z - a).
    """

    square: Tensor
    energy: Tensor
    shifted: Tensor
    peak: Tensor

    @classmethod
    def zeros_like(cls, odds: Tensor) -> StatsSums:
        """Sums of nothing."""
        square, energy, shifted = (torch.zeros_like(odds) for _ in range(3))
        return cls(square, energy, shifted, torch.full_like(odds, -torch.inf))

    def clear_(self) -> None:
        """Make them sums of nothing."""
        for x in self:
            x.zero_()
        self.peak.fill_(-torch.inf)

    def rows(self, index: slice | Tensor) -> StatsSums:
        """The sums of some rows; views if `index` is a slice."""
        return StatsSums(*(x[index] for x in self))

    def put(self, index: Tensor, rows: StatsSums) -> None:
        """Replace the sums of some rows."""
        for x, part in zip(self, rows, strict=True):
            x[index] = part.to(x.dtype)

    def finish(self, odds: Tensor, shift: Tensor, anchor: Tensor, vocab: int) -> TokenStats:
        """The figures, from S, a - z_y and a of each row; in fp64 until they are rounded, since Z² may overflow."""
        target = torch.exp(-shift.double())
        total = odds + target
        # The target's own term, e^(z_y - a)·(z_y - a), is nothing: a is z_y, or so far above it that e^(z_y - a) is.
        entropy = total.log() - self.energy / total
        return TokenStats(
            ((self.square + target * target) / total**2).to(odds.dtype),
            entropy.clamp(min=0).to(odds.dtype),
            (anchor + self.shifted / vocab).to(odds.dtype),
            self.peak <= -shift,
        )


def token_stats_ref(logits_NV: Tensor, target: Tensor) -> TokenStats:
    """`TokenStats` as plain PyTorch writes them, in the dtype of the logits: the truth in tests when given fp64."""
    logp_NV = logits_NV.log_softmax(-1)
    p_NV = logp_NV.exp()
    index = target.clamp(min=0)[:, None]
    stats = TokenStats(
        (p_NV * p_NV).sum(-1),
        -torch.where(p_NV > 0, p_NV * logp_NV, 0.0).sum(-1),
        logits_NV.mean(-1),
        logits_NV.gather(-1, index)[:, 0] >= logits_NV.amax(-1),
    )
    return TokenStats(*(torch.where(target >= 0, x, torch.zeros_like(x)) for x in stats))
