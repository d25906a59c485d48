"""The reference of a run: scored once into the store, a model that follows the policy, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError
from dpo_fast.losses.objective import needs_reference
from dpo_fast.model.policy import Policy
from dpo_fast.model.scorer import Scorer
from dpo_fast.packs.layout import Group
from dpo_fast.reference.fill import KnownReference, reference_logps, value_digests
from dpo_fast.reference.moving import MovingReference
from dpo_fast.reference.scores import AnswerLogps, StoredScores
from dpo_fast.training.plan import Plan
from dpo_fast.training.resume import Changes, described


@dataclass(frozen=True)
class RunReference:
    """What the policy is compared with.

    Attributes:
        train: scores the packs of the training rows; None if the loss needs no reference.
        held_out: scores those of the rows held out.
        answers: log-probs of each training row's answers, if they are stored.
        fingerprint: of the stored reference.
        digests: (G,) int64 hashes of the training rows' log-probs; of no row if they are not stored.
        moving: the reference that follows the policy, if it does.
    """

    train: Scorer | None = None
    held_out: Scorer | None = None
    answers: list[AnswerLogps] | None = None
    fingerprint: str | None = None
    digests: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    moving: MovingReference | None = None


def prepare_reference(
    config: DPOConfig,
    plan: Plan,
    policy: Policy | None,
    groups: list[Group],
    held_out: list[Group],
    *,
    known: KnownReference | None,
    load: Callable[[str], Policy],
    console: Console,
) -> RunReference:
    """Score the rows that the run will read, or load the model that will score them.

    Args:
        config: the run's settings.
        plan: the run's plan.
        policy: the reference if it is loaded and checked already, as at the start of a run without `ref_model`.
        groups: to train on.
        held_out: to evaluate on.
        known: the reference of the run that is resumed.
        load: loads the reference by its name.
        console: for the progress line.
    """
    name = config.ref_model or config.model
    if known is not None and (known.digests.dtype, known.digests.shape) != (torch.int64, (len(groups),)):
        raise UserError(
            "--resume: the checkpoint's hashes of the reference scores do not fit its rows; resume from another one"
        )
    if config.sync_ref_model:
        moving = MovingReference(
            load(name),
            sync_steps=config.ref_model_sync_steps,
            alpha=config.ref_model_mixup_alpha,
        )
        return RunReference(moving, moving, moving=moving)
    if not needs_reference(config):
        return RunReference()
    # The packs of the first epoch hold every group that the run will read, in the layout of its first steps: scored in
    # them, the reference equals the untrained policy bit for bit.
    sampler = plan.sampler(groups)
    first_epoch = list(islice(sampler, min(plan.num_steps, sampler.steps_per_epoch)))
    first_packs = [packed for step in first_epoch for packed in step.packs if packed]
    held_out_packs = [[len(groups) + i for i in packed] for packed in plan.packs(held_out) if packed]
    wanted = [i for step in first_epoch for i in step.groups] + [len(groups) + i for i in range(len(held_out))]
    answers, fingerprint = reference_logps(
        *(config, name, groups + held_out),
        packs=first_packs + held_out_packs,
        policy=policy,
        known=known,
        load=partial(load, name),
        console=console,
        ranks=plan.ranks,
        wanted=wanted,
    )
    ours, theirs = answers[: len(groups)], answers[len(groups) :]
    train, evaluate = StoredScores(groups, ours), StoredScores(held_out, theirs)
    return RunReference(train, evaluate, ours, fingerprint, value_digests(ours))


def known_reference(state: Mapping[str, Any], changes: Changes) -> KnownReference | None:
    """The reference of a checkpoint's state; None if its loss had none, or one that moved.

    Raises:
        UserError: `changes` name another model, and there is no reference to compare it with.
    """
    named = described(changes, ["model", "ref_model"])
    if state["reference"] is not None:
        return KnownReference(state["reference"], state["reference_digests"], named)
    if named:
        raise UserError(
            f"--resume: {named}: may not change in a run. Resume with the old values, or start another run in another "
            "--output_dir"
        )
    return None
