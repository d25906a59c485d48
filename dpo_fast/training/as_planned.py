"""The plan of a run against the memory there is, before it starts, and what an out-of-memory error ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dpo_fast.config import DPOConfig
from dpo_fast.model.load import load_config
from dpo_fast.packs.layout import Group
from dpo_fast.planning.forecast import Forecast, is_out_of_memory
from dpo_fast.planning.hardware import this_card
from dpo_fast.planning.shapes import CannotPlan, shape_of
from dpo_fast.planning.workload import RowWorkload
from dpo_fast.training.checkpoint import newest_checkpoint
from dpo_fast.training.metrics import peak_memory_gib
from dpo_fast.training.optimizers import OPTIMIZERS
from dpo_fast.training.plan import Plan

if TYPE_CHECKING:
    from dpo_fast.training.loop import Trainer, TrainResult


def fit_plan(config: DPOConfig, plan: Plan, groups: Sequence[Group]) -> Plan:
    """The plan with its forecast, and with a token budget that fits.

    Raises:
        UserError: nothing fits that gives the same results.
    """
    device = plan.placement.device
    workload = RowWorkload(groups, rows_per_step=plan.rows_per_step, seed=plan.seed, static_shapes=config.static_shapes)
    try:
        shape = shape_of(load_config(config.model, trust_remote_code=config.trust_remote_code), config.model)
        forecast = Forecast.of(
            *(config, shape, this_card(device), workload),
            max_tokens=plan.max_tokens,
            optimizers=tuple(OPTIMIZERS),
            # A CPU has no allocator that counts, only a process, and that holds all that was imported.
            base_gib=peak_memory_gib(device) if device.type == "cpu" else 0.0,
        )
    except CannotPlan:
        return plan
    forecast.check()
    return replace(plan, max_tokens=forecast.max_tokens, forecast=forecast)


def run_as_planned(trainer: Trainer) -> TrainResult:
    """Run; an out-of-memory error ends with the plan.

    Raises:
        TrainingError: memory ran out.
    """
    try:
        return trainer.run()
    except (RuntimeError, MemoryError) as error:
        if trainer.plan.forecast is None or not is_out_of_memory(error):
            raise
        last = newest_checkpoint(trainer.output_dir)
        advice = f"{last} is complete: resume with --resume auto" if last else "No checkpoint was written yet"
        raise trainer.plan.forecast.out_of_memory(error, advice) from error
