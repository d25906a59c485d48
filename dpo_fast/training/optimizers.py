"""Optimizers and schedules, all from well-kept libraries.

An optimizer is a function under `@optimizer` with the names that `--optim` knows it by; help and errors follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

# From parameter groups and `lr`, `betas`, `eps` to the optimizer.
Maker = Callable[..., "Optimizer"]
OPTIMIZERS: dict[str, Maker] = {}


def optimizer(*names: str) -> Callable[[Maker], Maker]:
    """Register a function under these names, transformers' if it has one."""

    def register(make: Maker) -> Maker:
        OPTIMIZERS.update(dict.fromkeys(names, make))
        return make

    return register


@optimizer("adamw_torch", "adamw_torch_fused")
def adamw_torch(groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    """PyTorch's, in one kernel for many parameters."""
    return torch.optim.AdamW(groups, fused=True, **settings)


@optimizer("adamw_8bit", "adamw_bnb_8bit")
def adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    """bitsandbytes', with 8-bit moments."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("--optim adamw_8bit needs bitsandbytes: pip install bitsandbytes") from error
    made: Optimizer = bitsandbytes.optim.AdamW8bit(groups, **settings)  # type: ignore[attr-defined]
    return made


def check_optimizer(name: str) -> None:
    """Refuse a name that nothing is registered under.

    Raises:
        UserError: it lists the names.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"--optim {name}: unknown; choose one of {', '.join(OPTIMIZERS)}")


def make_optimizer(model: nn.Module, config: DPOConfig) -> Optimizer:
    """`config.optim` over the trainable parameters; weight decay on matrices only, as in transformers' Trainer."""
    check_optimizer(config.optim)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[config.optim](
        groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon
    )


def make_schedule(optimizer: Optimizer, config: DPOConfig, num_steps: int) -> LRScheduler:
    """The learning-rate schedule of `config` over `num_steps` optimizer steps."""
    from transformers import get_scheduler

    warmup = config.warmup_steps
    num_warmup = int(warmup) if warmup >= 1 else round(warmup * num_steps)
    try:
        return get_scheduler(config.lr_scheduler_type, optimizer, num_warmup, num_steps)
    except ValueError as error:
        raise UserError(f"--lr_scheduler_type {config.lr_scheduler_type}: {error}") from error
