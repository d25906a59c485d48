"""The plan of a run against the memory there is, before it starts, and what an out-of-memory error ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dpo_fast.config import DPOConfig
from dpo_fast.model.load import config_of
from dpo_fast.packs.layout import Group
from dpo_fast.planning.forecast import Forecast, is_out_of_memory
from dpo_fast.planning.hardware import this_card
from dpo_fast.planning.shapes import CannotPlan, shape_of
from dpo_fast.planning.workload import RowWorkload
from dpo_fast.ranks import local_processes
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
    device, world_size = plan.placement.device, plan.ranks.world_size
    own_rows = -(-plan.rows_per_step // world_size)
    workload = RowWorkload(groups, rows_per_step=own_rows, seed=plan.seed, static_shapes=config.static_shapes)
    card = this_card(device)
    if card.is_cpu:
        card = replace(card, memory=card.memory / local_processes())
    # A CPU has no allocator that counts, only a process, and that holds all that was imported.
    base_gib = peak_memory_gib(device) if card.is_cpu else 0.0
    card, base_gib = plan.ranks.first((card, base_gib))  # all processes must come to the same plan
    try:
        shape = shape_of(config_of(config), config.model)
        forecast = Forecast.of(
            *(config, shape, card, workload),
            max_tokens=plan.max_tokens,
            optimizers=tuple(OPTIMIZERS),
            base_gib=base_gib,
            gpus=world_size,
        )
    except CannotPlan:
        return plan
    forecast.check()
    parallel = plan.parallel and ("fsdp" if forecast.is_sharded else "ddp")
    return replace(plan, max_tokens=forecast.max_tokens, parallel=parallel, forecast=forecast)


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
