"""Log-probabilities of target tokens straight from hidden states: LM head, log-softmax and gather in one.

With logits z_i = f(h_i Wᵀ + b) / temperature, f the identity or Gemma's softcap f(x) = cap tanh(x / cap), and y_i the
target of row i:

    m_i = max_{j≠y} z_ij      S_i = sum_{j≠y} exp(z_ij - m_i)      d_i = m_i + log S_i - z_iy
    logp_i = log sigmoid(-d_i)

Leaving the target out of the sum keeps confident tokens exact: with p = 1 - 3e-5 the usual logsumexp(z) - z_y loses
three digits to the 1 in 1 + 3e-5. For an upstream gradient c_i, with E_ij = exp(z_ij - m_i) for j ≠ y and E_iy = -S_i,

    dL/dz_ij = v_i E_ij,   v_i = -c_i sigmoid(d_i) / S_i        so   dH = v ⊙ (E W),   dW = Eᵀ (v ⊙ H),   db = Eᵀ v

The forward leaves E in place of the logits, so the backward is two products and nothing else touches N x V numbers:
3 NVD in all (1 NVD = 2·N·V·D flop), the least there is. Rows whose E does not fit `memory_budget` are computed again
in the backward (4 NVD for those).

Shapes: hidden (N, D), weight (V, D), target (N,), bias (V,). Memory beyond the results: at most `memory_budget`, or one
slice of `SLICE_BYTES` where no gradient is asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Logits of one slice of rows. Small enough to stay near the cache between product and exponential, large enough that
# the product runs at full speed; also all the memory that scoring takes.
SLICE_BYTES = 64 * 2**20


def linear_logprob_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The plain truth: all logits, torch's log_softmax, gather. (N,) in the dtype of `hidden`; give it fp64."""
    logits_NV = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logp_NV = (logits_NV / temperature).log_softmax(-1)
    logp_N = logp_NV.gather(-1, target.clamp(min=0)[:, None])[:, 0]
    return logp_N.masked_fill(target < 0, 0.0)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    memory_budget: int = 2 * 2**30,
) -> Tensor:
    """Log-probability of each row's target token, in nats.

    Args:
        hidden: (N, D) hidden states, fp32, bf16, fp16 or fp64; differentiable.
        weight: (V, D) of the LM head, same dtype; differentiable.
        target: (N,) int64 token ids; a row below 0 gives 0.0 and no gradient.
        bias: (V,), same dtype; differentiable.
        softcap: Gemma-2's cap of the logits.
        temperature: divides the logits, after the cap.
        backend: `auto` or `torch`.
        memory_budget: bytes that may be held between forward and backward.

    Returns:
        (N,) fp32 (fp64 for fp64 inputs). A row that meets an infinite weight is NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown backend.
    """
    _check(hidden, weight, target, bias, backend)
    keep = target >= 0
    if not bool(keep.all()):
        rows = keep.nonzero()[:, 0]
        logps = linear_logprob(
            hidden.index_select(0, rows),
            weight,
            target[rows],
            bias=bias,
            softcap=softcap,
            temperature=temperature,
            memory_budget=memory_budget,
        )
        return torch.zeros(len(target), dtype=logps.dtype, device=logps.device).index_copy(0, rows, logps)
    return _LinearLogprob.apply(hidden, weight, bias, target, softcap, temperature, memory_budget)


def _check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, backend: str) -> None:
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend {backend!r} is unknown; choose 'auto' or 'torch'")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden (N, D) and weight (V, D), got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"expected target (N,) int64, got {tuple(target.shape)} {target.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias (V,), got {tuple(bias.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one to the other")


class _Head:
    """The head's numbers of one call, in the dtype that it computes in."""

    def __init__(self, weight: Tensor, bias: Tensor | None, softcap: float | None, temperature: float) -> None:
        # Half-precision products must accumulate and return fp32: bf16 logits cost three digits. cuBLAS does that with
        # out_dtype; a CPU has no such product, so there the operands are widened.
        self.wide = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.weight = weight if self.wide else weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.softcap = softcap
        self.temperature = temperature

    def exponentials(self, hidden: Tensor, target: Tensor, out: Tensor, *, slopes: bool) -> tuple[Tensor, Tensor]:
        """Turn `out` (R, V) into E; returns (d, S), both (R,). `slopes` folds the cap's derivative into E."""
        if self.wide:
            torch.mm(hidden, self.weight.T, out_dtype=torch.float32, out=out)
        else:
            torch.mm(hidden.to(self.dtype), self.weight.T, out=out)
        if self.bias is not None:
            out += self.bias
        capped = None
        if self.softcap is not None:
            capped = out.div_(self.softcap).tanh_().clone() if slopes else out.div_(self.softcap).tanh_()
            out *= self.softcap
        if self.temperature != 1.0:
            out /= self.temperature
        column = target[:, None]
        z_target = out.gather(1, column)
        out.scatter_(1, column, -torch.inf)
        # With a vocabulary of one token nothing is left; a finite maximum keeps -inf - m at -inf.
        largest = out.amax(1, keepdim=True).clamp_(min=torch.finfo(out.dtype).min)
        total = out.sub_(largest).exp_().sum(1, keepdim=True)
        d = largest + total.log() - z_target
        if slopes:
            out.scatter_(1, column, -total)
            if capped is not None:
                out.mul_(capped.square_().neg_().add_(1))
        return d[:, 0], total[:, 0]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        softcap: float | None,
        temperature: float,
        memory_budget: int,
    ) -> Tensor:
        head = _Head(weight, bias, softcap, temperature)
        num_rows, vocab = len(hidden), len(weight)
        row_bytes = vocab * head.dtype.itemsize
        slice_rows = max(1, min(SLICE_BYTES, memory_budget) // row_bytes)
        differentiable = any(ctx.needs_input_grad[:3])  # type: ignore[attr-defined]
        # One slice of scratch is set aside for the rows that are not kept.
        kept = min(num_rows, memory_budget // row_bytes) if differentiable else 0
        if kept < num_rows:
            kept = max(0, kept - slice_rows)
        stored = torch.empty(kept, vocab, dtype=head.dtype, device=hidden.device)
        scratch = torch.empty(min(slice_rows, num_rows - kept), vocab, dtype=head.dtype, device=hidden.device)
        d = torch.empty(num_rows, dtype=head.dtype, device=hidden.device)
        total = torch.empty_like(d)
        for start, end in _slices(0, kept, slice_rows) + _slices(kept, num_rows, slice_rows):
            out = stored[start:end] if end <= kept else scratch[: end - start]
            d[start:end], total[start:end] = head.exponentials(
                hidden[start:end], target[start:end], out, slopes=end <= kept
            )
        if differentiable:
            ctx.save_for_backward(hidden, weight, bias, target, d, total)
            ctx.stored, ctx.slice_rows = stored, slice_rows  # type: ignore[attr-defined]
            ctx.softcap, ctx.temperature = softcap, temperature  # type: ignore[attr-defined]
        return F.logsigmoid(-d)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override]
        hidden, weight, bias, target, d, total = ctx.saved_tensors
        head = _Head(weight, bias, ctx.softcap, ctx.temperature)
        kept, slice_rows = len(ctx.stored), ctx.slice_rows
        tiny = torch.finfo(head.dtype).tiny
        v = -grad_N.to(head.dtype) * torch.sigmoid(d) / total.clamp(min=tiny) / ctx.temperature
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty(hidden.shape, dtype=head.dtype, device=hidden.device) if needs_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=head.dtype, device=weight.device) if needs_weight else None
        d_bias = torch.zeros(len(weight), dtype=head.dtype, device=weight.device) if needs_bias else None
        wide_weight = weight.to(head.dtype)
        scratch = torch.empty(min(slice_rows, len(hidden) - kept), len(weight), dtype=head.dtype, device=hidden.device)
        for start, end in ([(0, kept)] if kept else []) + _slices(kept, len(hidden), slice_rows):
            if end <= kept:
                exponentials = ctx.stored
            else:
                exponentials = scratch[: end - start]
                head.exponentials(hidden[start:end], target[start:end], exponentials, slopes=True)
            if d_hidden is not None:
                torch.mm(exponentials, wide_weight, out=d_hidden[start:end]).mul_(v[start:end, None])
            if d_weight is not None:
                d_weight.addmm_(exponentials.T, hidden[start:end].to(head.dtype) * v[start:end, None])
            if d_bias is not None:
                d_bias.addmv_(exponentials.T, v[start:end])
        ctx.stored = None
        grads = (d_hidden, hidden), (d_weight, weight), (d_bias, bias)
        return *(None if g is None else g.to(x.dtype) for g, x in grads), None, None, None, None


def _slices(start: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(i, min(i + size, end)) for i in range(start, end, size)]
