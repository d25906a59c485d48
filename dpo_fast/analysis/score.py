"""`dpo-fast score`: the log-probs of a model, per pair and per token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dpo_fast.config import ScoreConfig
from dpo_fast.console import say
from dpo_fast.curate.rows import hold_output
from dpo_fast.curate.stopping import exit_on_signals
from dpo_fast.data.load import load_groups
from dpo_fast.errors import UserError
from dpo_fast.files import write_file_atomically
from dpo_fast.model.load import tokenizer_of
from dpo_fast.model.placement import pick_device
from dpo_fast.packs.layout import Group
from dpo_fast.reference.fill import reference_logps
from dpo_fast.reference.scores import AnswerLogps


@exit_on_signals(resumable=False)
def score(config: ScoreConfig, *, console: Console | None = None) -> Path:
    """Write the log-probs of `config.model` on `config.data` to `config.out`, one JSON object per pair.

    Scores go through the reference store: cached rows are not scored again, and a killed run resumes.
    """
    console = console or Console()
    if not config.data:
        raise UserError("no data given: pass --data with a file of preference rows or a Hub dataset's name")
    if not config.out:
        raise UserError("no output given: pass --out with the .jsonl file to write")
    pick_device(config.device)
    with hold_output(Path(config.out)):
        return _score(config, Path(config.out), console)


def _score(config: ScoreConfig, out: Path, console: Console) -> Path:
    tokenizer = tokenizer_of(config)
    groups, report = load_groups(config, tokenizer)
    say(console, report.render())
    scores, _ = reference_logps(config, config.model, groups, console=console)
    lines = [
        json.dumps(record)
        for group, answers in zip(groups, scores, strict=True)
        for record in pair_records(group, answers, tokens=config.tokens)
    ]
    write_file_atomically(out, "\n".join(lines) + "\n")
    say(console, f"{len(lines)} pairs: {out}")
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
