"""Attention over packs by FlexAttention, for the caps and sinks that flash attention lacks.

The notation is that of `prefix_attention.py`. Segments lie in the same order in the T queries and the K gathered keys,
so that query i sees one range of keys, whatever the window:

    last_i = i + (end of its segment's keys - end of its segment's queries)
    first_i = max(start of its segment's keys, last_i - W + 1)
    out_i = flex_i · sigmoid(l_i - s),  l_i = log Σ_j e^x_ij: what a sink of s leaves of the sum, e^l / (e^s + e^l)

The keys that a block of queries visits are one range as well, known from the lengths on the host: no (T, K) mask is
ever made. Lengths and caps reach the compiled kernel as tensors, so that one compilation serves all packs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

if TYPE_CHECKING:
    from dpo_fast.kernels.attention_backends import AttentionOptions
    from dpo_fast.kernels.prefix_attention import PrefixLayout

BLOCK = 128


def key_ranges(query_lengths: list[int], key_lengths: list[int], window: int | None) -> tuple[Tensor, Tensor]:
    """first_i and last_i of the T queries, (T,) int64 on the host."""
    queries, keys = torch.tensor(query_lengths), torch.tensor(key_lengths)
    last = torch.arange(sum(query_lengths)) + torch.repeat_interleave(keys.cumsum(0) - queries.cumsum(0), queries)
    first = torch.repeat_interleave(keys.cumsum(0) - keys, queries)
    return (first if window is None else torch.maximum(first, last - window + 1)), last


def block_mask(layout: PrefixLayout, window: int | None) -> BlockMask:
    """The mask of a pack, shared by all layers with this window."""
    if window not in layout.block_masks:
        layout.block_masks[window] = _make_block_mask(layout, window)
    return layout.block_masks[window]


def _make_block_mask(layout: PrefixLayout, window: int | None) -> BlockMask:
    device = layout.kv_index.index.device
    first, last = key_ranges(layout.query_lengths, layout.key_lengths, window)
    num_keys = sum(layout.key_lengths)
    # Both rise with i, so a block of queries visits from its first one's first key to its last one's last.
    starts = first[::BLOCK] // BLOCK
    ends = torch.cat([last[BLOCK - 1 : -1 : BLOCK], last[-1:]]) // BLOCK
    num_blocks = -(-num_keys // BLOCK)
    # FlexAttention wants all blocks of keys listed, the visited ones first.
    order = (starts[:, None] + torch.arange(num_blocks)) % num_blocks
    counts, indices = (x.to(device, torch.int32)[None, None] for x in (ends - starts + 1, order))
    lower, upper = (x.to(device, torch.int32) for x in (first, last))

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= lower[query]) & (key <= upper[query])

    return BlockMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(len(first), num_keys)
    )


def _capping(caps: Tensor) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return caps[head] * torch.tanh(score / caps[head])

    return capped


@cache
def _compiled() -> Any:
    """Uncompiled, FlexAttention materializes all scores, which no GPU has room for."""
    return torch.compile(flex_attention, dynamic=True)


def flex_attend(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, options: AttentionOptions) -> Tensor:
    """(T, H, d) queries, (K, H_kv, d) gathered keys and values -> (T, H, d)."""
    attend = _compiled() if q.is_cuda else flex_attention
    score_dtype = torch.promote_types(q.dtype, torch.float32)
    caps = None
    if options.softcap is not None:
        caps = torch.full((q.shape[1],), options.softcap, dtype=score_dtype, device=q.device)
    arguments: dict[str, Any] = {
        "score_mod": None if caps is None else _capping(caps),
        "block_mask": block_mask(layout, options.window),
        "scale": options.scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    if options.sinks is None:
        out = attend(query, key, value, **arguments)
    else:
        out, aux = attend(query, key, value, **arguments, return_aux=AuxRequest(lse=True))
        share = torch.sigmoid(aux.lse - options.sinks.to(aux.lse.dtype)[:, None])
        out = out * share[..., None].to(out.dtype)
    return out[0].transpose(0, 1)
