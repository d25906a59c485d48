"""The head and a preference loss as one module, for training loops that are not ours.

`FusedLinearDPOLoss` takes Liger's constructor arguments and call and returns what `LigerFusedLinearDPOLoss` returns, to
rounding. Unlike there, only rows with a target reach the head, log-probs are fp32 whatever the inputs' dtype, dW is
summed in fp32, and the reference may be given as sums that were computed once (`ref_logps`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpo_fast.config import LossConfig
from dpo_fast.kernels.backends import Backend
from dpo_fast.kernels.linear_logprob import linear_logprob
from dpo_fast.kernels.segment_sum import segment_sum
from dpo_fast.objective import loss_terms, preference_loss
from dpo_fast.pairs import PairLogps

Aux = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class FusedLinearDPOLoss(nn.Module):
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
        *,
        memory_budget: int = 2 * 2**30,
        backend: Backend = "auto",
    ) -> None:
        """Settings of the loss.

        Args:
            ignore_index: target of tokens that do not count; other negative targets do not count either.
            beta, loss_type, label_smoothing, discopop_tau: as in `LossConfig`; every loss of `LOSSES`.
            alpha: weight of the chosen answers' cross-entropy, where `compute_nll_loss` asks for it.
            compute_nll_loss: add it: nats a token over all chosen tokens of the batch.
            compiled: Liger's; nothing here needs compiling.
            use_ref_model: compare with a reference; without one its log-probs are 0.
            average_log_prob: divide log-probs by the number of tokens.
            chunk_size: Liger's; `memory_budget` bounds what is kept.
            memory_budget, backend: as in `linear_logprob`.

        Raises:
            ValueError: an unknown loss, or a value that it cannot have.
        """
        super().__init__()
        self.ignore_index = ignore_index
        self.config = LossConfig(
            loss_type=loss_type, beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau
        )
        loss_terms(self.config)
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.memory_budget = memory_budget
        self.backend: Backend = backend

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
            lin_weight: (V, D), the head.
            _input: (B, L, D) hidden states, chosen first, then rejected; position t has the target t.
            target: (B, L) int64.
            bias: (V,) or None.
            ref_input, ref_weight, ref_bias: the reference's; or
            ref_logps: (B,) its log-probs, summed (averaged with `average_log_prob`), computed before.

        Returns:
            The mean loss, differentiable in `lin_weight`, `_input` and `bias`; and, without gradients:
            (B / 2,) log-probs of chosen and rejected, their mean logits, the cross-entropy, (B / 2,) rewards of each.
        """
        if _input.dim() != 3 or target.shape != _input.shape[:2] or target.shape[0] % 2 or not target.shape[0]:
            raise ValueError(
                "_input, target: expected (B, L, D) and (B, L) with an even B, chosen first; got "
                f"{tuple(_input.shape)} and {tuple(target.shape)}"
            )
        target = target.masked_fill(target == self.ignore_index, -1)
        lengths = (target >= 0).sum(1)
        logps = self._sums(_input, lin_weight, bias, target, lengths)
        if self.use_ref_model and ref_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    "a reference is expected: give ref_logps, or ref_input and ref_weight, or set use_ref_model=False"
                )
            with torch.no_grad():
                ref_logps = self._sums(ref_input, ref_weight, ref_bias, target, lengths)
        loss, chosen_and_rejected, rewards, nll = self._loss(logps, lengths, ref_logps)
        halves = (x.detach().flatten(0, 1).float().mean(0) for x in _input.chunk(2))
        weight_mean = lin_weight.detach().float().mean(0)
        bias_mean = 0.0 if bias is None else bias.detach().float().mean()
        chosen_logit, rejected_logit = (half @ weight_mean + bias_mean for half in halves)
        return loss, (*chosen_and_rejected, chosen_logit, rejected_logit, nll, *rewards)

    def packed(
        self,
        lin_weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        cu_seqlens: Tensor,
        bias: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """The loss of S / 2 pairs without padding.

        Args:
            lin_weight: (V, D), the head.
            hidden: (N, D) hidden states that predict the targets.
            target: (N,) int64.
            cu_seqlens: (S + 1,) int64 bounds of the sequences, chosen ones first, then rejected.
            bias: (V,) or None.
            ref_logps: (S,) log-probs of the reference; may be None without `use_ref_model`.

        Returns:
            The mean loss; and (S / 2,) log-probs of chosen and rejected, the cross-entropy, and both rewards.
        """
        if self.use_ref_model and ref_logps is None:
            raise ValueError(
                "ref_logps: expected the reference's log-probs, one a sequence; or set use_ref_model=False"
            )
        if cu_seqlens.shape[0] % 2 == 0 or cu_seqlens.shape[0] < 3:
            raise ValueError(
                f"cu_seqlens: expected bounds of an even number of sequences, got {cu_seqlens.shape[0] - 1}"
            )
        target = target.masked_fill(target == self.ignore_index, -1)
        live = (target >= 0).to(torch.float32)
        lengths = segment_sum(live, cu_seqlens).long()
        token_logps = self._token_logps(hidden, lin_weight, bias, target)
        logps = segment_sum(token_logps, cu_seqlens)
        if self.average_log_prob:
            logps = logps / lengths.clamp(min=1)
        loss, chosen_and_rejected, rewards, nll = self._loss(logps, lengths, ref_logps)
        return loss, (*chosen_and_rejected, nll, *rewards)

    def _token_logps(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, target, bias=bias, memory_budget=self.memory_budget, backend=self.backend)

    def _sums(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lengths: Tensor) -> Tensor:
        sums = self._token_logps(hidden.flatten(0, 1), weight, bias, target.flatten()).view(target.shape).sum(1)
        return sums / lengths.clamp(min=1) if self.average_log_prob else sums

    def _loss(
        self, logps: Tensor, lengths: Tensor, ref_logps: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        reference = torch.zeros_like(logps) if ref_logps is None else ref_logps.to(logps.dtype)
        if reference.shape != logps.shape:
            raise ValueError(f"ref_logps: expected {tuple(logps.shape)}, got {tuple(reference.shape)}")
        (chosen, rejected), (ref_chosen, ref_rejected) = logps.chunk(2), reference.chunk(2)
        pairs = PairLogps(chosen, rejected, ref_chosen, ref_rejected, *lengths.chunk(2))
        loss = preference_loss(pairs, self.config).mean()
        nll = torch.zeros_like(loss)
        if self.compute_nll_loss:
            chosen_sums = chosen * pairs.chosen_len if self.average_log_prob else chosen
            nll = -chosen_sums.sum() / pairs.chosen_len.sum()
            loss = loss + self.alpha * nll
        beta = self.config.beta
        rewards = (beta * pairs.chosen_logratio.detach(), beta * pairs.rejected_logratio.detach())
        return loss, (chosen.detach(), rejected.detach()), rewards, nll.detach()
