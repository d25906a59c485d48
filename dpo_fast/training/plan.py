"""What a run will do: decided once, before a model is loaded, printed, and read by every part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_fast.config import DPOConfig
from dpo_fast.losses.objective import needs_reference
from dpo_fast.model.placement import Placement
from dpo_fast.model.sharding import Parallel
from dpo_fast.packs.budget import token_budget
from dpo_fast.packs.layout import Group
from dpo_fast.packs.steps import StepSampler, group_packs
from dpo_fast.planning.forecast import Forecast, asked_policy
from dpo_fast.ranks import Ranks


@dataclass(frozen=True)
class Plan:
    """Batch, token budget, precision and layout of a run.

    Attributes:
        placement: device and dtypes.
        ranks: the processes that train.
        num_rows, num_pairs: to train on.
        num_held_out_rows: to evaluate on.
        rows_per_step: rows of an optimizer step.
        steps_per_epoch: optimizer steps that read every row once.
        num_steps: optimizer steps.
        max_tokens: token budget of a pack.
        sharing: tokens with one copy of the prompt per answer, divided by those with one per row.
        reference: where its log-probs come from.
        seed: of the order of the rows.
        parallel: what the processes share; None if there is one.
        forecast: memory and time; None for an architecture that cannot be planned.
    """

    placement: Placement
    ranks: Ranks
    num_rows: int
    num_pairs: int
    num_held_out_rows: int
    rows_per_step: int
    steps_per_epoch: int
    num_steps: int
    max_tokens: int
    sharing: float
    reference: str
    seed: int
    parallel: Parallel | None = None
    forecast: Forecast | None = None

    @classmethod
    def of(
        cls, config: DPOConfig, groups: Sequence[Group], held_out: Sequence[Group], *, rows_per_step: int | None = None
    ) -> Plan:
        """The plan of these settings for these rows.

        Args:
            config: the run's settings.
            groups: to train on.
            held_out: to evaluate on.
            rows_per_step: those of the run that is resumed, maybe by another number of processes.
        """
        ranks = Ranks.current()
        own_rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
        rows_per_step = rows_per_step or own_rows * ranks.world_size
        steps_per_epoch = math.ceil(len(groups) / rows_per_step)
        num_steps = math.ceil(config.num_train_epochs * steps_per_epoch) if config.max_steps < 0 else config.max_steps
        placement = Placement.of(config)
        budget = token_budget(
            config, [*groups, *held_out], pairs=config.per_device_train_batch_size, device=placement.device
        )
        parallel: Parallel = "fsdp" if config.parallel != "ddp" and config.peft == "none" else "ddp"
        return cls(
            placement=placement,
            ranks=ranks,
            num_rows=len(groups),
            num_pairs=sum(len(group.pairs) for group in groups),
            num_held_out_rows=len(held_out),
            rows_per_step=rows_per_step,
            steps_per_epoch=steps_per_epoch,
            num_steps=num_steps,
            max_tokens=ranks.first(budget),
            sharing=sum(group.num_unshared_tokens for group in groups) / sum(group.num_tokens for group in groups),
            reference=_reference(config),
            seed=config.seed,
            parallel=parallel if ranks.world_size > 1 else None,
        )

    def activations(self, config: DPOConfig) -> dict[str, Any]:
        """Arguments of `Policy.set_trainable`: what was asked for, or what it takes to fit."""
        if self.forecast is not None:
            return {"checkpointing": self.forecast.checkpointing, "offload": self.forecast.offload}
        return {"checkpointing": asked_policy(config) or "none", "offload": config.activation_offloading}

    def sampler(self, groups: Sequence[Group]) -> StepSampler:
        """The optimizer steps, from the first one, with this process's packs."""
        return StepSampler(
            groups,
            groups_per_step=self.rows_per_step,
            max_tokens=self.max_tokens,
            seed=self.seed,
            rank=self.ranks.rank,
            num_ranks=self.ranks.world_size,
        )

    def packs(self, groups: Sequence[Group]) -> list[list[int]]:
        """This process's packs of these groups, as lists of indices."""
        return group_packs(groups, num_ranks=self.ranks.world_size, max_tokens=self.max_tokens)[self.ranks.rank]

    @property
    def _processes(self) -> str:
        if self.parallel is None:
            return "1 process"
        shared = {"ddp": "rows", "fsdp": "rows, weights and state"}[self.parallel]
        return f"{self.ranks.world_size} processes that share {shared} ({self.parallel})"

    def __str__(self) -> str:
        lines = [] if self.forecast is None else [str(self.forecast)]
        return "\n".join(
            (
                f"{self.num_rows} rows with {self.num_pairs} pairs to train on, {self.num_held_out_rows} rows held out",
                f"{self.num_steps} steps of {self.rows_per_step} rows, packs of up to {self.max_tokens} tokens",
                f"prompt sharing: {self.sharing:.2f}x fewer tokens",
                f"{self.placement}, {self._processes}, reference: {self.reference}",
                *lines,
            )
        )


def _reference(config: DPOConfig) -> str:
    if not needs_reference(config):
        return "none"
    name = config.ref_model or config.model
    return f"{name}, which follows the policy" if config.sync_ref_model else f"{name}, scored once"
