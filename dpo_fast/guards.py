"""What stops a run that must not go on."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dpo_fast.batch import Group, pack
from dpo_fast.config import DPOConfig, TrainingError, UserError
from dpo_fast.model import CannotPack, NoLayout, Policy, use_own_attention, use_packed_attention
from dpo_fast.objective import loss_at_reference, slope_at_reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("dpo_fast")

# Names in configurations for how far attention sees.
WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "local_attention")
# Tokens of the group that the packed forward is checked on: enough to show a difference, few enough to cost nothing.
CHECKED_TOKENS = 64


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

    def __init__(self) -> None:
        self._flags: list[tuple[int, Sequence[int], Tensor]] = []

    def add(self, step: int, rows: Sequence[int], finite: Tensor) -> None:
        """`finite`: one flag per row, or one for all of them (the gradient)."""
        self._flags.append((step, rows, finite))

    @property
    def all_finite(self) -> Tensor:
        """Scalar bool on the device, of the flags that were not checked yet; there is one at least."""
        return torch.stack([finite.all() for _, _, finite in self._flags]).all()

    def check(self, *, all_finite: bool | None = None) -> None:
        """Raise a TrainingError that names the first bad step and its rows.

        Args:
            all_finite: the property's value, where it was brought to the host already; else it is read now.
        """
        if not self._flags:
            return
        good = bool(self.all_finite) if all_finite is None else all_finite
        flags, self._flags = self._flags, []
        for step, rows, finite in () if good else flags:
            if bool(finite.all()):
                continue
            what = "gradient" if finite.ndim == 0 else "loss"
            bad = list(rows) if finite.ndim == 0 else [r for r, ok in zip(rows, finite.tolist(), strict=True) if not ok]
            raise TrainingError(
                f"the {what} of step {step} is not finite (data rows, from 0: {', '.join(map(str, bad))}). Nothing was "
                "saved after it; look at these rows, lower --learning_rate, or go on from the last checkpoint with "
                "--resume auto"
            )


@torch.no_grad()
def check_packed_forward(policy: Policy, groups: list[Group]) -> None:
    """Compare a packed group, and one beyond each window, with the model's own forward, one answer at a time.

    This is what turns an architecture that packs do not fit (a recurrent one, another mask) into answers computed one
    by one, with a warning, and one whose head is another into a message: never a silent wrong answer. It costs one
    short forward a start.

    Raises:
        UserError: even one by one a log-prob differs by more than the dtype's noise.
    """
    telling = _telling_groups(groups, attention_windows(policy.model))
    packed, reason = [], ""
    try:
        packed = [policy.score(pack([group])) for group in telling]
    except NoLayout:
        reason = "its attention is not told where answers begin"
    except CannotPack as feature:
        reason = str(feature)
    use_own_attention(policy.model)
    plain = [torch.cat([_plain_logps(policy, group, answer) for answer in group.answers]) for group in telling]
    if packed:
        difference, row = _largest_difference(packed, plain, telling)
        if difference <= policy.noise:
            use_packed_attention(policy.model)
            return
        reason = f"row {row} comes out {difference:.2g} nats off"
    policy.shares_prompts = False
    name = type(policy.model).__name__
    logger.warning(
        "%s cannot share a prompt among answers (%s): each answer is computed with a prompt of its own", name, reason
    )
    difference, row = _largest_difference([policy.score(pack([group])) for group in telling], plain, telling)
    if not difference <= policy.noise:
        raise UserError(
            f"{name} gives other log-probs than its own forward (row {row}: {difference:.2g} nats apart, "
            f"expected at most {policy.noise:g}): its head is not supported yet"
        )


def attention_windows(model: PreTrainedModel) -> set[int]:
    """Lengths beyond which a model's attention may see less than everything, by its configuration."""
    config = model.config.get_text_config()
    return {value for name in WINDOWS if type(value := getattr(config, name, None)) is int}


def _telling_groups(groups: list[Group], windows: set[int]) -> list[Group]:
    """The cheapest group in which a state that leaks from answer to answer would show, else the longest.

    And for each window the cheapest one that does not fit in it: where there is none, it cuts nothing.
    """
    telling = [group for group in groups if len(group.prompt_ids) and min(map(len, group.answers)) > 1]
    kinds = [[group for group in telling if group.num_tokens >= CHECKED_TOKENS] or [max(groups, key=_num_tokens)]]
    for window in sorted(windows):
        kinds.append([group for group in telling if len(group.prompt_ids) + max(map(len, group.answers)) > window])
    cheapest = [min(kind, key=_num_tokens) for kind in kinds if kind]
    return list({id(group): group for group in cheapest}.values())


def _num_tokens(group: Group) -> int:
    return group.num_tokens


def _largest_difference(left: list[Tensor], right: list[Tensor], groups: list[Group]) -> tuple[float, int]:
    """The largest one, nan above all, and the row of its group."""
    found = [((a - b).abs().max().item(), group.row) for a, b, group in zip(left, right, groups, strict=True)]
    return max(found, key=lambda pair: (math.isnan(pair[0]), pair[0]))


def _plain_logps(policy: Policy, group: Group, answer: np.ndarray) -> Tensor:
    """Log-probs of one answer's scored tokens by the model's own forward and torch's log_softmax."""
    ids = torch.from_numpy(np.concatenate([group.prompt_ids, answer]).astype(np.int64)).to(policy.device)
    num_targets = min(len(answer), len(ids) - 1)
    # Logits of a long prompt would take more memory than training does.
    can_cut = "logits_to_keep" in inspect.signature(policy.model.forward).parameters
    options = {"logits_to_keep": num_targets + 1} if can_cut else {}
    with policy.autocast():
        logits = policy.model(input_ids=ids[None], use_cache=False, **options).logits[0, -num_targets - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, ids[-num_targets:, None])[:, 0].cpu()
