"""Attention backends: each a function, its facts declared beside it.

    flash_attn_3   the flash-attn 3 package, on Hopper; no sinks
    varlen         flash attention as PyTorch ships it; no softcap, no sinks
    flash_attn     the flash-attn 2 package; no sinks
    flex           FlexAttention: computes everything
    segments       one scaled-dot-product call a segment: computes everything, on every device and in every dtype

All but `segments` are one call a layer, on a GPU in half precision. A new backend needs only a function under
`@attention_backend(...)` here. (Triton or PyTorch, for the other kernels, is backends.py's choice.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.kernels.deterministic_backward import in_fixed_order

if TYPE_CHECKING:
    from dpo_fast.kernels.prefix_attention import PrefixLayout


@dataclass(frozen=True)
class AttentionOptions:
    """What scores are made of; the notation is that of `prefix_attention.py`.

    Attributes:
        scale: factor of the scores.
        window: sliding window, the query's own token included; None for none.
        softcap: of the scores; None for none.
        sinks: (H,) logits of the heads' sinks; None for none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def window_size(self) -> tuple[int, int]:
        """As flash attention counts it: tokens to the left, without the query's own."""
        return (-1 if self.window is None else self.window - 1, 0)

    def unsupported(self, lacks: frozenset[str]) -> list[str]:
        """Names of the options among `lacks` that are set."""
        return sorted(name for name in lacks if getattr(self, name) is not None)


# Takes (T, H, d) queries of any strides, (K, H_kv, d) contiguous gathered keys and values; returns (T, H, d).
Attention = Callable[[Tensor, Tensor, Tensor, "PrefixLayout", AttentionOptions], Tensor]


@dataclass(frozen=True)
class AttentionBackend:
    """A way to compute attention over packs.

    Attributes:
        run: the computation.
        priority: of the usable backends the one with the highest is taken.
        lacks: options that it cannot compute, "softcap" or "sinks".
        is_usable: whether it can take (1, H, T, d) queries, judged by their device, dtype and shape and by what is
            installed.
    """

    run: Attention
    priority: int
    lacks: frozenset[str]
    is_usable: Callable[[Tensor], bool]


BACKENDS: dict[str, AttentionBackend] = {}


def attention_backend(
    *, priority: int, is_usable: Callable[[Tensor], bool], lacks: tuple[str, ...] = ()
) -> Callable[[Attention], Attention]:
    """Register a function in `BACKENDS` under its own name; arguments as in `AttentionBackend`."""

    def register(run: Attention) -> Attention:
        BACKENDS[run.__name__] = AttentionBackend(run, priority, frozenset(lacks), is_usable)
        return run

    return register


def choose_attention(name: str, query: Tensor, options: AttentionOptions) -> AttentionBackend:
    """The backend of that name, or for "auto" the usable one with the highest priority.

    Raises:
        ValueError: there is no such backend, or it lacks an option that is set.
    """
    if name == "auto":
        # Every layer comes here, so backends below the one that is taken are not asked what is installed.
        able = (backend for backend in BACKENDS.values() if not options.unsupported(backend.lacks))
        by_priority = sorted(able, key=lambda backend: -backend.priority)
        return next(backend for backend in by_priority if backend.is_usable(query))
    if name not in BACKENDS:
        raise ValueError(f'backend: expected "auto" or one of {", ".join(sorted(BACKENDS))}; got {name!r}')
    if unsupported := options.unsupported(BACKENDS[name].lacks):
        raise ValueError(f'backend: {name} has no {" or ".join(unsupported)}; use "auto"')
    return BACKENDS[name]


def _is_half_on_gpu(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256


def _has_flash_attn_3(query: Tensor) -> bool:
    is_installed = _is_half_on_gpu(query) and find_spec("flash_attn_interface") is not None
    return is_installed and torch.cuda.get_device_capability(query.device)[0] == 9


def _has_flash_attn(query: Tensor) -> bool:
    return _is_half_on_gpu(query) and find_spec("flash_attn") is not None


@attention_backend(priority=40, is_usable=_has_flash_attn_3, lacks=("sinks",))
def flash_attn_3(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, options: AttentionOptions) -> Tensor:
    """The flash-attn 3 package."""
    from flash_attn_interface import flash_attn_varlen_func

    return _flash_attn(flash_attn_varlen_func, q, k, v, layout, options)


@attention_backend(priority=30, is_usable=_is_half_on_gpu, lacks=("softcap", "sinks"))
def varlen(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, options: AttentionOptions) -> Tensor:
    """PyTorch's flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    arguments: dict[str, Any] = {"scale": options.scale, "window_size": options.window_size}
    if q.shape[1] != k.shape[1] and _has_parameter(varlen_attn, "enable_gqa"):
        arguments["enable_gqa"] = True
    out = varlen_attn(*(q.contiguous(), k, v, *layout.bounds), **arguments)
    assert isinstance(out, Tensor)
    return in_fixed_order(out) if layout.deterministic else out


@attention_backend(priority=20, is_usable=_has_flash_attn, lacks=("sinks",))
def flash_attn(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, options: AttentionOptions) -> Tensor:
    """The flash-attn 2 package."""
    from flash_attn import flash_attn_varlen_func

    return _flash_attn(flash_attn_varlen_func, q, k, v, layout, options)


@attention_backend(priority=10, is_usable=lambda query: _is_half_on_gpu(query) and query.shape[-1] >= 16)
def flex(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, options: AttentionOptions) -> Tensor:
    """FlexAttention, in prefix_attention_flex.py."""
    from dpo_fast.kernels.prefix_attention_flex import flex_attend

    return flex_attend(q.contiguous(), k, v, layout, options)


@attention_backend(priority=0, is_usable=lambda query: True)
def segments(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, options: AttentionOptions) -> Tensor:
    """One call a segment."""
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    outputs = [
        _segment(*parts, layout, options)
        for parts in zip(
            query.split(layout.query_lengths, dim=2),
            key.split(layout.key_lengths, dim=2),
            value.split(layout.key_lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def _flash_attn(
    call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, options: AttentionOptions
) -> Tensor:
    """Versions 2 and 3, whose arguments have the same names."""
    out = call(
        *(q.contiguous(), k, v, *layout.bounds),
        softmax_scale=options.scale,
        causal=True,
        window_size=options.window_size,
        softcap=options.softcap or 0.0,
        deterministic=True,
    )
    # Early releases of version 3 return the logsumexp as well.
    out = out[0] if isinstance(out, tuple) else out
    assert isinstance(out, Tensor)
    return out


@cache
def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    """torch 2.11's `varlen_attn` accepts fewer key heads without a keyword; 2.12 requires `enable_gqa`."""
    return name in inspect.signature(function).parameters


def _segment(query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, options: AttentionOptions) -> Tensor:
    num_queries, num_keys, window = query.shape[2], key.shape[2], options.window
    if window is not None:
        # Keys that no query of the segment sees are left out, so that long prompts cost what the window costs.
        seen = min(num_keys, num_queries + window - 1)
        key, value, num_keys = key[:, :, num_keys - seen :], value[:, :, num_keys - seen :], seen
        window = window if window < num_keys else None
    is_causal = num_queries == num_keys and window is None
    grouped = query.shape[1] != key.shape[1]
    if options.softcap is None and options.sinks is None:
        mask = None if is_causal else layout.mask(num_queries, num_keys, window)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=options.scale, enable_gqa=grouped
        )
        return in_fixed_order(out) if layout.deterministic else out
    return _by_scores(query, key, value, layout.mask(num_queries, num_keys, window), options)


def _by_scores(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """Softcap and sinks, which `scaled_dot_product_attention` lacks."""
    (_, heads, num_queries, _), (_, kv_heads, num_keys, _) = query.shape, key.shape
    q = query.reshape(1, kv_heads, heads // kv_heads, num_queries, -1)
    scores = options.scale * (q @ key[:, :, None].transpose(-1, -2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if options.sinks is not None:
        sink = options.sinks.to(scores.dtype).view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., :num_keys].to(value.dtype)
    return (weights @ value[:, :, None]).reshape(query.shape)
