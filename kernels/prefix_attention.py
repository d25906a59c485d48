"""Causal attention over packs that hold each prompt once.

A pack is cut into segments, prompts and answers. The queries of segment m are rows cu_q[m]:cu_q[m+1] of the pack; its
keys are rows kv_index[cu_k[m]:cu_k[m+1]]: for a prompt its own rows, for an answer its prompt's and then its own. Query
i of a segment with L_q queries and L_k keys stands at place p = L_k - L_q + i and sees keys j <= p (causal, aligned at
the bottom right), with a sliding window of W also j > p - W:

    x_ij = cap(scale q_i · k_j)             cap(x) = softcap tanh(x / softcap), as in Gemma 2
    out_i = Σ_j e^x_ij v_j / (e^s + Σ_j e^x_ij)         s: the head's sink, as in gpt-oss; without one e^s = 0

An answer of A tokens after a prompt of P pays A (P + A) score entries, and the prompt pays P² once for all answers.

The ways. On a GPU in half precision one call for all segments:

    flash_attn_3   the flash-attn 3 package, on Hopper, if it is installed
    varlen         flash attention as PyTorch ships it; lacks caps
    flash_attn     the flash-attn 2 package, if it is installed: for caps
    flex           FlexAttention: for sinks, which the others lack, and for caps where no package is installed

Everywhere else, and in fp32 on a GPU, one scaled-dot-product call per segment. `_WAYS` has what each of them can do.

PyTorch's own kernels add up dQ in whatever order their blocks end, unless they are told otherwise. A layout that is
`deterministic` tells them, for the backward of attention alone: two runs then give the same bits. The packages are
always told; FlexAttention has a fixed order of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from dpo_fast.kernels.gather_rows import RowIndex, gather_rows

Way = Literal["auto", "flash_attn_3", "varlen", "flash_attn", "flex", "segments"]


@dataclass(frozen=True)
class PrefixLayout:
    """What the attention of every layer reads of one pack; made once a forward by `prefix_layout`.

    Attributes:
        query_lengths, key_lengths: M lengths, one a segment.
        kv_index: (K,) rows that form the keys, and the way back.
        cu_seqlens_q, cu_seqlens_k: (M + 1,) int32 bounds on the device of `kv_index`.
        deterministic: whether the backward adds in a fixed order on a GPU, too.
        masks, block_masks: made when first needed, shared by all layers; FlexAttention's by window.
    """

    query_lengths: list[int]
    key_lengths: list[int]
    kv_index: RowIndex
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    deterministic: bool = True
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    block_masks: dict[int | None, Any] = field(default_factory=dict)

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """What a variable-length call wants to know: both bounds, and the longest of both."""
        return self.cu_seqlens_q, self.cu_seqlens_k, max(self.query_lengths), max(self.key_lengths)

    def mask(self, num_queries: int, num_keys: int, window: int | None) -> Tensor:
        """(L_q, L_k) bool, True where a query may look; the last query stands at the last key."""
        key = (num_queries, num_keys, window)
        if key not in self.masks:
            ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=self.cu_seqlens_q.device)
            seen = ones.tril(num_keys - num_queries)
            self.masks[key] = seen if window is None else seen.triu(num_keys - num_queries - window + 1)
        return self.masks[key]


def prefix_layout(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kv_index: Tensor,
    num_rows: int | None = None,
    *,
    deterministic: bool = True,
) -> PrefixLayout:
    """The layout of a pack, from the (M + 1,) int64 bounds of `PackedBatch` on the CPU and (K,) int64 rows.

    `num_rows` counts rows of padding after the last segment as well; None is none. `deterministic`: see `PrefixLayout`.
    """
    _leave_determinism()  # of a backward that ended by an exception, and whose end was never told
    device = kv_index.device
    return PrefixLayout(
        cu_seqlens_q.diff().tolist(),
        cu_seqlens_k.diff().tolist(),
        RowIndex.of(kv_index, int(cu_seqlens_q[-1]) if num_rows is None else num_rows),
        cu_seqlens_q.to(device, torch.int32, non_blocking=True),
        cu_seqlens_k.to(device, torch.int32, non_blocking=True),
        deterministic,
    )


def prefix_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PrefixLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`prefix_attention` as the formula has it, query by query; the truth of the tests when given fp64."""
    repeats = query.shape[1] // key.shape[1]
    keys, values = (x[0].repeat_interleave(repeats, 0)[:, layout.kv_index.index] for x in (key, value))
    out = torch.zeros_like(query)
    first_query = first_key = 0
    for num_queries, num_keys in zip(layout.query_lengths, layout.key_lengths, strict=True):
        for i in range(num_queries):
            place = num_keys - num_queries + i
            start = 0 if window is None else max(0, place - window + 1)
            seen = slice(first_key + start, first_key + place + 1)
            scores = scale * (keys[:, seen] @ query[0, :, first_query + i, :, None])[..., 0]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[:, None].to(scores.dtype)], 1)
            weights = scores.softmax(-1)[:, : place + 1 - start]
            out[0, :, first_query + i] = (weights[:, None] @ values[:, seen])[:, 0]
        first_query += num_queries
        first_key += num_keys
    return out


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PrefixLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    way: Way = "auto",
) -> Tensor:
    """Attention of all segments of a pack.

    Args:
        query: (1, H, T, d), rotated.
        key, value: (1, H_kv, T, d) with H a multiple of H_kv (grouped queries); never repeated.
        layout: of the pack.
        scale: factor of the scores, usually d ** -0.5.
        window: sliding window W, the query's own token included; None for none.
        softcap: of the scores; None for none.
        sinks: (H,) logits of the heads' sinks; None for none.
        way: "flash_attn_3", "flash_attn" (those packages; CUDA, half precision, no sinks), "varlen" (CUDA, half
            precision, no softcap, no sinks), "flex" (CUDA), "segments" (everywhere), or "auto": the fastest that can.

    Returns:
        (1, H, T, d) in the dtype of `query`; rows after the last segment, which are padding, are 0.
    """
    if way == "auto":
        way = _best_way(query, softcap, sinks)
    num_rows, num_queries = query.shape[2], sum(layout.query_lengths)
    if num_queries < num_rows:
        query = query[:, :, :num_queries]
        out = prefix_attention(
            query, key, value, layout, scale=scale, window=window, softcap=softcap, sinks=sinks, way=way
        )
        return F.pad(out, (0, 0, 0, num_rows - num_queries))
    if way != "segments":
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        q, k, v = q.contiguous(), gather_rows(k, layout.kv_index), gather_rows(v, layout.kv_index)
        out = _WAYS[way](q, k, v, layout, scale, window, softcap, sinks)
        return out.transpose(0, 1)[None]
    keys, values = (gather_rows(x[0].transpose(0, 1), layout.kv_index).transpose(0, 1)[None] for x in (key, value))
    outputs = [
        _segment(q, k, v, layout, scale, window, softcap, sinks)
        for q, k, v in zip(
            query.split(layout.query_lengths, dim=2),
            keys.split(layout.key_lengths, dim=2),
            values.split(layout.key_lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=2)


def _best_way(query: Tensor, softcap: float | None, sinks: Tensor | None) -> Way:
    dim = query.shape[-1]
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16) or dim > 256:
        return "segments"
    if sinks is None:
        if find_spec("flash_attn_interface") and torch.cuda.get_device_capability(query.device)[0] == 9:
            return "flash_attn_3"
        if softcap is None:
            return "varlen"
        if find_spec("flash_attn"):
            return "flash_attn"
    return "flex" if dim >= 16 else "segments"


def _window_size(window: int | None) -> tuple[int, int]:
    """Flash attention counts the tokens to the left, ours the token itself as well."""
    return (-1 if window is None else window - 1, 0)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float, window: int | None, *unsupported: Any
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale, "window_size": _window_size(window)}
    if q.shape[1] != k.shape[1] and _has_parameter(varlen_attn, "enable_gqa"):
        options["enable_gqa"] = True
    out = varlen_attn(*(q, k, v, *layout.bounds), **options)
    assert isinstance(out, Tensor)
    return _in_fixed_order(out) if layout.deterministic else out


@cache
def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    """torch 2.11's `varlen_attn` takes fewer key heads unasked and has no keyword for it; 2.12 wants to be asked."""
    return name in inspect.signature(function).parameters


def _in_fixed_order(out: Tensor) -> Tensor:
    """Run the backward of the attention kernel that made `out` under deterministic algorithms, and nothing else."""
    node = out.grad_fn if out.is_cuda else None
    # Without such a kernel attention is plain products, whose order is fixed, and which cuBLAS would refuse there.
    if node is not None and "att" in node.name().lower():
        _run_deterministically(node)
    return out


def _run_deterministically(node: Node) -> None:
    node.register_prehook(_enter_determinism)
    node.register_hook(_leave_determinism)


# How PyTorch was set before the backward of attention that runs now; empty while none does.
_set_before: list[tuple[int, bool]] = []


def _enter_determinism(*_: object) -> None:
    settings: Any = torch.utils.deterministic
    if not _set_before:
        _set_before.append((torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory))
    # A warning alone would leave the order as it is; and what the kernels write need not be filled beforehand.
    torch.set_deterministic_debug_mode("error")
    settings.fill_uninitialized_memory = False


def _leave_determinism(*_: object) -> None:
    settings: Any = torch.utils.deterministic
    if _set_before:
        mode, settings.fill_uninitialized_memory = _set_before.pop()
        torch.set_deterministic_debug_mode(mode)


def _flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
    *unsupported: Any,
    package: str = "flash_attn",
) -> Tensor:
    """Versions 2 and 3, whose arguments have the same names."""
    if package == "flash_attn":
        from flash_attn import flash_attn_varlen_func
    else:
        from flash_attn_interface import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        *(q, k, v, *layout.bounds),
        softmax_scale=scale,
        causal=True,
        window_size=_window_size(window),
        softcap=softcap or 0.0,
        deterministic=True,
    )
    # Early releases of version 3 return the logsumexp as well.
    out = out[0] if isinstance(out, tuple) else out
    assert isinstance(out, Tensor)
    return out


def _flex(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    from dpo_fast.kernels.prefix_attention_flex import flex

    return flex(q, k, v, *options)


# Each takes (T, H, d) queries, (K, H_kv, d) gathered keys and values, the layout, scale, window, softcap and sinks, and
# returns (T, H, d).
_WAYS: dict[str, Callable[..., Tensor]] = {
    "flash_attn_3": partial(_flash_attn, package="flash_attn_interface"),
    "varlen": _varlen,
    "flash_attn": _flash_attn,
    "flex": _flex,
}


def _segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PrefixLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    if window is not None:
        # Keys that no query of the segment sees are left out, so that long prompts cost what the window costs.
        seen = min(num_keys, num_queries + window - 1)
        key, value, num_keys = key[:, :, num_keys - seen :], value[:, :, num_keys - seen :], seen
        window = window if window < num_keys else None
    is_causal = num_queries == num_keys and window is None
    grouped = query.shape[1] != key.shape[1]
    if softcap is None and sinks is None:
        mask = None if is_causal else layout.mask(num_queries, num_keys, window)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
        return _in_fixed_order(out) if layout.deterministic else out
    heads, kv_heads = query.shape[1], key.shape[1]
    q = query.reshape(1, kv_heads, heads // kv_heads, num_queries, -1)
    scores = scale * (q @ key[:, :, None].transpose(-1, -2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~layout.mask(num_queries, num_keys, window), -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., :num_keys].to(value.dtype)
    return (weights @ value[:, :, None]).reshape(query.shape)
