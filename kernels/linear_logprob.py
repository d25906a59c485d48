"""Log-probabilities of target tokens straight from hidden states and the LM head: the logits are never kept.

For a row with hidden state h_i and target y_i, the target's own logit is one dot product, known before the
product with the head. Take it as anchor:

    z_ij = h_i·W_j                 (+ bias, softcap, 1 / temperature)
    E_ij = e^(z_ij - z_y,i)        0 at j = y_i
    S_i  = Σ_j E_ij                the odds against the target
    logp_i = -log(1 + S_i)

    with c_i = d loss / d logp_i:  E[i, y_i] <- -S_i ;  v_i = -c_i / (1 + S_i)
    dH = v ⊙ (E·W)                 dW = Eᵀ·(v ⊙ H)

E is made once, in the forward, without a row maximum, a log-softmax or a second pass; the backward is its two
bare products. Leaving the target out of S and using log1p keeps relative accuracy for confident tokens, whose
log-probs are differences of nearly equal numbers in the usual form. bf16 and fp32 share their exponent range,
which lets E be kept unnormalised; a row whose odds leave the range (2^46, or 32 nats against its target) is recomputed
in fp64 with its largest logit m as anchor, for which S + e^(z_y - m) replaces 1 + S, and stays exact at any distance.

N rows, V vocabulary, D hidden size. Three products of 2·N·V·D flop (two for a frozen head, one to score);
memory: the kept exponentials, at most `memory_budget`. Rows over the budget pay one product more, in the
backward. The usual fused heads recompute the logits in the backward (four products): Hsu et al., "Liger
Kernel" (2024), arXiv:2410.10989; Wijmans et al., "Cut Your Losses" (2024), arXiv:2411.09009.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_fast.kernels import linear_logprob_torch
from dpo_fast.kernels.backends import choose_backend
from dpo_fast.kernels.head import Head, HeadKeywords, HeadOptions
from dpo_fast.kernels.token_stats import TokenStats


def linear_logprob_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`linear_logprob` as plain PyTorch writes it, in the inputs' dtype; in fp64 the truth of the tests."""
    logits_NV = hidden @ weight.t()
    if bias is not None:
        logits_NV = logits_NV + bias
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logp_NV = (logits_NV / temperature).log_softmax(-1)
    logp = logp_NV.gather(-1, target.clamp(min=0)[:, None])[:, 0]
    return torch.where(target >= 0, logp, 0.0)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        main_grad: Tensor | None,
        call: _Call,
    ) -> tuple[Tensor, ...]:
        wants_hidden, *wants_head = ctx.needs_input_grad[:3]
        frozen = wants_hidden and not any(wants_head)
        head = call.head(hidden, weight, bias)
        logp, ctx.state, stats = call.implementation.forward(
            head, hidden, target, call.options.memory_budget, frozen=frozen, want_stats=call.want_stats
        )
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.call, ctx.main_grad = call, main_grad
        ctx.mark_non_differentiable(*(stats or ()))
        return logp, *(stats or ())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target = ctx.saved_tensors
        head = ctx.call.head(hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):  # a backward may be called inside of one
            gradients = ctx.call.implementation.backward(
                head, hidden, target, ctx.state, grad, ctx.needs_input_grad[:3], ctx.main_grad
            )
        return *gradients, None, None, None


@dataclass(frozen=True)
class _Call:
    """One call: what was asked for, and the backend that was chosen."""

    options: HeadOptions
    backend: str
    want_stats: bool

    @property
    def implementation(self) -> Any:
        """The module with forward and backward; Triton's is imported on first use."""
        if self.backend == "torch":
            return linear_logprob_torch
        return import_module("dpo_fast.kernels.linear_logprob_gpu")

    def head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
        """The head, with the dtype of the products."""
        options, dtype = self.options, _product_dtype(hidden)
        return Head(weight, bias, options.softcap, 1 / options.temperature, dtype, options.autotune)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    main_grad: Tensor | None = None,
    **options: Unpack[HeadKeywords],
) -> Tensor:
    """Log-probabilities of `target` under softmax(cap(hidden·weightᵀ + bias) / temperature).

    Args:
        hidden: (N, D) floating point; N may be 0.
        weight: (V, D), the LM head.
        target: (N,) int64; a negative target is left out: its log-prob is 0.0 and it has no gradient. Rows that
            are left out cost a copy of the others, and no product.
        bias: (V,) or None.
        main_grad: (V, D) in fp32 (fp64 if `hidden` is) that the backward adds dW to, for callers who manage gradients
            themselves or tie the head to the embeddings; `weight`, which must require a gradient, then gets none here.
        **options: fields of `HeadOptions`: `softcap`, `temperature`, `backend`, `memory_budget`, `assume_valid`,
            `autotune`.

    Under autocast the inputs are cast to its dtype, as for a matrix product.

    Returns:
        (N,) natural-log probabilities in fp32 (fp64 if `hidden` is), differentiable once in `hidden`, `weight` and
        `bias`, whose gradients have their own dtypes; sums over rows are made in fp32. If nothing needs a gradient
        nothing is kept, and at most 64 MiB is used (except in the one call in which autotune chooses; see autotune.py).

        Infinities follow PyTorch's log_softmax: a logit of +inf gives NaN, one of -inf has probability 0.

    Raises:
        ValueError: a shape, dtype, device or range is wrong; the message names the argument.
    """
    return _log_probs(hidden, weight, bias, target, main_grad, HeadOptions(**options), want_stats=False)[0]


def linear_logprob_with_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    main_grad: Tensor | None = None,
    **options: Unpack[HeadKeywords],
) -> tuple[Tensor, TokenStats]:
    """`linear_logprob` and, from the same pass over the head, each row's `TokenStats`, which have no gradient."""
    logp, *stats = _log_probs(hidden, weight, bias, target, main_grad, HeadOptions(**options), want_stats=True)
    return logp, TokenStats(*stats)


def _log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    main_grad: Tensor | None,
    options: HeadOptions,
    *,
    want_stats: bool,
) -> tuple[Tensor, ...]:
    """Log-probs and, if `want_stats`, the figures of `TokenStats`."""
    _check(hidden, weight, bias, target)
    device = hidden.device.type
    autocasts = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    if autocasts:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check_main_grad(hidden, weight, main_grad)
    call = _Call(options, choose_backend(options.backend, hidden), want_stats)
    rows = None if options.assume_valid else _live_rows(target, weight.shape[0])
    live = target
    if rows is not None:
        hidden, live = hidden[rows], target[rows]
    if call.backend == "triton":
        weight = weight.to(hidden.dtype)
    # The implementations choose their own dtypes.
    with torch.autocast(device, enabled=False) if autocasts else nullcontext():
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
            results = _LinearLogprob.apply(hidden, weight, bias, live, main_grad, call)
        else:
            head = call.head(hidden, weight, bias)
            logp, _, stats = call.implementation.forward(head, hidden, live, 0, want_stats=want_stats)
            results = (logp, *(stats or ()))
    if rows is None:
        return results
    return tuple(x.new_zeros(target.shape[0]).index_put((rows,), x) for x in results)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _live_rows(target: Tensor, vocab: int) -> Tensor | None:
    """Indices of the rows with a target, or None for all of them. Waits for the device once."""
    if target.shape[0] == 0:
        return None
    low, high = (int(x) for x in torch.stack(torch.aminmax(target)).tolist())
    if high >= vocab:
        raise ValueError(f"target: expected token ids below the {vocab} rows of weight, got {high}")
    return (target >= 0).nonzero()[:, 0] if low < 0 else None


def _check_main_grad(hidden: Tensor, weight: Tensor, main_grad: Tensor | None) -> None:
    if main_grad is None:
        return
    dtype = _product_dtype(hidden)
    if main_grad.shape != weight.shape or main_grad.dtype != dtype or main_grad.device != weight.device:
        raise ValueError(
            f"main_grad: expected {tuple(weight.shape)} {dtype} on {weight.device}, got {tuple(main_grad.shape)} "
            f"{main_grad.dtype} on {main_grad.device}"
        )
    if not weight.requires_grad:
        raise ValueError("main_grad: weight does not require a gradient, so there is nothing to add; set requires_grad")


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden: expected (N, D) floating point, got {tuple(hidden.shape)} {hidden.dtype}")
    if weight.dim() != 2 or not weight.is_floating_point() or weight.shape[1] != hidden.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"weight: expected (V, {hidden.shape[1]}) floating point, got {tuple(weight.shape)} {weight.dtype}"
        )
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target: expected ({hidden.shape[0]},) int64, got {tuple(target.shape)} {target.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias: expected ({weight.shape[0]},) floating point, got {tuple(bias.shape)} {bias.dtype}")
    for name, tensor in (("weight", weight), ("target", target), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: expected on {hidden.device} as hidden is, got {tensor.device}")
