"""In which dtype a trained model is written, and what is lost by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dpo_fast.errors import UserError
from dpo_fast.model.load import load_config, load_model
from dpo_fast.model.quantize import FourBit

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Of the weights that training changed, the share that must still differ from the base's after a cast.
KEPT_SHARE = 0.99


@dataclass(frozen=True)
class SavedDtype:
    """A dtype, and the sentence that says why."""

    dtype: torch.dtype
    reason: str


def saved_dtype(
    weights: Mapping[str, Tensor],
    base: str,
    wanted: str,
    *,
    adapter_base: str | None = None,
    four_bit: FourBit | None = None,
    trust_remote_code: bool = False,
) -> SavedDtype:
    """The dtype to write a trained model in.

    Training moves most weights by less than the spacing of bfloat16: cast to the base's dtype, they are what they were.

    Args:
        weights: as trained, by name.
        base: what it was loaded from.
        wanted: `auto`, or the name of a dtype.
        adapter_base: model beneath the adapter that `base` names.
        four_bit: how `base` was quantised.
        trust_remote_code: as for loading.
    """
    trained = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    if wanted != "auto" and getattr(torch, wanted) is trained:
        return SavedDtype(trained, "")
    try:
        own = _dtype_of(load_config(base, base=adapter_base, trust_remote_code=trust_remote_code))
        target = own if wanted == "auto" else getattr(torch, wanted)
        if target.itemsize >= trained.itemsize:
            return SavedDtype(trained if wanted == "auto" else target, "")
        start = load_model(
            # Dequantised weights need not be those of a narrower dtype.
            *(base, own if four_bit is None else trained),
            base=adapter_base,
            four_bit=four_bit,
            merge=True,
            trust_remote_code=trust_remote_code,
        )
        share = surviving_share(weights, start, target)
    except UserError as error:
        return SavedDtype(trained, f"weights in {_name(trained)}: {base} cannot be compared with any more ({error})")
    text = f"{share:.1%} of the weights that changed differ from {base} in {_name(target)}"
    if wanted != "auto" or share >= KEPT_SHARE:
        return SavedDtype(target, f"weights in {_name(target)}: {text}")
    cure = f"--save_dtype {_name(target)} makes the file smaller and loses the others"
    return SavedDtype(trained, f"weights in {_name(trained)}: only {text}; {cure}")


@torch.no_grad()
def surviving_share(weights: Mapping[str, Tensor], base: nn.Module, dtype: torch.dtype) -> float:
    """Of the weights that differ from the base's, the share that still does after a cast; 1 if none differs."""
    changed = survived = 0
    for name, parameter in base.named_parameters():
        weight = weights[name]
        start = parameter.to(weight.device, weight.dtype)
        moved = weight != start
        changed += int(moved.sum())
        survived += int((moved & (weight.to(dtype) != start.to(dtype))).sum())
    return survived / changed if changed else 1.0


def _dtype_of(config: PretrainedConfig) -> torch.dtype:
    """The dtype that a model's file has."""
    dtype = config.dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
