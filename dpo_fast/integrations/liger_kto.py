"""KTO from hidden states: answers that stand alone, each wanted or not."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from dpo_fast.integrations.liger_base import FusedHead, logit_sums, whole_head
from dpo_fast.kernels.head import HeadKeywords, HeadOptions
from dpo_fast.losses.formulas import kto_term


class FusedLinearKTOLoss(FusedHead):
    """Unpaired preference loss, a drop-in for `LigerFusedLinearKTOLoss`.

    Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 8, with equal weights of wanted and unwanted answers.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        **head: Unpack[HeadKeywords],
    ) -> None:
        """Arguments as in `FusedLinearDPOLoss`."""
        super().__init__(
            ignore_index,
            average_log_prob=average_log_prob,
            compiled=compiled,
            chunk_size=chunk_size,
            head=HeadOptions(**head),
        )
        self.beta = beta
        self.use_ref_model = use_ref_model

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of B answers.

        Args:
            _input: (B, L, D) hidden states; position t has the target t.
            lin_weight: (V, D), the head.
            target: (B, L) int64.
            bias: (V,) or None.
            preference_labels: (B,) bool, True for wanted answers.
            ref_input, ref_weight, ref_bias: the reference's; or
            ref_logps: (B,) its log-probs, computed before.
            kl: (B,) or scalar, KTO's reference point z in nats; None is 0.

        Returns:
            The mean loss; and, without gradients, sums over wanted and over other answers: log-probs, logits, rewards.
        """
        if _input.dim() != 3 or target.shape != _input.shape[:2] or not target.shape[0]:
            raise ValueError(
                f"_input, target: expected (B, L, D) and (B, L); got {tuple(_input.shape)} and {tuple(target.shape)}"
            )
        if preference_labels is None or preference_labels.shape != target.shape[:1]:
            raise ValueError(f"preference_labels: expected ({target.shape[0]},) bool, one for each answer")
        target, (lin_weight, bias) = self.masked(target), whole_head(lin_weight, bias)
        lengths = (target >= 0).sum(1)
        logps = self.reported(self.sums(_input, lin_weight, bias, target), lengths)
        logratios = logps
        if self.use_ref_model:
            if ref_logps is None:
                if ref_input is None or ref_weight is None:
                    raise ValueError("a reference is expected: give ref_logps, or ref_input and ref_weight")
                with torch.no_grad():
                    ref_logps = self.reported(self.sums(ref_input, *whole_head(ref_weight, ref_bias), target), lengths)
            logratios = logps - ref_logps
        wanted = preference_labels.bool()
        gain = logratios if kl is None else logratios - kl
        loss = kto_term(self.beta, torch.where(wanted, gain, -gain)).mean()
        figures = (logps, logit_sums(_input, lin_weight, bias), self.beta * logratios)
        sides = [side for x in figures for side in (x * wanted, x * ~wanted)]
        return loss, tuple(side.detach().sum() for side in sides)
