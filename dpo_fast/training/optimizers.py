"""Optimizers by name, and schedules.

An optimizer is a function under `@optimizer` with the names that `--optim` accepts and what is special about it; help,
errors and defaults follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError
from dpo_fast.model.placement import Placement

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

# From parameter groups and `lr`, `betas`, `eps` to the optimizer.
Maker = Callable[..., "Optimizer"]


@dataclass(frozen=True)
class Declared:
    """An optimizer, and what has to be known of it before it is made.

    Attributes:
        make: makes it.
        package: what it needs to be installed, as pip names it; None if nothing but PyTorch.
        needs_gpu: whether it only runs on a GPU.
        moves_bf16: whether it holds bf16 weights in more bits, so that small steps move them.
        releases_gradients: whether it can step each parameter during the backward.
        state_format: one of `optimizer_states.FORMATS`; None if its state cannot be converted.
    """

    make: Maker
    package: str | None = None
    needs_gpu: bool = False
    moves_bf16: bool = False
    releases_gradients: bool = False
    state_format: str | None = None


OPTIMIZERS: dict[str, Declared] = {}


def optimizer(*names: str, **facts: Any) -> Callable[[Maker], Maker]:
    """Register a function under these names, transformers' if it has one; `facts` are those of `Declared`."""

    def register(make: Maker) -> Maker:
        OPTIMIZERS.update(dict.fromkeys(names, Declared(make, **facts)))
        return make

    return register


@optimizer("adamw_8bit_fused", moves_bf16=True, releases_gradients=True, state_format="fused")
def adamw_8bit_fused(groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    """Ours: 8-bit moments, bf16 weights with 8 more bits, one pass over memory."""
    from dpo_fast.training.fused_adamw import AdamW8bitFused

    return AdamW8bitFused(groups, **settings)


@optimizer("adamw_torch", "adamw_torch_fused", state_format="torch")
def adamw_torch(groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    """PyTorch's, in one kernel for many parameters."""
    return torch.optim.AdamW(groups, fused=True, **settings)


@optimizer("adamw_8bit", "adamw_bnb_8bit", package="bitsandbytes", state_format="bitsandbytes")
def adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    """bitsandbytes', with 8-bit moments."""
    import bitsandbytes

    made: Optimizer = bitsandbytes.optim.AdamW8bit(groups, **settings)  # type: ignore[attr-defined]
    return made


@optimizer("paged_adamw_8bit", package="bitsandbytes", needs_gpu=True, state_format="bitsandbytes")
def paged_adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    """bitsandbytes', with 8-bit moments that the driver moves to the host's memory when the GPU's is full."""
    import bitsandbytes

    made: Optimizer = bitsandbytes.optim.PagedAdamW8bit(groups, **settings)  # type: ignore[attr-defined]
    return made


@optimizer("flash_adamw", package="flashoptim", needs_gpu=True, moves_bf16=True)
def flash_adamw(groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    """flashoptim's, with 8-bit moments and bf16 weights with 8 more bits."""
    import flashoptim

    # fp32 weights have no bits to add, and flashoptim refuses to add any.
    has_bf16 = any(parameter.dtype is torch.bfloat16 for group in groups for parameter in group["params"])
    made: Optimizer = flashoptim.FlashAdamW(groups, master_weight_bits=24 if has_bf16 else None, **settings)
    return made


def optimizer_name(config: DPOConfig) -> str:
    """`config.optim`, or what `auto` means."""
    return Placement.of(config).default_optimizer if config.optim == "auto" else config.optim


def check_optimizer(config: DPOConfig) -> None:
    """Refuse an optimizer that cannot be made here.

    Raises:
        UserError: its name is unknown, its package is not installed, or there is no GPU for it.
    """
    name = optimizer_name(config)
    if name not in OPTIMIZERS:
        raise UserError(f"--optim {name}: unknown; choose one of auto, {', '.join(OPTIMIZERS)}")
    declared = OPTIMIZERS[name]
    if declared.package and find_spec(declared.package) is None:
        raise UserError(f"--optim {name}: {declared.package} is not installed; pip install {declared.package}")
    if declared.needs_gpu and (device := Placement.of(config).device).type != "cuda":
        able = ", ".join(known for known, other in OPTIMIZERS.items() if not other.needs_gpu)
        raise UserError(f"--optim {name}: runs on a GPU, and the device is {device}; choose one of {able}")


def make_optimizer(parameters: Sequence[nn.Parameter], config: DPOConfig) -> Optimizer:
    """`config.optim` over these parameters; weight decay on matrices only, as in transformers' Trainer."""
    check_optimizer(config)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[optimizer_name(config)].make(
        groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon
    )


def make_schedule(optimizer: Optimizer, config: DPOConfig, num_steps: int) -> LRScheduler:
    """The learning-rate schedule of `config` over `num_steps` optimizer steps."""
    from transformers import get_scheduler

    warmup = config.warmup_steps
    num_warmup = int(warmup) if warmup >= 1 else round(warmup * num_steps)
    try:
        return get_scheduler(config.lr_scheduler_type, optimizer, num_warmup, num_steps)
    except Exception as error:  # whatever a schedule makes of settings that it was not given
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--lr_scheduler_type {config.lr_scheduler_type}: {reason}; expected one without settings of its own: "
            "linear, cosine, constant, constant_with_warmup, inverse_sqrt"
        ) from error


def check_schedule(config: DPOConfig) -> None:
    """Refuse a schedule that cannot be made.

    Raises:
        UserError: it is unknown, or needs settings that there are no options for.
    """
    make_schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), config, num_steps=10)
