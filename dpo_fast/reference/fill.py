"""Scores of a frozen model through the reference store: what training reads, and `dpo-fast score`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from rich.console import Console
from torch import Tensor

from dpo_fast.config import ModelConfig
from dpo_fast.console import progress_line, say
from dpo_fast.errors import UserError
from dpo_fast.kernels.autotune import cache_dir
from dpo_fast.model.check import with_fitting_layout
from dpo_fast.model.layers import with_fused_layers
from dpo_fast.model.placement import pick_device
from dpo_fast.model.policy import Policy
from dpo_fast.packs.bins import best_fit_decreasing
from dpo_fast.packs.budget import token_budget
from dpo_fast.packs.layout import Group
from dpo_fast.ranks import ONE_PROCESS, Ranks
from dpo_fast.reference.fingerprint import model_fingerprint
from dpo_fast.reference.scores import AnswerLogps, Reference
from dpo_fast.reference.store import ReferenceStore

PAIRS_SCORED_AT_ONCE = 8


@dataclass(frozen=True)
class KnownReference:
    """The reference that an earlier start of a run used.

    Attributes:
        fingerprint: of the model.
        digests: (G,) int64 `value_digests` of the rows that it trains on.
        changes: the settings that name another model now, for the message; empty if they are the same.
    """

    fingerprint: str
    digests: Tensor
    changes: str = ""


def reference_logps(
    config: ModelConfig,
    name: str,
    groups: list[Group],
    *,
    console: Console,
    packs: Sequence[Sequence[int]] | None = None,
    policy: Policy | None = None,
    known: KnownReference | None = None,
    load: Callable[[], Policy] | None = None,
    ranks: Ranks = ONE_PROCESS,
    wanted: Sequence[int] | None = None,
) -> tuple[list[AnswerLogps], str]:
    """Log-probs of the answers in `packs`, from the store where it has them, else scored now.

    Args:
        config: where the store is and how models are loaded.
        name: the reference model.
        groups: all groups; `packs` lists indices into them.
        console: for the progress line.
        packs: layout to score in; a group that is in no pack is not scored. None puts all groups into full packs.
        policy: the reference, if it is loaded and checked already; else it is loaded only if a row is missing.
        known: what an earlier start used. Scores that differ from those are compared with the model.
        load: loads the reference, checked; by default as `config` says.
        ranks: the processes that share the reference; `packs` are those of this one.
        wanted: indices of the groups in the packs of all processes; by default those in `packs`.

    Returns:
        For each group its answers' (A_i,) fp32 arrays, none for a group in no pack; and the fingerprint.

    Raises:
        UserError: the model is not the known one, or its scores in the store are not its own.
    """
    if packs is None:
        budget = token_budget(config, groups, pairs=PAIRS_SCORED_AT_ONCE, device=pick_device(config.device))
        packs = best_fit_decreasing([group.num_tokens for group in groups], budget)
    if wanted is None:
        wanted = [i for packed in packs for i in packed]
    wanted_groups = [groups[i] for i in wanted]

    def load_by_config() -> Policy:
        policy = with_fitting_layout(Policy.load(config, name), wanted_groups)
        return with_fused_layers(policy, wanted_groups, config.fused_layers)

    load = load or load_by_config
    fingerprint = known.fingerprint if known else None
    with ReferenceStore(store_path(config)) as store:
        if (
            known is None
            or known.changes
            or ranks.any(bool(Reference(store, known.fingerprint).missing(wanted_groups)))
        ):
            policy = policy or load()
            fingerprint = model_fingerprint(policy.model, numerics=policy.numerics)
            if known is not None and fingerprint != known.fingerprint:
                raise UserError(
                    f"--resume: {known.changes or name}: not the reference that the run began with (other weights, "
                    "configuration, dtype or layout). Pass that one, or start another run in another --output_dir"
                )
        assert fingerprint is not None
        reference = Reference(store, fingerprint, ranks)
        if policy is not None:
            fill_reference(reference, policy, groups, packs, console, wanted=wanted)
        found = dict(zip(wanted, reference.lookup(wanted_groups), strict=True))
        answers = [found.get(i, ()) for i in range(len(groups))]
        if known is not None and (differing := ranks.first(_differing(known.digests, answers))):
            policy = policy or load()
            others = [groups[i] for i in differing]
            reference.verify(others, policy.score, tolerance=policy.noise, sample=len(others))
            say(
                console,
                f"reference: {len(others)} rows (the first: row {others[0].row}) have other scores than the run began "
                "with. They agree with the model to rounding, but the result will not be bit-identical",
                style="yellow",
            )
    return answers, fingerprint


def store_path(config: ModelConfig) -> Path:
    """The file of the reference store."""
    return Path(config.reference_store) if config.reference_store else cache_dir() / "reference.sqlite"


def value_digests(answers: Sequence[AnswerLogps]) -> Tensor:
    """(G,) int64 hashes of each group's log-probs; 0 for a group that has none."""
    return torch.tensor([_digest(logps) if logps else 0 for logps in answers], dtype=torch.int64)


def _digest(answers: AnswerLogps) -> int:
    digest = xxhash.xxh3_64()
    for logps in answers:
        digest.update(np.ascontiguousarray(logps, dtype="<f4").tobytes())
    return digest.intdigest() - 2**63


def _differing(before: Tensor, answers: Sequence[AnswerLogps]) -> list[int]:
    """Indices of the groups whose log-probs are not those of `before`; groups that it does not know are left out."""
    now = value_digests(answers[: len(before)])
    return ((before != now) & (before != 0) & (now != 0)).nonzero().flatten().tolist()


def fill_reference(
    reference: Reference,
    policy: Policy,
    groups: list[Group],
    packs: Sequence[Sequence[int]],
    console: Console,
    *,
    wanted: Sequence[int] | None = None,
) -> None:
    """Check a few stored rows against the model, then score what is missing, pack by pack.

    `wanted` are the indices of the groups in the packs of all processes, by default those in `packs`.
    """
    wanted_groups = [groups[i] for i in (wanted or [i for packed in packs for i in packed])]
    missing = reference.missing(wanted_groups)
    if damaged := reference.damaged(wanted_groups):
        rows = [wanted_groups[i].row for i in damaged]
        more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
        named = ", ".join(map(str, rows[:10])) + more
        say(console, f"reference: the stored scores of {len(rows)} rows are damaged and are recomputed (rows {named})")
    reference.verify(wanted_groups, policy.score, tolerance=policy.noise)
    if not reference.ranks.any(bool(missing)):
        say(console, f"reference: {len(wanted_groups)} rows, all cached")
        return
    with progress_line(console, "reference", len(missing)) as line:
        reference.fill(groups, policy.score, packs=packs, progress=line.advance)
    say(
        console,
        f"reference: scored {len(missing)} of {len(wanted_groups)} rows ({len(wanted_groups) - len(missing)} cached)",
    )
