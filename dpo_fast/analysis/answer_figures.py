"""Win rate and scores of two models' answers to the same prompts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from dpo_fast.analysis.intervals import bootstrap_interval
from dpo_fast.curate.rows import Row

SIDES = ("model", "reference")


def answer_figures(model: list[Row], reference: list[Row]) -> dict[str, Any]:
    """Win rate and scores over prompts.

    Args:
        model: rows with the model's answers, judged: `scores` and `signals`.
        reference: the same prompts with the reference's answers.

    Returns:
        `prompts` and `answers`: their numbers. With intervals over prompts: `win_rate` (answers of the same seed
        against each other; a tie counts half, an answer without a score loses to one with a score), `score` and, by
        name, `signals`, each with `model`, `reference` and `rise`. `wins`, `ties` and `losses` count answers, and
        `unjudged` the answers of each model that have no score.
    """
    outcomes = [
        np.array([_outcome(a, b) for a, b in zip(own["scores"], ref["scores"], strict=True)])
        for own, ref in zip(model, reference, strict=True)
    ]
    flat = np.concatenate(outcomes)
    names = list(model[0]["signals"])
    unjudged = [sum(score is None for row in rows for score in row["scores"]) for rows in (model, reference)]
    return {
        "prompts": len(model),
        "answers": len(flat),
        "win_rate": asdict(bootstrap_interval(np.array([row.mean() for row in outcomes]), share=True)),
        **{name: int((flat == value).sum()) for name, value in (("wins", 1), ("ties", 0.5), ("losses", 0))},
        "score": _compared([row["scores"] for row in model], [row["scores"] for row in reference]),
        "signals": {
            name: _compared([row["signals"][name] for row in model], [row["signals"][name] for row in reference])
            for name in names
        },
        "unjudged": dict(zip(SIDES, unjudged, strict=True)),
    }


def _outcome(own: float | None, ref: float | None) -> float:
    """1 for a win, 0 for a loss, 0.5 for a tie."""
    a, b = (-np.inf if score is None else score for score in (own, ref))
    return 0.5 if a == b else float(a > b)


def _compared(model: list[list[float | None]], reference: list[list[float | None]]) -> dict[str, Any] | None:
    """Means over the prompts for which both models have a scored answer; None if there are none."""
    means = np.array([[_mean(own), _mean(ref)] for own, ref in zip(model, reference, strict=True)])
    means = means[~np.isnan(means).any(1)]
    if not len(means):
        return None
    share = all(score in (0, 1, None) for scores in (*model, *reference) for score in scores)
    found = {
        "model": bootstrap_interval(means[:, 0], share=share),
        "reference": bootstrap_interval(means[:, 1], share=share),
        "rise": bootstrap_interval(means[:, 0] - means[:, 1]),
    }
    return {name: asdict(estimate) for name, estimate in found.items()}


def _mean(scores: list[float | None]) -> float:
    judged = [score for score in scores if score is not None]
    return float(np.mean(judged)) if judged else np.nan
