"""The reference of a run: scored once into the store, a model that follows the policy, or none."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from rich.console import Console

from dpo_fast.config import DPOConfig
from dpo_fast.losses.objective import needs_reference
from dpo_fast.model.check import with_fitting_layout
from dpo_fast.model.policy import Policy
from dpo_fast.model.scorer import Scorer
from dpo_fast.packs.layout import Group
from dpo_fast.reference.fill import reference_logps
from dpo_fast.reference.moving import MovingReference
from dpo_fast.reference.scores import AnswerLogps, StoredScores
from dpo_fast.training.plan import Plan


@dataclass(frozen=True)
class RunReference:
    """What the policy is compared with.

    Attributes:
        train: scores the packs of the training rows; None if the loss needs no reference.
        held_out: scores those of the rows held out.
        answers: log-probs of each training row's answers, if they are stored.
        fingerprint: of the stored reference.
        moving: the reference that follows the policy, if it does.
    """

    train: Scorer | None = None
    held_out: Scorer | None = None
    answers: list[AnswerLogps] | None = None
    fingerprint: str | None = None
    moving: MovingReference | None = None


def prepare_reference(
    config: DPOConfig,
    plan: Plan,
    policy: Policy | None,
    groups: list[Group],
    held_out: list[Group],
    *,
    fingerprint: str | None,
    console: Console,
) -> RunReference:
    """Score the rows that the run will read, or load the model that will score them.

    Args:
        config: the run's settings.
        plan: the run's plan.
        policy: the reference if it is loaded and checked already, as at the start of a run without `ref_model`.
        groups: to train on.
        held_out: to evaluate on.
        fingerprint: of the reference, if it is known from a checkpoint.
        console: for the progress line.
    """
    name = config.ref_model or config.model
    if config.sync_ref_model:
        moving = MovingReference(
            with_fitting_layout(Policy.load(config, name), groups),
            sync_steps=config.ref_model_sync_steps,
            alpha=config.ref_model_mixup_alpha,
        )
        return RunReference(moving, moving, moving=moving)
    if not needs_reference(config):
        return RunReference()
    # The packs of the first epoch hold every group that the run will read, in the layout of its first steps: scored in
    # them, the reference equals the untrained policy bit for bit.
    sampler = plan.sampler(groups)
    first_packs = [packed for step in islice(sampler, min(plan.num_steps, sampler.steps_per_epoch)) for packed in step.packs]
    held_out_packs = [[len(groups) + i for i in packed] for packed in plan.packs(held_out)]
    answers, fingerprint = reference_logps(
        *(config, name, groups + held_out),
        packs=first_packs + held_out_packs,
        policy=policy,
        fingerprint=fingerprint,
        console=console,
    )
    ours, theirs = answers[: len(groups)], answers[len(groups) :]
    return RunReference(StoredScores(groups, ours), StoredScores(held_out, theirs), ours, fingerprint)
