"""Checks that stop a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpo_fast.config import DPOConfig
from dpo_fast.errors import TrainingError, UserError
from dpo_fast.losses.objective import loss_at_reference, slope_at_reference
from dpo_fast.model.finite import not_finite
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import Group
from dpo_fast.ranks import ONE_PROCESS, Ranks
from dpo_fast.training.checkpoint import newest_checkpoint


def check_first_step(metrics: dict[str, float], groups: list[Group], config: DPOConfig, policy: Policy) -> None:
    """At step 0 the policy is the reference: margins are 0 and the sigmoid loss is ln 2.

    Scored in the same packs the two agree bit for bit. Log-probs found in the store may have been scored in other
    packs and differ by rounding, at most `noise` nats an answer; anything above means stale or foreign scores.

    Raises:
        TrainingError: they differ.
    """
    longest = max(len(answer) for group in groups for answer in group.answers)
    weighted = config.use_weighting or config.weight_column is not None
    known = None if weighted else loss_at_reference(config)
    expected = metrics["loss"] if known is None else known
    noise = (1e-5 if policy.compute_dtype is torch.float32 else 5e-2) * math.sqrt(longest)
    slope = slope_at_reference(config)
    loss_error = abs(metrics["loss"] - expected)
    margin_error = abs(metrics["rewards/margins"])
    if not (loss_error <= 1e-6 + slope * config.beta * noise and margin_error <= config.beta * noise):
        raise TrainingError(
            f"step 0 is not at the reference: loss {metrics['loss']:.7f} (expected {expected:.7f}), margin "
            f"{metrics['rewards/margins']:.2e} (expected 0). The stored reference log-probs belong to other weights or "
            "rows, or the model's forward is not deterministic. Nothing was trained. If --model was changed in place, "
            "remove the file that --reference_store names and run again"
        )


class FiniteWatch:
    """Collects flags on the device and reads them only when asked, so that a step need not wait for them."""

    def __init__(self, cure: Callable[[], str] = lambda: "lower --learning_rate", ranks: Ranks = ONE_PROCESS) -> None:
        """`cure` is asked for the end of the message when there is one to write; `ranks` check together."""
        self._flags: list[tuple[int, Sequence[int], Tensor]] = []
        self._cure = cure
        self._ranks = ranks

    def add(self, step: int, rows: Sequence[int], finite: Tensor) -> None:
        """`finite`: one flag per row, or one for all of them (the gradient)."""
        self._flags.append((step, rows, finite))

    @property
    def all_finite(self) -> Tensor:
        """Scalar bool on the device, of the flags that were not checked yet; there is one at least."""
        return torch.stack([finite.all() for _, _, finite in self._flags]).all()

    def check(self, *, all_finite: bool | None = None) -> None:
        """Raise a TrainingError that names the first bad step and its rows, in all processes if one has found it.

        Args:
            all_finite: the property's value if it is on the host already; otherwise it is read now.
        """
        if not self._flags:
            return
        good = bool(self.all_finite) if all_finite is None else all_finite
        flags, self._flags = self._flags, []
        if not self._ranks.any(not good):
            return
        found = self._ranks.gather(_first_bad(flags))
        # A loss that is not finite in one process is a gradient that is not in all.
        (step, is_gradient, rows), rank = min((bad, rank) for rank, bad in enumerate(found) if bad is not None)
        where = f" in process {rank}" if self._ranks.world_size > 1 and not is_gradient else ""
        raise TrainingError(
            f"the {'gradient' if is_gradient else 'loss'} of step {step} is not finite{where} (data rows, from 0: "
            f"{', '.join(map(str, rows))}). Nothing was saved after it; look at these rows, or {self._cure()}"
        )


def _first_bad(flags: list[tuple[int, Sequence[int], Tensor]]) -> tuple[int, bool, list[int]] | None:
    """Step, whether it is the gradient, and rows of the first flag that is not set."""
    for step, rows, finite in flags:
        if not bool(finite.all()):
            is_gradient = finite.ndim == 0
            bad = rows if is_gradient else [row for row, ok in zip(rows, finite.tolist(), strict=True) if not ok]
            return step, is_gradient, list(bad)
    return None


def check_tensors(
    tensors: Iterable[tuple[str, Tensor]], step: int, output_dir: Path, ranks: Ranks = ONE_PROCESS
) -> None:
    """Refuse to save weights or optimizer state that are not finite in some process. Waits for the device, once.

    Raises:
        TrainingError: it names the first such tensor and the last good checkpoint.
    """
    floats = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    bad = not_finite(floats)
    if ranks.any(bool(bad)):
        bad = next(filter(None, ranks.gather(bad)))
        more = f" and {len(bad) - 1} more of {len(floats)} tensors" if len(bad) > 1 else ""
        raise TrainingError(
            f"after step {step}, {bad[0]}{more} holds numbers that are not finite. They were not saved; "
            f"{way_back(output_dir)}"
        )


def way_back(output_dir: Path) -> str:
    """What to do after a run stopped itself; names the last good checkpoint."""
    try:
        checkpoint = newest_checkpoint(output_dir)
    except UserError:
        checkpoint = None
    if checkpoint is None:
        return "lower --learning_rate and start over with --overwrite true; there is no good checkpoint"
    return f"lower --learning_rate and resume with --resume auto; the last good checkpoint is {checkpoint}"
