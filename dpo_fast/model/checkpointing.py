"""Which activations of a layer are recomputed in the backward, by PyTorch's own checkpointing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Checkpointing = Literal["none", "selective", "full"]
# What takes most of a layer's time: products, and attention in its forms. The rest is read and written once.
_COSTLY = {
    "aten": (
        "mm",
        "addmm",
        "bmm",
        "_grouped_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    ),
    "torch_attn": ("_varlen_attn",),
    "flash_attn": ("_flash_attn_varlen_forward",),
    "dpo_fast": ("prefix_attention",),
    "flash_attn_3": ("_flash_attn_forward", "fwd"),
}
_COSTLY_OPERATORS = {f"{library}::{name}" for library, names in _COSTLY.items() for name in names}


def enable_checkpointing(model: PreTrainedModel, checkpointing: Checkpointing, *, offload: bool = False) -> None:
    """Recompute activations layer by layer.

    Args:
        model: in training mode.
        checkpointing: `full` keeps the input of each layer, `selective` the results of products and attention as well.
        offload: keep the inputs in the host's memory, where those of a CPU are already.
    """
    # transformers 5.23 renamed the method; 5.17 only knows the old name.
    new_name = "activation_checkpointing_enable"
    enable = getattr(model, new_name if hasattr(model, new_name) else "gradient_checkpointing_enable")
    options: dict[str, Any] = {"use_reentrant": False}
    if checkpointing == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_costly)
    enable(options, offload=offload and model.device.type != "cpu")


def _keep_costly(context: Any, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_costly = operator.name().split(".")[0] in _COSTLY_OPERATORS
    return CheckpointPolicy.MUST_SAVE if is_costly else CheckpointPolicy.PREFER_RECOMPUTE
