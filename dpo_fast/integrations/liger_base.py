"""From hidden states to preference losses of sequences: what the modules in liger.py and liger_kto.py are made of."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dpo_fast.config import LossConfig
from dpo_fast.integrations.arguments import loss_settings
from dpo_fast.kernels.head import HeadOptions
from dpo_fast.kernels.linear_logprob import linear_logprob
from dpo_fast.kernels.segment_sum import segment_sum
from dpo_fast.losses.objective import any_loss, preference_loss
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
    """What all of them share: from hidden states to log-probs of sequences.

    `compiled` and `chunk_size` are kept for code that reads them; nothing here is compiled or chunked.
    """

    def __init__(
        self, ignore_index: int, *, average_log_prob: bool, compiled: bool, chunk_size: int, head: HeadOptions
    ) -> None:
        """Arguments as in `FusedLinearDPOLoss`."""
        super().__init__()
        self.ignore_index = ignore_index
        self.average_log_prob = average_log_prob
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.head = head

    def masked(self, target: Tensor) -> Tensor:
        """Targets, -1 for those that do not count."""
        return target.masked_fill(target == self.ignore_index, -1)

    # Shapes inside depend on which rows have a target: a compiler gains nothing there.
    @torch.compiler.disable
    def token_logps(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        """(N,) fp32 log-probs of (N, D) hidden states' targets."""
        return linear_logprob(hidden, weight, target, bias=bias, **vars(self.head))

    def sums(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        """(B,) fp32 sums of (B, L, D) hidden states' log-probs."""
        return self.token_logps(hidden.flatten(0, 1), weight, bias, target.flatten()).view(target.shape).sum(1)

    def reported(self, sums: Tensor, lengths: Tensor) -> Tensor:
        """Log-probs as they are returned: sums, or means over tokens."""
        return sums / lengths.clamp(min=1) if self.average_log_prob else sums


def logit_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B,) fp32 sums of (B, L, D) hidden states' logits over positions and vocabulary, without making the logits."""
    weight_sum = weight.detach().float().sum(0)
    sums = hidden.detach().float().sum(1) @ weight_sum
    return sums if bias is None else sums + hidden.shape[1] * bias.detach().float().sum()


def mean_nll(sums: Tensor, lengths: Tensor) -> Tensor:
    """Nats a token over all answers; 0 if they have no token."""
    return -sums.sum() / lengths.sum().clamp(min=1)


class _OfConfig:
    """An attribute of a module that is a field of its `config`: read and, checked, written there."""

    def __init__(self, field: str) -> None:
        self.field = field

    def __get__(self, module: Any, owner: type) -> Any:
        return getattr(module.config, self.field) if module is not None else self

    def __set__(self, module: Any, value: Any) -> None:
        module.config = module.checked(loss_settings(**vars(module.config) | {self.field: value}))


class FusedLinearPreferenceLoss(FusedHead):
    """Pairs, chosen first; without a reference unless a subclass gives one."""

    beta = _OfConfig("beta")
    loss_type = _OfConfig("loss_type")
    label_smoothing = _OfConfig("label_smoothing")
    discopop_tau = _OfConfig("discopop_tau")
    gamma = _OfConfig("simpo_gamma")

    def __init__(
        self,
        config: LossConfig,
        ignore_index: int,
        *,
        alpha: float,
        compute_nll_loss: bool,
        average_log_prob: bool,
        compiled: bool,
        chunk_size: int,
        head: HeadOptions,
    ) -> None:
        """Take a loss's settings; the rest as in `FusedLinearDPOLoss`.

        Raises:
            ValueError: an unknown loss, a value that it cannot have, or an option that it does not read.
        """
        super().__init__(
            ignore_index, average_log_prob=average_log_prob, compiled=compiled, chunk_size=chunk_size, head=head
        )
        self.config = self.checked(config)
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss

    def checked(self, config: LossConfig) -> LossConfig:
        """The configuration, unless the module cannot have it."""
        if self.average_log_prob and any_loss(config, lambda facts: facts.pools_tokens):
            raise ValueError(
                f"average_log_prob=True: {config.loss_type} averages over all tokens of the batch; leave it off"
            )
        return config

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
            The mean loss; and (S / 2,) log-probs of chosen and rejected, the cross-entropy, and the rewards of both.
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
        # Means are log-probs of one token: a loss that divides by lengths must not divide them again.
        read = torch.ones_like(lengths) if self.average_log_prob else lengths
        pairs = PairLogps(*logps.chunk(2), *reference.chunk(2), *read.chunk(2))
        loss = preference_loss(pairs, self.config).mean()
        if nll is None:
            nll = torch.zeros_like(loss)
            if self.compute_nll_loss:
                nll = mean_nll(sums.chunk(2)[0], lengths.chunk(2)[0])
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
