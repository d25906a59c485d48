"""Causal attention over packs that hold each prompt once.

A pack is cut into segments, prompts and answers. The queries of segment m are rows cu_q[m]:cu_q[m+1] of the
pack; its keys are rows kv_index[cu_k[m]:cu_k[m+1]]: for a prompt its own rows, for an answer its prompt's and
then its own. Query i of a segment with L_q queries and L_k keys sees keys 0 .. L_k - L_q + i: causal, aligned
at the bottom right.

    out_i = sum_j softmax_j(scale q_i · k_j) v_j

An answer of A tokens after a prompt of P pays A (P + A) score entries, and the prompt pays P² once for all
answers. The keys are gathered by one index_select, whose backward sums the gradient of a prompt over its
answers in a fixed order on a CPU: same inputs, same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PrefixLayout:
    """What the attention of every layer reads of one pack; made once a forward by `prefix_layout`.

    Attributes:
        query_lengths, key_lengths: M lengths, one a segment.
        kv_index: (K,) int64 rows that form the keys.
        masks: M boolean (L_q, L_k) masks, True where a query may look; None for a prompt, which is plainly
            causal.
    """

    query_lengths: list[int]
    key_lengths: list[int]
    kv_index: Tensor
    masks: list[Tensor | None]


def prefix_layout(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, kv_index: Tensor) -> PrefixLayout:
    """Lengths and masks of a pack's segments, from the (M + 1,) int64 bounds of `PackedBatch` on the CPU."""
    query_lengths = cu_seqlens_q.diff().tolist()
    key_lengths = cu_seqlens_k.diff().tolist()
    masks = [
        None
        if q_len == k_len
        else torch.ones(q_len, k_len, dtype=torch.bool, device=kv_index.device).tril(k_len - q_len)
        for q_len, k_len in zip(query_lengths, key_lengths, strict=True)
    ]
    return PrefixLayout(query_lengths, key_lengths, kv_index, masks)


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
    """One scaled-dot-product call per segment.

    Args:
        query: (1, H, T, d), rotated.
        key, value: (1, H_kv, T, d) with H a multiple of H_kv (grouped queries); never repeated.
        layout: of the pack.
        scale: factor of the scores, usually d ** -0.5.

    Returns:
        (1, H, T, d) in the dtype of `query`.
    """
    grouped = query.shape[1] != key.shape[1]
    queries = query.split(layout.query_lengths, dim=2)
    keys = key.index_select(2, layout.kv_index).split(layout.key_lengths, dim=2)
    values = value.index_select(2, layout.kv_index).split(layout.key_lengths, dim=2)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
        for q, k, v, mask in zip(queries, keys, values, layout.masks, strict=True)
    ]
    return torch.cat(outputs, dim=2)
