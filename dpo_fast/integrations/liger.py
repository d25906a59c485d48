"""The head and a preference loss as one module, for training loops that are not ours.

Each class takes the constructor arguments and the call of Liger's class of the same name and returns what that returns,
in that order, to rounding. Unlike there, only rows with a target reach the head, log-probs are fp32 whatever the
inputs' dtype, dW is summed in fp32, and a reference may be given as sums that were computed once (`ref_logps`).

    FusedLinearDPOLoss     every loss of `LOSSES`, with a reference
    FusedLinearCPOLoss, FusedLinearSimPOLoss, FusedLinearORPOLoss     without
    FusedLinearKTOLoss     unpaired answers (fused_kto.py)

Autocast, gradient accumulation, gradients from above, `torch.compile` around them and weights sharded by FSDP2 work.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dpo_fast.config import LossConfig
from dpo_fast.kernels.backends import Backend
from dpo_fast.kernels.linear_logprob import linear_logprob
from dpo_fast.kernels.segment_sum import segment_sum
from dpo_fast.losses.formulas import log_odds_ratio
from dpo_fast.losses.objective import loss_terms, preference_loss
from dpo_fast.losses.pairs import PairLogps

Aux = tuple[Tensor, ...]


def whole_head(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A head as plain tensors: FSDP2's shards are gathered, and their gradients averaged on the way back."""
    return _whole(weight), None if bias is None else _whole(bias)


def _whole(parameter: Any) -> Tensor:
    if not hasattr(parameter, "full_tensor"):
        return cast("Tensor", parameter)
    from torch.distributed.tensor import Partial

    # Each rank's gradient is of its own rows: without this placement it would pass for the gradient of them all.
    placements = [Partial("avg")] * parameter.device_mesh.ndim
    return cast("Tensor", parameter.full_tensor(grad_placements=placements))


class FusedHead(nn.Module):
    """What all of them share: from hidden states to log-probs of sequences."""

    def __init__(self, ignore_index: int, *, average_log_prob: bool, memory_budget: int, backend: Backend) -> None:
        """Arguments as in `FusedLinearDPOLoss`."""
        super().__init__()
        self.ignore_index = ignore_index
        self.average_log_prob = average_log_prob
        self.memory_budget = memory_budget
        self.backend: Backend = backend

    def masked(self, target: Tensor) -> Tensor:
        """Targets with -1 where they do not count."""
        return target.masked_fill(target == self.ignore_index, -1)

    # Which rows have a target decides shapes inside, so that a compiler has nothing to gain there.
    @torch.compiler.disable
    def token_logps(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        """(N,) fp32 log-probs of (N, D) hidden states' targets."""
        return linear_logprob(hidden, weight, target, bias=bias, memory_budget=self.memory_budget, backend=self.backend)

    def sums(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        """(B,) fp32 sums of (B, L, D) hidden states' log-probs."""
        return self.token_logps(hidden.flatten(0, 1), weight, bias, target.flatten()).view(target.shape).sum(1)

    def reported(self, sums: Tensor, lengths: Tensor) -> Tensor:
        """Log-probs as they are returned: sums, or means a token."""
        return sums / lengths.clamp(min=1) if self.average_log_prob else sums


def logit_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B,) fp32 sums of (B, L, D) hidden states' logits over positions and vocabulary, without making the logits."""
    weight_sum = weight.detach().float().sum(0)
    sums = hidden.detach().float().sum(1) @ weight_sum
    return sums if bias is None else sums + hidden.shape[1] * bias.detach().float().sum()


class FusedLinearPreferenceLoss(FusedHead):
    """Pairs, chosen first; without a reference unless a subclass gives one."""

    # Whether the loss itself divides by lengths; it then reads sums though means are reported.
    loss_reads_sums = False

    def __init__(
        self,
        config: LossConfig,
        ignore_index: int,
        *,
        alpha: float,
        compute_nll_loss: bool,
        average_log_prob: bool,
        memory_budget: int,
        backend: Backend,
    ) -> None:
        """Take a loss's settings; the rest as in `FusedLinearDPOLoss`.

        Raises:
            ValueError: an unknown loss, or a value that it cannot have.
        """
        super().__init__(ignore_index, average_log_prob=average_log_prob, memory_budget=memory_budget, backend=backend)
        loss_terms(config)
        self.config = config
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Aux]:
        """The loss of B / 2 pairs.

        Args:
            lin_weight: (V, D), the head.
            _input: (B, L, D) hidden states, chosen first, then rejected; position t has the target t.
            target: (B, L) int64.
            bias: (V,) or None.

        Returns:
            The mean loss, differentiable in `lin_weight`, `_input` and `bias`; and, without gradients:
            (B / 2,) log-probs of chosen and rejected, their mean logits, the cross-entropy, (B / 2,) rewards of each.
        """
        target, (lin_weight, bias) = self._checked(_input, target), whole_head(lin_weight, bias)
        sums = self.sums(_input, lin_weight, bias, target)
        loss, aux = self._loss(sums, (target >= 0).sum(1), None)
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
        """The loss of S / 2 pairs without padding.

        Args:
            lin_weight: (V, D), the head.
            hidden: (N, D) hidden states that predict the targets.
            target: (N,) int64.
            cu_seqlens: (S + 1,) int64 bounds of the sequences, chosen ones first, then rejected.
            bias: (V,) or None.
            ref_logps: (S,) log-probs of the reference, for a loss that compares with one.

        Returns:
            The mean loss; and (S / 2,) log-probs of chosen and rejected, the cross-entropy, and both rewards.
        """
        if cu_seqlens.shape[0] % 2 == 0 or cu_seqlens.shape[0] < 3:
            raise ValueError(
                f"cu_seqlens: expected bounds of an even number of sequences, got {cu_seqlens.shape[0] - 1}"
            )
        target, (lin_weight, bias) = self.masked(target), whole_head(lin_weight, bias)
        lengths = segment_sum((target >= 0).to(torch.float32), cu_seqlens).long()
        sums = segment_sum(self.token_logps(hidden, lin_weight, bias, target), cu_seqlens)
        return self._loss(sums, lengths, ref_logps)

    def _checked(self, hidden: Tensor, target: Tensor) -> Tensor:
        if hidden.dim() != 3 or target.shape != hidden.shape[:2] or target.shape[0] % 2 or not target.shape[0]:
            raise ValueError(
                "_input, target: expected (B, L, D) and (B, L) with an even B, chosen first; got "
                f"{tuple(hidden.shape)} and {tuple(target.shape)}"
            )
        return self.masked(target)

    def _loss(
        self, sums: Tensor, lengths: Tensor, ref_logps: Tensor | None, nll: Tensor | None = None
    ) -> tuple[Tensor, Aux]:
        """The loss; and chosen, rejected, cross-entropy, rewards, and what a subclass adds."""
        logps = self.reported(sums, lengths)
        reference = torch.zeros_like(logps) if ref_logps is None else ref_logps.to(logps.dtype)
        if reference.shape != logps.shape:
            raise ValueError(f"ref_logps: expected {tuple(logps.shape)}, got {tuple(reference.shape)}")
        read = sums if self.loss_reads_sums else logps
        pairs = PairLogps(*read.chunk(2), *reference.chunk(2), *lengths.chunk(2))
        loss = preference_loss(pairs, self.config).mean()
        if nll is None:
            nll = torch.zeros_like(loss)
            if self.compute_nll_loss:
                nll = -sums.chunk(2)[0].sum() / pairs.chosen_len.sum()
        loss = loss + self.alpha * nll
        rewards = (self.config.beta * (logps - reference).detach()).chunk(2)
        chosen, rejected = logps.detach().chunk(2)
        return loss, (chosen, rejected, nll.detach(), *rewards, *self._extras(pairs))

    def _extras(self, pairs: PairLogps) -> Aux:
        return ()

    def _with_logits(self, aux: Aux, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Aux:
        """Put Liger's mean logits in their place."""
        per_half = hidden.shape[0] // 2 * hidden.shape[1] * weight.shape[0]
        chosen, rejected = (half.sum() / per_half for half in logit_sums(hidden, weight, bias).chunk(2))
        return *aux[:2], chosen, rejected, *aux[2:]


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
        super().__init__(
            LossConfig(loss_type=loss_type, beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau),
            ignore_index,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
            average_log_prob=average_log_prob,
            memory_budget=memory_budget,
            backend=backend,
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
        *,
        memory_budget: int = 2 * 2**30,
        backend: Backend = "auto",
    ) -> None:
        """Arguments as in `FusedLinearDPOLoss`."""
        super().__init__(
            LossConfig(loss_type="cpo", beta=beta, label_smoothing=label_smoothing),
            ignore_index,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
            average_log_prob=average_log_prob,
            memory_budget=memory_budget,
            backend=backend,
        )


class FusedLinearSimPOLoss(FusedLinearPreferenceLoss):
    """SimPO from hidden states, a drop-in for `LigerFusedLinearSimPOLoss`."""

    loss_reads_sums = True

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
        *,
        memory_budget: int = 2 * 2**30,
        backend: Backend = "auto",
    ) -> None:
        """`gamma`: the margin asked for, after beta; other arguments as in `FusedLinearDPOLoss`."""
        super().__init__(
            LossConfig(loss_type="simpo", beta=beta, label_smoothing=label_smoothing, simpo_gamma=gamma),
            ignore_index,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
            average_log_prob=True,
            memory_budget=memory_budget,
            backend=backend,
        )


class FusedLinearORPOLoss(FusedLinearPreferenceLoss):
    """ORPO from hidden states, a drop-in for `LigerFusedLinearORPOLoss`."""

    loss_reads_sums = True

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
        *,
        memory_budget: int = 2 * 2**30,
        backend: Backend = "auto",
    ) -> None:
        """Arguments as in `FusedLinearDPOLoss`; beta weighs the odds ratio."""
        super().__init__(
            LossConfig(loss_type="odds_ratio", beta=beta),
            ignore_index,
            alpha=1.0,
            compute_nll_loss=compute_nll_loss,
            average_log_prob=True,
            memory_budget=memory_budget,
            backend=backend,
        )

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, Aux]:
        """As in `FusedLinearPreferenceLoss`, and two figures more: the mean log sigmoid and the mean log odds ratio.

        Args:
            lin_weight, _input, target, bias: as there.
            nll_target: (B, L) int64, targets of the cross-entropy where they are others (the prompt's too, say); of its
                first half, since only chosen answers have it.
        """
        target, (lin_weight, bias) = self._checked(_input, target), whole_head(lin_weight, bias)
        sums = self.sums(_input, lin_weight, bias, target)
        nll = None
        if self.compute_nll_loss and nll_target is not None:
            half = target.shape[0] // 2
            own = self.masked(nll_target[:half])
            nll = -self.sums(_input[:half], lin_weight, bias, own).sum() / (own >= 0).sum()
        loss, aux = self._loss(sums, (target >= 0).sum(1), None, nll)
        return loss, self._with_logits(aux, _input, lin_weight, bias)

    def _extras(self, pairs: PairLogps) -> Aux:
        log_odds = log_odds_ratio(pairs).detach()
        return nn.functional.logsigmoid(log_odds).mean(), log_odds.mean()
