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
which lets E be kept unnormalised; a row whose odds leave the range (2^100, or 69 nats against its target)
takes its largest logit m as anchor, for which S + e^(z_y - m) stands in the place of 1 + S, and stays exact
at any distance.

N rows, V vocabulary, D hidden size. Three products of 2·N·V·D flop (two for a frozen head, one to score);
memory: the kept exponentials, at most `memory_budget`. Rows over the budget pay one product more, in the
backward. The usual fused heads make the logits again in the backward (four products): Hsu et al., "Liger
Kernel" (2024), arXiv:2410.10989; Wijmans et al., "Cut Your Losses" (2024), arXiv:2411.09009.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_fast.kernels import linear_logprob_torch
from dpo_fast.kernels.backends import Backend, choose_backend
from dpo_fast.kernels.linear_logprob_torch import Head


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
        softcap: float | None,
        scale: float,
        memory_budget: int,
        backend: str,
    ) -> Tensor:
        wants_hidden, *wants_head = ctx.needs_input_grad[:3]
        module = _implementation(backend)
        head = Head(weight, bias, softcap, scale, _product_dtype(hidden))
        frozen = wants_hidden and not any(wants_head)
        logp, ctx.state = module.forward(head, hidden, target, memory_budget, frozen=frozen)
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.softcap, ctx.scale, ctx.module = softcap, scale, module
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target = ctx.saved_tensors
        head = Head(weight, bias, ctx.softcap, ctx.scale, _product_dtype(hidden))
        gradients = ctx.module.backward(head, hidden, target, ctx.state, grad, ctx.needs_input_grad[:3])
        return *gradients, None, None, None, None, None


def _implementation(backend: str) -> Any:
    """The module that makes forward and backward; Triton's is imported when it is first used."""
    return linear_logprob_torch if backend == "torch" else import_module("dpo_fast.kernels.linear_logprob_gpu")


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: Backend = "auto",
    memory_budget: int = 2 * 2**30,
) -> Tensor:
    """Log-probabilities of `target` under softmax(cap(hidden·weightᵀ + bias) / temperature).

    Args:
        hidden: (N, D) floating point; N may be 0.
        weight: (V, D), the LM head.
        target: (N,) int64; a negative target is left out: its log-prob is 0.0 and it has no gradient. Rows
            that are left out cost a copy of the others, and no product.
        bias: (V,) or None.
        softcap: cap(x) = softcap · tanh(x / softcap), as in Gemma 2; None for none.
        temperature: divides the capped logits.
        backend: "torch", "triton" (CUDA), or "auto": Triton for CUDA tensors where it is installed, else
        torch. memory_budget: bytes that may be kept from the forward for the backward. Rows that do not fit
        are computed
            again in the backward: slower, and the same result.

    Returns:
        (N,) natural-log probabilities in fp32 (fp64 if `hidden` is), differentiable once in `hidden`,
        `weight` and `bias`, whose gradients have their own dtypes; sums over rows are made in fp32. Where
        nothing needs a gradient nothing is kept, and at most 64 MiB is used.

        Infinities follow PyTorch's log_softmax: a logit of +inf gives NaN, one of -inf has probability 0.

    Raises:
        ValueError: a shape, dtype, device or range is wrong; the message names the argument.
    """
    _check(hidden, weight, target, bias, softcap, temperature)
    chosen = choose_backend(backend, hidden)
    rows = _live_rows(target, weight.shape[0])
    if rows is not None:
        live = linear_logprob(
            hidden[rows],
            weight,
            target[rows],
            bias=bias,
            softcap=softcap,
            temperature=temperature,
            backend=backend,
            memory_budget=memory_budget,
        )
        return live.new_zeros(target.shape[0]).index_put((rows,), live)
    if chosen == "triton":
        weight = weight.to(hidden.dtype)
    inputs, scale = (hidden, weight, bias), 1 / temperature
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in inputs):
        head = Head(weight, bias, softcap, scale, _product_dtype(hidden))
        return _implementation(chosen).forward(head, hidden, target, 0)[0]
    return _LinearLogprob.apply(*inputs, target, softcap, scale, memory_budget, chosen)


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


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
) -> None:
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
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    for name, tensor in (("weight", weight), ("target", target), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: expected on {hidden.device} as hidden is, got {tensor.device}")
