"""Optimizers and schedules, all from well-kept libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


def make_optimizer(model: nn.Module, config: DPOConfig) -> Optimizer:
    """AdamW over the trainable parameters; weight decay on matrices alone, as transformers' Trainer does."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(groups, fused=True, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("--optim adamw_8bit needs bitsandbytes: pip install bitsandbytes") from error
    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(groups, **settings)  # type: ignore[attr-defined]
    return optimizer


def make_schedule(optimizer: Optimizer, config: DPOConfig, num_steps: int) -> LRScheduler:
    """The learning-rate schedule of `config` over `num_steps` optimizer steps."""
    from transformers import get_scheduler

    warmup = config.warmup_steps
    num_warmup = int(warmup) if warmup >= 1 else round(warmup * num_steps)
    try:
        return get_scheduler(config.lr_scheduler_type, optimizer, num_warmup, num_steps)
    except ValueError as error:
        raise UserError(f"--lr_scheduler_type {config.lr_scheduler_type}: {error}") from error
