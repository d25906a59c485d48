"""Settings that no run can have are refused before anything is loaded, scored or trained."""

from __future__ import annotations

import math
import os
from pathlib import Path

from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError
from dpo_fast.losses.objective import any_loss, check_loss, needs_reference
from dpo_fast.model.policy import warn_if_weights_cannot_move
from dpo_fast.packs.layout import Group
from dpo_fast.training.optimizers import OPTIMIZERS, check_optimizer, optimizer_name


def check_config(config: DPOConfig) -> None:
    """Refuse values that no run can have."""
    if not config.data:
        raise UserError("no data given: pass --data with a file of preference rows or a Hub dataset's name")
    check_loss(config)
    check_optimizer(config)
    for name in ("beta", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "adam_epsilon"):
        if not getattr(config, name) > 0:
            raise UserError(f"--{name} {getattr(config, name)}: expected a number above 0")
    for name in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "save_steps"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"--{name} {getattr(config, name)}: expected a number, 0 or above")
    for name in ("eval_steps", "seed"):
        if (getattr(config, name) or 0) < 0:
            raise UserError(f"--{name} {getattr(config, name)}: expected a number, 0 or above")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: expected a number in [0, 1)")
    if config.save_total_limit is not None and config.save_total_limit < 1:
        raise UserError(f"--save_total_limit {config.save_total_limit}: expected a number above 0, or null to keep all")
    if config.max_steps == 0 or (config.max_steps < 0 and not 0 < config.num_train_epochs < math.inf):
        raise UserError(
            f"--max_steps {config.max_steps} --num_train_epochs {config.num_train_epochs:g}: no step to take; expected "
            "steps above 0, or -1 and epochs above 0"
        )
    if config.sync_ref_model and not needs_reference(config):
        raise UserError(f"--sync_ref_model true: --loss_type {config.loss_type} has no reference")
    if config.sync_ref_model and not (0 < config.ref_model_mixup_alpha <= 1 and config.ref_model_sync_steps > 0):
        raise UserError("--sync_ref_model: expected --ref_model_mixup_alpha in (0, 1] and --ref_model_sync_steps > 0")
    if any_loss(config, lambda facts: facts.needs_gold) and config.gold_column is None:
        raise UserError(
            f"--loss_type {config.loss_type}: needs a third, better answer; name its column by --gold_column"
        )
    if config.ld_alpha is not None and not 0 <= config.ld_alpha <= 1:
        raise UserError(f"--ld_alpha {config.ld_alpha}: expected a value in [0, 1]")
    if not 0 <= config.eval_split < 1:
        raise UserError(f"--eval_split {config.eval_split}: expected a share of the rows, at least 0 and below 1")
    if not OPTIMIZERS[optimizer_name(config)].moves_bf16:
        warn_if_weights_cannot_move(config, config.learning_rate)


def check_scores(config: DPOConfig, groups: list[Group]) -> None:
    """Refuse losses of score gaps where a row has none."""
    without = [group.row for group in groups if group.ranking.scores is None]
    if without and any_loss(config, lambda facts: facts.needs_scores):
        raise UserError(
            f"--loss_type {config.loss_type}: needs true scores, and row {without[0]} has none: use rows of responses "
            "and scores, or name a column of score differences by --margin_column"
        )


def check_output_dir(output_dir: Path) -> None:
    """Refuse a folder that can neither be made nor written to."""
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--output_dir {output_dir}: {there} is not a folder that can be written to; choose another")
