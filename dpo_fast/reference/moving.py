"""A reference that follows the policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_fast.model.policy import Policy
from dpo_fast.model.sharding import local
from dpo_fast.packs.layout import PackedBatch


class MovingReference:
    """A reference that follows the policy, as a second model.

    TR-DPO, Gorbatovski et al. 2024 (arXiv 2404.09656), eq. 7: every `sync_steps` optimizer steps,
    ref <- alpha policy + (1 - alpha) ref. Scores cached before a move would belong to another model, so each pack is
    scored when it is needed.
    """

    def __init__(self, reference: Policy, *, sync_steps: int, alpha: float) -> None:
        """Take a policy that nothing else trains."""
        self.reference = reference
        self.reference.model.requires_grad_(False)
        self._sync_steps = sync_steps
        self._alpha = alpha

    def score(self, batch: PackedBatch) -> Tensor:
        """(N,) log-probs under the reference as it is now."""
        return self.reference.score(batch)

    @torch.no_grad()
    def after_step(self, step: int, policy: Policy) -> None:
        """Move if the optimizer step `step`, counted from 1, is one to move after."""
        if step % self._sync_steps:
            return
        own, theirs = (
            [local(weight) for weight in model.parameters()] for model in (self.reference.model, policy.model)
        )
        torch._foreach_lerp_(own, theirs, self._alpha)

    def state_dict(self) -> dict[str, Any]:
        """The reference's weights, or what this process holds of them."""
        return {name: local(weight) for name, weight in self.reference.model.state_dict().items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the weights from `state_dict`."""
        if self.reference.parallel is None:
            self.reference.model.load_state_dict(state)
            return
        for name, weight in self.reference.model.state_dict().items():
            local(weight).copy_(state[name])
