"""Settings that no run can have are refused before anything is loaded, scored or trained."""

from __future__ import annotations

import os
from pathlib import Path

from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError
from dpo_fast.losses.objective import any_loss, check_loss, needs_reference
from dpo_fast.model.placement import pick_device
from dpo_fast.model.policy import warn_if_weights_cannot_move
from dpo_fast.model.source import find
from dpo_fast.packs.layout import Group
from dpo_fast.training.adapters import check_adapter, is_adapted
from dpo_fast.training.optimizers import OPTIMIZERS, check_optimizer, check_schedule, optimizer_name


def check_config(config: DPOConfig) -> None:
    """Refuse values that no run can have."""
    config.check()
    if not config.data:
        raise UserError("no data given: pass --data with a file of preference rows or a Hub dataset's name")
    check_loss(config)
    check_optimizer(config)
    check_schedule(config)
    pick_device(config.device)
    find(config.model, config.adapter_base)
    check_adapter(config)
    if config.ref_model is not None:
        find(config.ref_model, option="--ref_model")
    if config.max_steps == 0 or (config.max_steps < 0 and config.num_train_epochs == 0):
        raise UserError(
            f"--max_steps {config.max_steps} --num_train_epochs {config.num_train_epochs:g}: no step to take; expected "
            "steps above 0, or -1 and epochs above 0"
        )
    if config.torch_compile and config.fused_layers is True:
        raise UserError("--fused_layers true --torch_compile true: the compiler fuses these layers itself; choose one")
    if config.sync_ref_model and not needs_reference(config):
        raise UserError(f"--sync_ref_model true: --loss_type {config.loss_type} has no reference")
    if any_loss(config, lambda facts: facts.needs_gold) and config.gold_column is None:
        raise UserError(
            f"--loss_type {config.loss_type}: needs a third, better answer; name its column by --gold_column"
        )
    if not OPTIMIZERS[optimizer_name(config)].moves_bf16 and not is_adapted(config):
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
