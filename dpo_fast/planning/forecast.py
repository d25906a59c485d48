"""The plan of a run: what it will take, what it may change for it, and how far it was off."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dpo_fast.errors import TrainingError, UserError
from dpo_fast.model.placement import Placement
from dpo_fast.planning.choose import Free, Planned, choose, ways_out
from dpo_fast.planning.hardware import GIB, Card
from dpo_fast.planning.measured import OPTIMIZERS
from dpo_fast.planning.memory import peak
from dpo_fast.planning.setting import Policy, Setting
from dpo_fast.planning.shapes import CannotPlan, ModelShape
from dpo_fast.planning.view import one_line, render, way_out
from dpo_fast.planning.workload import Workload

if TYPE_CHECKING:
    from dpo_fast.config import DPOConfig


def asked_policy(config: DPOConfig) -> Policy | None:
    """The checkpointing that the settings name; None leaves it to the plan.

    Raises:
        UserError: they contradict each other.
    """
    policy = config.checkpointing_policy or ("full" if config.gradient_checkpointing else None)
    if config.activation_offloading and policy not in (None, "full"):
        raise UserError(f"--activation_offloading true: needs --checkpointing_policy full, got {policy}")
    return "full" if config.activation_offloading else policy


def asked_setting(config: DPOConfig, card: Card, max_tokens: int) -> Setting:
    """What the settings say, before anything is changed.

    Raises:
        CannotPlan: nothing is known about the optimizer.
    """
    place = Placement.on(torch.device("cpu" if card.is_cpu else "cuda"), config)
    optim = place.default_optimizer if config.optim == "auto" else config.optim
    if optim not in OPTIMIZERS:
        raise CannotPlan(f"--optim {optim}: cannot be planned; choose one of {', '.join(OPTIMIZERS)}")
    return Setting(
        weight_bytes=place.dtype.itemsize,
        # Frozen bf16 weights are cast to nothing.
        autocast=place.bf16 and place.dtype is torch.float32,
        optim=optim,
        policy=asked_policy(config) or "none",
        offload=config.activation_offloading,
        max_tokens=max_tokens,
        peft="lora" if config.peft == "dora" else config.peft,
        lora_r=config.lora_r,
        head_budget=int(config.head_memory_budget_gib * GIB),
        moving_reference=config.sync_ref_model,
        on_cpu=card.is_cpu,
    )


@dataclass(frozen=True)
class Forecast:
    """The plan of a run of `train`.

    Attributes:
        asked: what the settings say.
        planned: what the run will do: the same, or what gives the same results in less memory.
        free: what may be changed.
        base_gib: what the process held before, if it is the process that is measured.
    """

    asked: Planned
    planned: Planned
    free: Free
    base_gib: float = 0.0

    @classmethod
    def of(
        cls,
        config: DPOConfig,
        shape: ModelShape,
        card: Card,
        workload: Workload,
        *,
        max_tokens: int,
        optimizers: tuple[str, ...],
        base_gib: float = 0.0,
        gpus: int = 1,
    ) -> Forecast:
        """Plan a run; what was not asked for is chosen so that it fits, without changing any result."""
        setting = replace(
            asked_setting(config, card, max_tokens), gpus=gpus, sharded=gpus > 1 and config.parallel == "fsdp"
        )
        asked = Planned(shape, setting, card, workload)
        if config.parallel == "auto" and gpus > 1 and config.peft == "none" and not asked.fits:
            asked = replace(asked, setting=replace(setting, sharded=True))
        free = Free(
            policy=asked_policy(config) is None,
            max_tokens=config.max_tokens_per_batch is None,
            sharding=False,
            optimizers=optimizers,
        )
        return cls(asked, choose(asked, free)[0], free, base_gib)

    @property
    def checkpointing(self) -> Policy:
        """Which activations are recomputed."""
        return self.planned.setting.policy

    @property
    def offload(self) -> bool:
        """Whether the inputs of layers wait in the host's memory."""
        return self.planned.setting.offload

    @property
    def is_sharded(self) -> bool:
        """Whether the processes share weights, gradients and optimizer state."""
        return self.planned.setting.sharded

    @property
    def max_tokens(self) -> int:
        """Token budget of a pack."""
        return self.planned.setting.max_tokens

    def __str__(self) -> str:
        changes = self.planned.changes(self.asked)
        chosen = ", ".join(f"--{name} {value}" for name, value in changes.items())
        return one_line(self.planned) + (f"; to fit: {chosen}" if chosen else "")

    def check(self) -> None:
        """Refuse a run that cannot fit.

        The reserve is a guess, so a run that would fit without it is let through.

        Raises:
            UserError: with the parts and the cheapest ways out.
        """
        if self.planned.parts.total > self.planned.card.memory:
            raise UserError(f"this run does not fit.\n{self.explain()}")

    def explain(self) -> str:
        """The table, and at most three cheaper settings."""
        found = ways_out(self.asked, self.free)
        ways = [f"  {way_out(other, self.planned)}" for other in found if other.setting != self.planned.setting]
        if not ways:
            ways = ["  nothing that train can do today; `dpo-fast plan --gpus K` and `--peft lora` show what would"]
        return "\n".join((render(self.planned), "What fits instead:", *ways))

    def compare(self, peak_gib: float) -> str:
        """How the peak after a run's first step compares, in a line; the optimizer's state comes at its end."""
        setting, first = self.planned.setting, self.planned.workload.steps(self.max_tokens)[0]
        peaks = [
            peak(self.planned.shape, setting, load, with_state=False, with_gradients=place > 0).total / GIB
            for place, load in enumerate(first)
        ]
        planned = max(peaks) + self.base_gib
        line = f"step 1 peaked at {peak_gib:.2f} GiB, planned {planned:.2f} (off by {planned / peak_gib - 1:+.0%})"
        expected = self.planned.parts.total / GIB * peak_gib / planned
        if expected > self.planned.card.memory / GIB:
            line += f"; a later step may need {expected:.1f}: lower --max_tokens_per_batch"
        return line

    def out_of_memory(self, error: Exception, last: str) -> TrainingError:
        """What a run that ran out of memory ends with; `last` says what it can be resumed from."""
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return TrainingError(f"out of memory: {text}\n{self.explain()}\n{last}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator had no memory left: a GPU's, or a CPU's, which has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
