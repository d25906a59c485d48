"""What turns a pack into log-probs."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dpo_fast.packs.layout import PackedBatch


class Scorer(Protocol):
    """A policy, a stored reference, a reference that moves, a model with its adapter switched off."""

    def score(self, batch: PackedBatch) -> Tensor:
        """(N,) fp32 log-probs of `batch.targets`, in their order and without gradients, on any device."""
