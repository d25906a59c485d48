"""Log-probabilities of target tokens from logits that exist already.

    m_i = max_{j ≠ y} z_ij         S_i = Σ_{j ≠ y} e^(z_ij - m_i)
    logp_i = -log(1 + S_i e^(m_i - z_y,i))
    d loss / d z_ij = c_i (δ_{j y} - p_ij)

The target is left out of the sum, so that confident tokens keep their relative accuracy. N rows of V logits
are read once and no (N, V) tensor is made in the forward; the backward reads them again and writes the
gradient, into the logits' own memory if asked. Rows are taken in slices that stay in the cache.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_fast.kernels.backends import Backend, choose_backend
from dpo_fast.kernels.linear_logprob_torch import log1p_odds

# 2^20 logits, 4 MiB in fp32, are read, shifted, exponentiated and summed while they are in the cache.
SLICE = 2**20


def logprob_ref(logits: Tensor, target: Tensor) -> Tensor:
    """`logprob` as plain PyTorch writes it, in the dtype of `logits`: the truth in tests when given fp64."""
    logp = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return torch.where(target >= 0, logp, 0.0)


def _slices(logits_NV: Tensor) -> list[slice]:
    num_rows, vocab = logits_NV.shape
    step = max(SLICE // vocab, 1)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def forward(logits_NV: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) log-probs, 0 where `target` < 0, and (N,) log-sum-exp of the logits."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    logp = torch.empty(target.shape, dtype=dtype, device=target.device)
    lse = torch.empty_like(logp)
    for rows in _slices(logits_NV):
        tile = logits_NV[rows].to(dtype, copy=True)
        index = target[rows].clamp(min=0)[:, None]
        z_target = tile.gather(1, index)[:, 0]
        tile.scatter_(1, index, -torch.inf)
        # Where only the target is possible the maximum is -inf, and -inf - -inf is no number.
        peak = tile.amax(1).clamp_(min=torch.finfo(dtype).min)
        odds = tile.sub_(peak[:, None]).exp_().sum(1)
        # As in log_softmax, an infinite logit is no number, the target's own, too: it is an overflow somewhere before.
        logp[rows] = torch.where(z_target == torch.inf, torch.nan, -log1p_odds(odds, peak - z_target))
        lse[rows] = z_target - logp[rows]
    return torch.where(target >= 0, logp, 0.0), lse


def backward(logits_NV: Tensor, target: Tensor, lse: Tensor, logp: Tensor, grad: Tensor, out: Tensor) -> None:
    """Write the gradient to `out`, which may be `logits_NV`."""
    live = target >= 0
    for rows in _slices(logits_NV):
        index = target[rows].clamp(min=0)[:, None]
        tile = logits_NV[rows].to(lse.dtype, copy=True)
        tile.sub_(lse[rows, None]).exp_()
        tile.scatter_(1, index, torch.expm1(logp[rows, None]))
        tile.mul_(-grad[rows, None])
        # A row without a target has no gradient, whatever its logits: 0 · NaN would be one.
        out[rows] = tile.masked_fill_(~live[rows, None], 0.0)


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target: Tensor, inplace_backward: bool, backend: str) -> Tensor:
        logp, lse = _implementation(backend).forward(logits_NV, target)
        ctx.save_for_backward(logits_NV, target, lse, logp)
        ctx.inplace_backward, ctx.backend = inplace_backward, backend
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, target, lse, logp = ctx.saved_tensors
        out = logits_NV.detach() if ctx.inplace_backward else torch.empty_like(logits_NV)
        _implementation(ctx.backend).backward(logits_NV, target, lse, logp, grad, out)
        return out, None, None, None


def _implementation(backend: str) -> Any:
    """The module that makes forward and backward; Triton's is imported when it is first used."""
    name = "logprob" if backend == "torch" else "logprob_triton"
    return import_module(f"dpo_fast.kernels.{name}")


def logprob(logits: Tensor, target: Tensor, *, inplace_backward: bool = False, backend: Backend = "auto") -> Tensor:
    """Log-probabilities of `target` under softmax(logits).

    Args:
        logits: (..., V) floating point.
        target: (...) int64; a negative target gives 0.0 and no gradient.
        inplace_backward: let the backward overwrite the values of `logits` with its gradient, which saves a
            tensor of the size of the logits. For logits that nothing else reads; the backward can then run
            once.

    Returns:
        (...) in fp32 (fp64 for fp64 logits), differentiable once. Infinities follow PyTorch's log_softmax: a logit of
        +inf gives NaN, one of -inf has probability 0.

    Raises:
        ValueError: shapes or dtypes do not fit, a target is not below V, or `inplace_backward` is asked for
            logits that are not contiguous or are a leaf, whose values are somebody's parameter.
    """
    if logits.dim() == 0 or not logits.is_floating_point():
        raise ValueError(f"logits: expected (..., V) floating point, got {tuple(logits.shape)} {logits.dtype}")
    if target.shape != logits.shape[:-1] or target.dtype != torch.int64:
        raise ValueError(f"target: expected {tuple(logits.shape[:-1])} int64, got {tuple(target.shape)} {target.dtype}")
    vocab = logits.shape[-1]
    if target.device.type == "cpu" and target.numel() and int(target.max()) >= vocab:
        raise ValueError(f"target: expected ids below {vocab}, the last size of logits, got {int(target.max())}")
    if inplace_backward and not logits.is_contiguous():
        raise ValueError("inplace_backward: expected contiguous logits; call .contiguous(), or leave it off")
    if inplace_backward and logits.requires_grad and logits.is_leaf:
        raise ValueError("inplace_backward: logits are a leaf, whose values would be lost; leave it off")
    flat = logits.reshape(-1, vocab).contiguous()
    chosen = choose_backend(backend, logits)
    return _Logprob.apply(flat, target.reshape(-1).contiguous(), inplace_backward, chosen).view(target.shape)


def sequence_logprob(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, *, inplace_backward: bool = False
) -> Tensor:
    """Summed log-probabilities of whole sequences, as Hugging Face's causal language models take labels.

    Args:
        logits: (B, L, V); position t predicts token t + 1.
        labels: (B, L) int64, not shifted; `ignore_index` marks prompt and padding.
        ignore_index: a label that is left out; other negative labels are left out, too.
        inplace_backward: as for `logprob`.

    Returns:
        (B,) sums over each sequence's labels but the first, added in fp64, in fp32 (fp64 for fp64 logits).
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"expected logits (B, L, V) and labels (B, L), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    # The labels move, not the logits: a slice of the logits would be copied.
    target = torch.full_like(labels, -1)
    target[:, :-1] = labels[:, 1:].masked_fill(labels[:, 1:] == ignore_index, -1)
    logp = logprob(logits, target, inplace_backward=inplace_backward)
    return logp.double().sum(1).to(logp.dtype)
