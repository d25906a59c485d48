"""Two low-rank adapters as one.

B1·A1·s1 + B2·A2·s2 = [B1·s1/s2, B2] · [A1; A2] · s2: the sum of two adapters is an adapter whose rank is the sum of
their ranks. So what was trained on top of an adapter is an ordinary adapter of the original model, and because the
second one's factors are kept as they are, it can be taken out again to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Settings under which an adapter is not a plain sum over the base's weights with one rank and scale.
_NOT_PLAIN = (
    *("use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "use_qalora"),
    *("use_bdlora", "layers_to_transform", "megatron_config"),
)
# Ways to initialise that change neither the base nor the form of the adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def why_not_plain(settings: Mapping[str, Any]) -> str:
    """The entry of an adapter's configuration that keeps it from being joined with another; empty if none does."""
    found = [name for name in _NOT_PLAIN if settings.get(name)]
    if settings.get("bias", "none") != "none":
        found.append("bias")
    if settings.get("init_lora_weights", True) not in _PLAIN_STARTS:
        found.append("init_lora_weights")
    return found[0] if found else ""


def scale_of(settings: Mapping[str, Any]) -> float:
    """The factor of an adapter's product."""
    rank = settings["r"]
    return float(settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def join(
    below: Mapping[str, Tensor], own: Mapping[str, Tensor], *, ranks: tuple[int, int], scales: tuple[float, float]
) -> dict[str, Tensor]:
    """The sum of two plain adapters.

    Args:
        below: tensors by peft's names: `lora_A` (r, in) and `lora_B` (out, r) of each layer.
        own: of the other adapter; its scale becomes that of the sum.
        ranks: of both.
        scales: of both.

    Returns:
        fp32 tensors; a layer that only one of them has is filled up with zeros.
    """
    joined = {}
    for name in sorted(below.keys() | own.keys()):
        is_first = "lora_A" in name or "lora_embedding_A" in name
        dim = 0 if is_first else 1
        parts = []
        for source, rank, factor in ((below, ranks[0], scales[0] / scales[1]), (own, ranks[1], 1.0)):
            if name in source:
                parts.append(source[name].detach().cpu().float() * (1.0 if is_first else factor))
            else:
                shape = list((own if name in own else below)[name].shape)
                shape[dim] = rank
                parts.append(torch.zeros(shape))
        joined[name] = torch.cat(parts, dim)
    return joined


def split(joined: Mapping[str, Tensor], names: set[str], rank: int) -> dict[str, Tensor]:
    """The second adapter of `join`: its `names`, beyond the first one's `rank`."""
    return {
        name: (tensor[rank:] if "lora_A" in name or "lora_embedding_A" in name else tensor[:, rank:])
        for name, tensor in joined.items()
        if name in names
    }
