"""Causal attention over packs that hold each prompt once.

A pack is cut into segments, prompts and answers. The queries of segment m are rows cu_q[m]:cu_q[m+1] of the pack; its
keys are rows kv_index[cu_k[m]:cu_k[m+1]]: for a prompt its own rows, for an answer its prompt's and then its own. Query
i of a segment with L_q queries and L_k keys stands at place p = L_k - L_q + i and sees keys j <= p (causal, aligned at
the bottom right), with a sliding window of W also j > p - W:

    x_ij = cap(scale q_i · k_j)             cap(x) = softcap tanh(x / softcap), as in Gemma 2
    out_i = Σ_j e^x_ij v_j / (e^s + Σ_j e^x_ij)         s: the head's sink, as in gpt-oss; without one e^s = 0

An answer of A tokens after a prompt of P pays A (P + A) score entries, and the prompt pays P² once for all answers.

On a GPU in half precision one call computes all segments; everywhere else, and in fp32 on a GPU, there is one
scaled-dot-product call per segment. attention_backends.py has the backends and what each of them can do.

With a `deterministic` layout two runs give the same bits: PyTorch's kernels are then told to add up dQ in a fixed order
(deterministic_backward.py), the flash-attn packages always are, and FlexAttention's order is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.kernels.attention_backends import AttentionOptions, choose_attention
from dpo_fast.kernels.deterministic_backward import leave_determinism
from dpo_fast.kernels.gather_rows import RowIndex, gather_rows

_numbers = count()


@dataclass(frozen=True, eq=False)
class PrefixLayout:
    """What the attention of every layer reads of one pack; made once a forward by `prefix_layout`.

    Attributes:
        query_lengths, key_lengths: M lengths, one a segment.
        kv_index: (K,) rows that form the keys, and the way back.
        cu_seqlens_q, cu_seqlens_k: (M + 1,) int32 bounds on the device of `kv_index`.
        deterministic: whether the backward adds in a fixed order on a GPU as well.
        number: int64 scalar on the host by which `LAYOUTS` finds this layout.
        masks, block_masks: made when first needed, shared by all layers; FlexAttention's by window.
    """

    query_lengths: list[int]
    key_lengths: list[int]
    kv_index: RowIndex
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    deterministic: bool = True
    number: Tensor = field(default_factory=lambda: torch.tensor(next(_numbers)))
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    block_masks: dict[int | None, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """List the layout."""
        LAYOUTS[int(self.number)] = self

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """Arguments of a variable-length call: both bounds, and the longest segment by each."""
        return self.cu_seqlens_q, self.cu_seqlens_k, max(self.query_lengths), max(self.key_lengths)

    def mask(self, num_queries: int, num_keys: int, window: int | None) -> Tensor:
        """(L_q, L_k) bool, True where a query may look; the last query stands at the last key."""
        key = (num_queries, num_keys, window)
        if key not in self.masks:
            ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=self.cu_seqlens_q.device)
            seen = ones.tril(num_keys - num_queries)
            self.masks[key] = seen if window is None else seen.triu(num_keys - num_queries - window + 1)
        return self.masks[key]


# Those that somebody holds, by number: compiled code passes the number on (prefix_attention_op.py).
LAYOUTS: WeakValueDictionary[int, PrefixLayout] = WeakValueDictionary()


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
    leave_determinism()  # after a backward that raised, whose hook never ran
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
    backend: str = "auto",
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
        backend: a name in attention_backends.py, or "auto" for the fastest one that is usable.

    Returns:
        (1, H, T, d) in the dtype of `query`; rows after the last segment, which are padding, are 0.

    Raises:
        ValueError: there is no such backend, or it cannot compute one of the options.
    """
    options = AttentionOptions(scale, window, softcap, sinks)
    attention = choose_attention(backend, query, options)
    num_rows, num_queries = query.shape[2], sum(layout.query_lengths)
    q, k, v = (x[0].transpose(0, 1) for x in (query[:, :, :num_queries], key, value))
    k, v = gather_rows(k, layout.kv_index), gather_rows(v, layout.kv_index)
    out = attention.run(q, k, v, layout, options).transpose(0, 1)[None]
    return F.pad(out, (0, 0, 0, num_rows - num_queries)) if num_queries < num_rows else out
