"""The head and a preference loss as one module, for training loops other than ours.

Each class takes the constructor arguments and the call of Liger's class of the same name, has its attributes, and
returns what that returns, in the same order, equal to rounding. Unlike there, only rows with a target reach the head,
log-probs are fp32 whatever the inputs' dtype, dW is summed in fp32, and a reference may be given as sums that were
computed once (`ref_logps`).

    FusedLinearDPOLoss     every loss of `LOSSES`, with a reference
    FusedLinearCPOLoss, FusedLinearSimPOLoss, FusedLinearORPOLoss     without
    FusedLinearKTOLoss     unpaired answers (liger_kto.py)

Autocast, gradient accumulation, gradients from above, `torch.compile` around them and weights sharded by FSDP2 work.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from dpo_fast.integrations.arguments import loss_settings
from dpo_fast.integrations.liger_base import Aux, FusedLinearPreferenceLoss, mean_nll, whole_head
from dpo_fast.kernels.head import HeadKeywords, HeadOptions
from dpo_fast.losses.formulas import log_odds_ratio
from dpo_fast.losses.pairs import PairLogps


class FusedLinearDPOLoss(FusedLinearPreferenceLoss):
    """Preference loss from hidden states, a drop-in for `LigerFusedLinearDPOLoss`."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        **head: Unpack[HeadKeywords],
    ) -> None:
        """Settings of the loss.

        Args:
            ignore_index: target of tokens that do not count; other negative targets do not count either.
            beta, loss_type, label_smoothing, discopop_tau: as in `LossConfig`; every loss of `LOSSES`.
            alpha: weight of the chosen answers' cross-entropy, if `compute_nll_loss` is set.
            compute_nll_loss: add it: nats a token over all chosen tokens of the batch; 0 if it has none.
            compiled: Liger's; nothing here needs compiling.
            use_ref_model: compare with a reference; without one its log-probs are 0.
            average_log_prob: divide log-probs by the number of tokens, once: losses that are defined on means (`ipo`,
                `simpo`) read these and do not divide again.
            chunk_size: Liger's; `memory_budget` bounds what is kept.
            **head: fields of `HeadOptions`: `memory_budget`, `backend`, `softcap`, `temperature`, `assume_valid`.

        Raises:
            ValueError: an unknown loss, a value that it cannot have, an option that it does not read, or
                `average_log_prob` with a loss that averages over the tokens of a batch.
        """
        super().__init__(
            loss_settings(loss_type=loss_type, beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau),
            ignore_index,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
            average_log_prob=average_log_prob,
            compiled=compiled,
            chunk_size=chunk_size,
            head=HeadOptions(**head),
        )
        self.use_ref_model = use_ref_model

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
    ) -> tuple[Tensor, Aux]:
        """The loss of B / 2 pairs.

        Args:
            lin_weight, _input, target, bias: as in `FusedLinearPreferenceLoss`.
            ref_input, ref_weight, ref_bias: the reference's; or
            ref_logps: (B,) its log-probs, summed (averaged with `average_log_prob`), computed before.

        Returns:
            As in `FusedLinearPreferenceLoss`.
        """
        target, (lin_weight, bias) = self._checked(_input, target), whole_head(lin_weight, bias)
        lengths = (target >= 0).sum(1)
        sums = self.sums(_input, lin_weight, bias, target)
        if self.use_ref_model and ref_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    "a reference is expected: give ref_logps, or ref_input and ref_weight, or set use_ref_model=False"
                )
            with torch.no_grad():
                ref_logps = self.reported(self.sums(ref_input, *whole_head(ref_weight, ref_bias), target), lengths)
        loss, aux = self._loss(sums, lengths, ref_logps)
        return loss, self._with_logits(aux, _input, lin_weight, bias)

    def packed(
        self,
        lin_weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        cu_seqlens: Tensor,
        bias: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
    ) -> tuple[Tensor, Aux]:
        """As in `FusedLinearPreferenceLoss`; `ref_logps` may be None without `use_ref_model`."""
        if self.use_ref_model and ref_logps is None:
            raise ValueError(
                "ref_logps: expected the reference's log-probs, one a sequence; or set use_ref_model=False"
            )
        return super().packed(lin_weight, hidden, target, cu_seqlens, bias, ref_logps=ref_logps)


class FusedLinearCPOLoss(FusedLinearPreferenceLoss):
    """CPO from hidden states, a drop-in for `LigerFusedLinearCPOLoss`."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        **head: Unpack[HeadKeywords],
    ) -> None:
        """Arguments as in `FusedLinearDPOLoss`."""
        super().__init__(
            loss_settings(loss_type="cpo", beta=beta, label_smoothing=label_smoothing),
            ignore_index,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
            average_log_prob=average_log_prob,
            compiled=compiled,
            chunk_size=chunk_size,
            head=HeadOptions(**head),
        )


class FusedLinearSimPOLoss(FusedLinearPreferenceLoss):
    """SimPO from hidden states, a drop-in for `LigerFusedLinearSimPOLoss`."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
        **head: Unpack[HeadKeywords],
    ) -> None:
        """`gamma`: the margin asked for, after beta; other arguments as in `FusedLinearDPOLoss`."""
        super().__init__(
            loss_settings(loss_type="simpo", beta=beta, label_smoothing=label_smoothing, simpo_gamma=gamma),
            ignore_index,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
            average_log_prob=True,
            compiled=compiled,
            chunk_size=chunk_size,
            head=HeadOptions(**head),
        )


class FusedLinearORPOLoss(FusedLinearPreferenceLoss):
    """ORPO from hidden states, a drop-in for `LigerFusedLinearORPOLoss`."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
        **head: Unpack[HeadKeywords],
    ) -> None:
        """Arguments as in `FusedLinearDPOLoss`; beta weighs the odds ratio."""
        super().__init__(
            loss_settings(loss_type="odds_ratio", beta=beta),
            ignore_index,
            alpha=1.0,
            compute_nll_loss=compute_nll_loss,
            average_log_prob=True,
            compiled=compiled,
            chunk_size=chunk_size,
            head=HeadOptions(**head),
        )

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, Aux]:
        """As in `FusedLinearPreferenceLoss`, and two more figures: the mean log sigmoid and the mean log odds ratio.

        Args:
            lin_weight, _input, target, bias: as there.
            nll_target: (B, L) int64, targets of the cross-entropy if they differ (with the prompt's, say); only the
                first half is read, since only chosen answers have a cross-entropy.
        """
        target, (lin_weight, bias) = self._checked(_input, target), whole_head(lin_weight, bias)
        sums = self.sums(_input, lin_weight, bias, target)
        nll = None
        if self.compute_nll_loss and nll_target is not None:
            half = target.shape[0] // 2
            own = self.masked(nll_target[:half])
            nll = mean_nll(self.sums(_input[:half], lin_weight, bias, own), (own >= 0).sum(1))
        loss, aux = self._loss(sums, (target >= 0).sum(1), None, nll)
        return loss, self._with_logits(aux, _input, lin_weight, bias)

    def _extras(self, pairs: PairLogps) -> Aux:
        log_odds = log_odds_ratio(pairs).detach()
        return nn.functional.logsigmoid(log_odds).mean(), log_odds.mean()
