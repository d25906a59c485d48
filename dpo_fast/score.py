"""Scores of a frozen model through the reference store: what training reads, and `dpo-fast score`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dpo_fast.batch import Group
from dpo_fast.checkpoint import write_file_atomically
from dpo_fast.config import ModelConfig, ScoreConfig, UserError
from dpo_fast.data import best_fit_decreasing, load_groups
from dpo_fast.guards import check_packed_forward
from dpo_fast.kernels.autotune import cache_dir
from dpo_fast.model import Policy, load_tokenizer
from dpo_fast.progress import progress_line
from dpo_fast.reference import AnswerLogps, Reference, ReferenceStore, model_fingerprint


def score(config: ScoreConfig, *, console: Console | None = None) -> Path:
    """Write the log-probs of `config.model` on `config.data` to `config.out`, one JSON object a pair.

    Scores go through the reference store: rows scored before are read, and a run that was killed goes on.
    """
    console = console or Console()
    if not config.data:
        raise UserError("no data given: pass --data with a file of preference rows or a Hub dataset's name")
    if not config.out:
        raise UserError("no output given: pass --out with the .jsonl file to write")
    tokenizer = load_tokenizer(config.model, config.chat_template)
    groups, report = load_groups(config, tokenizer)
    console.print(report.render(), highlight=False, markup=False, soft_wrap=True)
    max_tokens = token_budget(config, groups, pairs=8)
    packs = best_fit_decreasing([group.num_tokens for group in groups], max_tokens)
    scores, _ = reference_logps(config, config.model, groups, packs=packs, console=console)
    lines = [
        json.dumps(record)
        for group, answers in zip(groups, scores, strict=True)
        for record in pair_records(group, answers, tokens=config.tokens)
    ]
    out = Path(config.out)
    write_file_atomically(out, "\n".join(lines) + "\n")
    console.print(f"{len(lines)} pairs: {out}", highlight=False, soft_wrap=True)
    return out


def pair_records(group: Group, answers: AnswerLogps, *, tokens: bool) -> list[dict[str, Any]]:
    """One record per pair of a group; sums are taken in fp64."""
    records = []
    for pair in group.pairs:
        record: dict[str, Any] = {"index": group.row}
        for side, answer in zip(("chosen", "rejected"), pair, strict=True):
            logps = answers[answer]
            record |= {f"{side}_logp": float(logps.astype(np.float64).sum()), f"{side}_len": len(logps)}
            if tokens:
                record[f"{side}_token_logps"] = logps.tolist()
        records.append(record)
    return records


def token_budget(config: Any, groups: Sequence[Group], pairs: int) -> int:
    """Tokens of one pack: `max_tokens_per_batch`, else room for `pairs` pairs of full length."""
    if config.max_tokens_per_batch is not None:
        if config.max_tokens_per_batch < 1:
            raise UserError(f"--max_tokens_per_batch {config.max_tokens_per_batch}: expected a number above 0")
        return int(config.max_tokens_per_batch)
    longest = max(group.num_tokens for group in groups)
    return pairs * (longest if config.max_length is None else 2 * config.max_length)


def reference_logps(
    config: ModelConfig,
    name: str,
    groups: list[Group],
    *,
    packs: Sequence[Sequence[int]],
    console: Console,
    policy: Policy | None = None,
    fingerprint: str | None = None,
) -> tuple[list[AnswerLogps], str]:
    """Log-probs of the answers in `packs`, from the store where it has them, else scored now.

    Args:
        config: where the store is and how models are loaded.
        name: the reference model.
        groups: all groups; `packs` lists indices into them.
        packs: layout to score in; a group that is in no pack is not scored.
        console: for the progress line.
        policy: the reference, if it is loaded and checked already; else it is loaded only if a row is missing.
        fingerprint: of the reference, if it is known from an earlier start.

    Returns:
        For each group its answers' (A_i,) fp32 arrays, none for a group in no pack; and the fingerprint.
    """
    path = Path(config.reference_store) if config.reference_store else cache_dir() / "reference.sqlite"
    wanted = [i for packed in packs for i in packed]
    with ReferenceStore(path) as store:
        if fingerprint is None or Reference(store, fingerprint).missing([groups[i] for i in wanted]):
            if policy is None:
                policy = Policy.load(config, name)
                check_packed_forward(policy, [groups[i] for i in wanted])
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
        console.print(f"reference: {len(wanted)} groups, all in the store", highlight=False, soft_wrap=True)
        return
    with progress_line(console, "reference", len(missing)) as line:
        reference.fill(groups, policy.score, packs=packs, progress=line.advance)
    console.print(
        f"reference: {len(missing)} of {len(wanted)} groups scored, the rest in the store",
        highlight=False,
        soft_wrap=True,
    )
