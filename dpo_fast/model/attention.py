"""Packs in transformers' attention interface, with their layout as a keyword argument."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_fast.kernels.prefix_attention import PrefixLayout, prefix_attention
from dpo_fast.kernels.prefix_attention_op import prefix_attention_op

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED_ATTENTION = "dpo_fast_packed"
# Keyword arguments of attention that change what it computes and that packs do not honour; a model that uses one is
# scored answer by answer.
_UNSUPPORTED_ATTENTION = ("position_bias", "alibi", "chunk_size", "indices", "block_indices")


class CannotPack(Exception):
    """A model whose sequences cannot share a prompt; the message says why."""


class NoLayout(CannotPack, ValueError):
    """Attention that reads packs was given none: a plain batch, or a model that keeps keyword arguments to itself."""


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let the model's attention read packs. This persists: gradient checkpointing runs forwards in the backward."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
    model.set_attn_implementation(PACKED_ATTENTION)


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_layout: PrefixLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, H, T, d) queries in, (1, T, H, d) out."""
    if packed_layout is None:
        raise NoLayout(
            "this model is set to read packs and got a plain batch; "
            'call model.set_attn_implementation("sdpa") before using it on its own'
        )
    if attention_mask is not None:
        raise CannotPack(f"{type(module).__name__} masks its attention by itself")
    for name in _UNSUPPORTED_ATTENTION:
        if kwargs.get(name) is not None:
            raise CannotPack(f"{type(module).__name__} uses {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = _in_one_dtype(query, key, value)
    if torch.compiler.is_compiling():
        needs_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        rows = (x.transpose(1, 2) for x in (query, key, value))
        return prefix_attention_op(
            *(*rows, s_aux, packed_layout.number, scale, sliding_window, softcap, needs_gradient)
        )[0], None
    out = prefix_attention(
        query, key, value, packed_layout, scale=scale, window=sliding_window, softcap=softcap, sinks=s_aux
    )
    return out.transpose(1, 2), None


def _in_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys in the dtype that attention runs in, as transformers' own flash attention has them.

    Rotary embeddings and norms of queries leave them in fp32 under autocast, and in some models of half-precision
    weights, while the values come from a product and are in the dtype that all three are meant to have.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def use_own_attention(model: PreTrainedModel) -> None:
    """Undo `use_packed_attention`: the model reads plain batches through the best attention of its own."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # this architecture has none
        model.set_attn_implementation("eager")


def reads_packs(model: PreTrainedModel) -> bool:
    """Whether the model is set to packed attention at the moment."""
    return bool(model.config._attn_implementation == PACKED_ATTENTION)


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model reads plain batches inside, and what it read before outside."""
    was_packed = reads_packs(model)
    use_own_attention(model)
    try:
        yield
    finally:
        if was_packed:
            use_packed_attention(model)


@contextmanager
def packed_attention(*models: PreTrainedModel) -> Iterator[None]:
    """The models read packs inside, and what they read before outside."""
    changed = [model for model in models if not reads_packs(model)]
    for model in changed:
        use_packed_attention(model)
    try:
        yield
    finally:
        for model in changed:
            use_own_attention(model)
