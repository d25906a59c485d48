"""Attention over packs as one operator that compiled code calls, with a gradient: no graph ends at attention.

A compiler can neither trace attention's loop over segments nor flash attention's choice of kernels, and would compile
anew for each pack. The operator hides both. Inside it runs `prefix_attention` as it is, whatever the backend, and keeps
the autograd graph of that call for the operator of the backward, so that compiled attention computes, keeps and orders
exactly what uncompiled attention does.

What passes through compiled code are two numbers, each in a tensor on the host: the layout's, by which the operator
finds it, and the ticket, by which the backward finds its graph. A graph is dropped when its backward has run, or when
nothing holds its ticket any more, as after a forward whose results checkpointing throws away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from dpo_fast.kernels.prefix_attention import LAYOUTS, prefix_attention


@dataclass(frozen=True)
class _Kept:
    """A call's inputs and output with its autograd graph, and what holds its ticket."""

    inputs: tuple[Tensor, ...]
    out: Tensor
    ticket: StorageWeakRef


_kept: dict[int, _Kept] = {}
_tickets = count()


@torch.library.custom_op("dpo_fast::prefix_attention", mutates_args=())
def prefix_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    layout: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """As `prefix_attention` with `LAYOUTS[layout]`, but for the order of dimensions.

    Args:
        query: (1, T, H, d).
        key: (1, T, H_kv, d).
        value: (1, T, H_kv, d).
        sinks: (H,), or None.
        layout: `PrefixLayout.number`.
        scale: as there.
        window: as there.
        softcap: as there.
        needs_gradient: keep the graph; the caller knows, since here gradients are always off.

    Returns:
        (1, T, H, d), contiguous, and the ticket: int64 on the host.
    """
    tensors = (query, key, value) if sinks is None else (query, key, value, sinks)
    with _autograd(needs_gradient):
        inputs = tuple(x.detach().requires_grad_(needs_gradient) for x in tensors)
        q, k, v = (x.transpose(1, 2) for x in inputs[:3])
        out = prefix_attention(
            *(q, k, v, LAYOUTS[int(layout)]),
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=inputs[3] if sinks is not None else None,
        ).transpose(1, 2)
    ticket = torch.tensor(next(_tickets))
    if needs_gradient:
        for abandoned in [number for number, kept in _kept.items() if kept.ticket.expired()]:
            del _kept[abandoned]
        _kept[int(ticket)] = _Kept(inputs, out, StorageWeakRef(ticket.untyped_storage()))
    return out.detach().contiguous(), ticket


@prefix_attention_op.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("dpo_fast::prefix_attention_backward", mutates_args=())
def prefix_attention_backward_op(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, ticket: Tensor
) -> list[Tensor]:
    """Gradients of the inputs, contiguous, by the graph that the forward kept; the inputs only tell their shapes."""
    kept = _kept.pop(int(ticket), None)
    if kept is None:
        raise RuntimeError("the graph of compiled attention is gone: its backward can run only once")
    with _autograd(enabled=True):
        return [x.contiguous() for x in torch.autograd.grad(kept.out, kept.inputs, grad)]


@prefix_attention_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, ticket: Tensor) -> list[Tensor]:
    inputs = (query, key, value) if sinks is None else (query, key, value, sinks)
    return [x.new_empty(x.shape) for x in inputs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks = inputs[:4]
    ctx.has_sinks = sinks is not None
    ctx.save_for_backward(query, key, value, output[1], *([sinks] if ctx.has_sinks else []))


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    query, key, value, ticket, *sinks = ctx.saved_tensors
    grads = prefix_attention_backward_op(grad, query, key, value, sinks[0] if sinks else None, ticket)
    return *grads[:3], grads[3] if ctx.has_sinks else None, *[None] * 5


prefix_attention_op.register_autograd(_backward, setup_context=_setup_context)


@contextmanager
def _autograd(enabled: bool) -> Iterator[None]:
    """Autograd inside an operator, where PyTorch leaves it out; its graph keeps tensors whatever hooks are outside."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.ADInplaceOrView, keys.AutogradOther):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with (
        torch._C._ForceDispatchKeyGuard(included, excluded),
        torch.set_grad_enabled(enabled),
        saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        yield
