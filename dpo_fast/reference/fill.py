"""Scores of a frozen model through the reference store: what training reads, and `dpo-fast score`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dpo_fast.config import ModelConfig
from dpo_fast.console import progress_line, say
from dpo_fast.kernels.autotune import cache_dir
from dpo_fast.model.check import with_fitting_layout
from dpo_fast.model.placement import pick_device
from dpo_fast.model.policy import Policy
from dpo_fast.packs.bins import best_fit_decreasing
from dpo_fast.packs.budget import token_budget
from dpo_fast.packs.layout import Group
from dpo_fast.reference.fingerprint import model_fingerprint
from dpo_fast.reference.scores import AnswerLogps, Reference
from dpo_fast.reference.store import ReferenceStore

PAIRS_SCORED_AT_ONCE = 8


def reference_logps(
    config: ModelConfig,
    name: str,
    groups: list[Group],
    *,
    console: Console,
    packs: Sequence[Sequence[int]] | None = None,
    policy: Policy | None = None,
    fingerprint: str | None = None,
) -> tuple[list[AnswerLogps], str]:
    """Log-probs of the answers in `packs`, from the store where it has them, else scored now.

    Args:
        config: where the store is and how models are loaded.
        name: the reference model.
        groups: all groups; `packs` lists indices into them.
        console: for the progress line.
        packs: layout to score in; a group that is in no pack is not scored. None puts all groups into full packs.
        policy: the reference, if it is loaded and checked already; else it is loaded only if a row is missing.
        fingerprint: of the reference, if it is known from an earlier start.

    Returns:
        For each group its answers' (A_i,) fp32 arrays, none for a group in no pack; and the fingerprint.
    """
    path = Path(config.reference_store) if config.reference_store else cache_dir() / "reference.sqlite"
    if packs is None:
        budget = token_budget(config, groups, pairs=PAIRS_SCORED_AT_ONCE, device=pick_device(config.device))
        packs = best_fit_decreasing([group.num_tokens for group in groups], budget)
    wanted = [i for packed in packs for i in packed]
    with ReferenceStore(path) as store:
        if fingerprint is None or Reference(store, fingerprint).missing([groups[i] for i in wanted]):
            if policy is None:
                policy = with_fitting_layout(Policy.load(config, name), [groups[i] for i in wanted])
            fingerprint = model_fingerprint(policy.model, numerics=policy.numerics)
        reference = Reference(store, fingerprint)
        if policy is not None:
            fill_reference(reference, policy, groups, packs, console)
        found = dict(zip(wanted, reference.lookup([groups[i] for i in wanted]), strict=True))
    return [found.get(i, ()) for i in range(len(groups))], fingerprint


def fill_reference(
    reference: Reference, policy: Policy, groups: list[Group], packs: Sequence[Sequence[int]], console: Console
) -> None:
    """Check a few stored rows against the model, then score what is missing, pack by pack."""
    wanted = [groups[i] for packed in packs for i in packed]
    reference.verify(wanted, policy.score, tolerance=policy.noise)
    missing = reference.missing(wanted)
    if not missing:
        say(console, f"reference: {len(wanted)} rows, all cached")
        return
    with progress_line(console, "reference", len(missing)) as line:
        reference.fill(groups, policy.score, packs=packs, progress=line.advance)
    say(console, f"reference: scored {len(missing)} of {len(wanted)} rows ({len(wanted) - len(missing)} cached)")
