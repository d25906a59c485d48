"""Log-probabilities of target tokens from logits, for those who hold logits already."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def logprob(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probability of each target.

    Args:
        logits: (..., V); differentiable.
        target: (...) int64; below 0 gives 0.0 and no gradient.

    Returns:
        (...) fp32 (fp64 for fp64 logits), in nats.
    """
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    losses = F.cross_entropy(wide.flatten(0, -2), target.clamp(min=-1).flatten(), ignore_index=-1, reduction="none")
    return -losses.view(target.shape)


def sequence_logprob(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Summed log-probability of each sequence's labels, with Hugging Face's shift by one.

    Args:
        logits: (B, L, V); differentiable.
        labels: (B, L) int64; `ignore_index` where a token does not count.
        ignore_index: the label that is left out.

    Returns:
        (B,) fp32 (fp64 for fp64 logits), in nats.
    """
    target = labels[:, 1:].masked_fill(labels[:, 1:] == ignore_index, -1)
    return logprob(logits[:, :-1], target).sum(1)
