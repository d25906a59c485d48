"""The fastest setting that fits, and what the others would cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dpo_fast.planning import memory
from dpo_fast.planning.hardware import GIB, Card
from dpo_fast.planning.measured import OPTIMIZERS
from dpo_fast.planning.memory import Parts
from dpo_fast.planning.roofline import StepTime, step_time
from dpo_fast.planning.setting import Setting
from dpo_fast.planning.shapes import ModelShape
from dpo_fast.planning.workload import Workload

# What a GPU holds besides its allocator's peak: the context with its kernels, and holes between blocks.
CONTEXT, HOLES = 0.8 * GIB, 0.04
# Budgets that are tried, as shares of the one asked for.
SHARES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Free:
    """What the search may change, apart from what leaves every result as it is.

    Attributes:
        policy: activations that are recomputed or offloaded.
        max_tokens: the token budget, downwards.
        precision: dtype of the weights and the optimizer.
        sharding: whether weights are shared among several cards.
        optimizers: that may be taken.
    """

    policy: bool = True
    max_tokens: bool = True
    precision: bool = False
    sharding: bool = True
    optimizers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planned:
    """A setting on a card, with what it takes and gives.

    Attributes:
        shape: of the model.
        setting: how it is trained.
        card: where.
        workload: what its steps compute.
        tier: how far from what was asked for: 0 gives the same results, the higher the more is given up.
    """

    shape: ModelShape
    setting: Setting
    card: Card
    workload: Workload
    tier: int = 0

    @cached_property
    def parts(self) -> Parts:
        """At the highest peak."""
        demands = self.workload.demands(self.setting.max_tokens)
        peaks = (
            memory.peak(self.shape, self.setting, demand.load, with_gradients=demand.with_gradients)
            for demand in demands
        )
        return max(peaks, key=lambda parts: parts.total)

    @property
    def reserve(self) -> float:
        """Bytes that the allocator cannot use; on a CPU, those of the interpreter and its libraries."""
        return CONTEXT + HOLES * self.parts.total

    @property
    def fits(self) -> bool:
        """Whether the card has that memory."""
        return self.parts.total + self.reserve <= self.card.memory

    @cached_property
    def time(self) -> StepTime:
        """Of the mean step."""
        steps = self.workload.steps(self.setting.max_tokens)
        times = [step_time(self.shape, self.setting, self.card, packs) for packs in steps]
        return StepTime(*(sum(vars(t)[name] for t in times) / len(times) for name in vars(times[0])))

    @property
    def pairs_per_second(self) -> float:
        """Of all GPUs together."""
        steps = self.workload.steps(self.setting.max_tokens)
        pairs = sum(pack.pairs for packs in steps for pack in packs) / len(steps)
        return pairs * self.setting.gpus / self.time.total

    @property
    def options(self) -> dict[str, Any]:
        """The setting in `train`'s words."""
        setting = self.setting
        return {
            "dtype": "float32" if setting.weight_bytes == 4 else "bfloat16",
            "bf16": setting.autocast,
            "optim": setting.optim,
            "checkpointing_policy": setting.policy,
            "activation_offloading": setting.offload,
            "max_tokens_per_batch": setting.max_tokens,
            "peft": setting.peft,
            "gpus": setting.gpus,
            "parallel": "fsdp" if setting.sharded else "ddp" if setting.gpus > 1 else "none",
        }

    def changes(self, other: Planned) -> dict[str, Any]:
        """The options that differ from the other's."""
        theirs = other.options
        return {name: value for name, value in self.options.items() if value != theirs[name]}

    @property
    def missing(self) -> str:
        """What `train` cannot do yet of this; empty if it can do all of it."""
        setting = self.setting
        return f"--parallel fsdp with --peft {setting.peft}" if setting.sharded and setting.peft != "none" else ""


def enumerate_settings(asked: Planned, free: Free) -> Iterator[Planned]:
    """Everything that may be done instead of `asked`, itself first."""
    yield asked
    for tier, base in _precisions(asked, free):
        for policy, offload in _policies(base, free):
            for max_tokens in _budgets(asked, free):
                for sharded in _shardings(base, free):
                    setting = replace(base, policy=policy, offload=offload, max_tokens=max_tokens, sharded=sharded)
                    if (tier, setting) != (0, asked.setting):
                        yield replace(asked, setting=setting, tier=tier)


def _precisions(asked: Planned, free: Free) -> Iterator[tuple[int, Setting]]:
    """Tiers: 0 as asked, 1 fp32 weights with 8-bit moments, 2 bf16 weights that small steps move, 3 other bf16 ones."""
    setting = asked.setting
    yield 0, setting
    if not free.precision or setting.peft != "none":
        return
    for name in free.optimizers:
        optimizer = OPTIMIZERS.get(name)
        if optimizer is None:
            continue
        if setting.weight_bytes == 4 and optimizer.state_bytes_fp32 < OPTIMIZERS[setting.optim].state_bytes_fp32:
            yield 1, replace(setting, optim=name)
        # A CPU computes bf16 products slower than fp32 ones.
        half = replace(setting, weight_bytes=2, autocast=False, optim=name)
        if half != setting and not setting.on_cpu:
            yield (2 if optimizer.moves_bf16 else 3), half


def _policies(setting: Setting, free: Free) -> list[tuple[Any, bool]]:
    if not free.policy:
        return [(setting.policy, setting.offload)]
    return [("none", False), ("selective", False), ("full", False)] + [("full", True)] * (not setting.on_cpu)


def _budgets(asked: Planned, free: Free) -> list[int]:
    most = asked.setting.max_tokens
    if not free.max_tokens:
        return [most]
    # Half of a budget costs little as long as it stays above what keeps the device busy (docs/packing.md).
    return [most] + [most // share for share in SHARES[1:] if most // share >= asked.workload.longest]


def _shardings(setting: Setting, free: Free) -> list[bool]:
    if not free.sharding:
        return [setting.sharded]
    return [False] if setting.gpus == 1 or setting.peft == "qlora" else [False, True]


def choose(asked: Planned, free: Free) -> tuple[Planned, list[Planned]]:
    """The best setting, and the others worth knowing, best first.

    If it says all, as on one card, the setting that was asked for wins if it fits. Otherwise, the lowest tier with a
    setting that fits, and in it the fastest. If nothing fits, what was asked for comes back.
    """
    found = list(enumerate_settings(asked, free))
    fitting = [planned for planned in found if planned.fits]
    ranked = sorted(fitting, key=lambda planned: (planned.tier, planned.time.total))
    is_settled = asked.fits and (asked.setting.gpus == 1 or not free.sharding)
    best = asked if is_settled or not ranked else ranked[0]
    rest = [planned for planned in _distinct(ranked) if planned.setting != best.setting]
    return best, rest


def _distinct(ranked: Sequence[Planned]) -> list[Planned]:
    """The fastest of each way to save memory: one token budget for each policy, precision and layout."""
    seen: dict[Any, Planned] = {}
    for planned in ranked:
        setting = planned.setting
        key = (setting.policy, setting.offload, OPTIMIZERS[setting.optim], setting.weight_bytes, setting.sharded)
        seen.setdefault(key, planned)
    return list(seen.values())


def ways_out(asked: Planned, free: Free) -> list[Planned]:
    """The cheapest settings that fit if more may be changed: at most three, the fewest sacrifices first."""
    every = replace(free, policy=True, max_tokens=True, precision=True)
    found = [planned for planned in enumerate_settings(asked, every) if planned.fits]
    return _distinct(sorted(found, key=lambda planned: (planned.tier, planned.time.total)))[:3]
