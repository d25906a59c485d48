"""Accuracy, margin and calibration of the implicit reward on pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dpo_fast.analysis.intervals import bootstrap_interval

CALIBRATION_BINS = 10


def pair_figures(policy: Sequence[np.ndarray], reference: Sequence[np.ndarray], beta: float) -> dict[str, Any]:
    """Accuracy, margins and calibration of the implicit reward.

    Args:
        policy: for each row (P_i, 2) log-probs of the chosen and rejected answers of its pairs, in nats.
        reference: the same under the reference.
        beta: factor of the reward.

    Returns:
        `rows` and `pairs`: their numbers. With intervals over rows, each row counted once: `accuracy`, `margin`,
        `loss`, `reward_chosen`, `reward_rejected`, and by plain log-probs `policy_prefers_chosen` and
        `reference_prefers_chosen`. `calibration`: see the function of that name.
    """
    rewards = [beta * (own - ref) for own, ref in zip(policy, reference, strict=True)]
    margins = [chosen_rejected[:, 0] - chosen_rejected[:, 1] for chosen_rejected in rewards]

    def interval(values: Sequence[np.ndarray], *, share: bool = False) -> dict[str, float]:
        return asdict(bootstrap_interval(np.array([row.mean() for row in values]), share=share))

    # A tie counts half.
    def wins(difference: np.ndarray) -> np.ndarray:
        return (difference > 0) + 0.5 * (difference == 0)

    return {
        "rows": len(margins),
        "pairs": sum(map(len, margins)),
        "accuracy": interval([wins(margin) for margin in margins], share=True),
        "margin": interval(margins),
        "loss": interval([np.logaddexp(0, -margin) for margin in margins]),
        "reward_chosen": interval([reward[:, 0] for reward in rewards]),
        "reward_rejected": interval([reward[:, 1] for reward in rewards]),
        "policy_prefers_chosen": interval([wins(row[:, 0] - row[:, 1]) for row in policy], share=True),
        "reference_prefers_chosen": interval([wins(row[:, 0] - row[:, 1]) for row in reference], share=True),
        "calibration": calibration(np.concatenate(margins)),
    }


def calibration(margins: np.ndarray) -> dict[str, Any]:
    """Whether sigmoid(margin), the model's probability that the chosen answer is better, is calibrated.

    Args:
        margins: (P,) beta times the difference of log-ratios.

    Returns:
        `brier`: mean of (1 - probability)²; a model that knows nothing has 0.25. `ece`: expected calibration error, the
        mean distance between confidence and accuracy over bins of equal count (Guo et al. 2017, arXiv 1706.04599,
        eq. 3). `bins`: by rising confidence max(p, 1 - p), each with `confidence`, `accuracy` and `pairs`.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = (margins > 0) + 0.5 * (margins == 0)
    probability = np.where(margins >= 0, confidence, 1 - confidence)
    order = np.argsort(confidence, kind="stable")
    bins = [
        {"confidence": float(confidence[part].mean()), "accuracy": float(right[part].mean()), "pairs": len(part)}
        for part in np.array_split(order, min(CALIBRATION_BINS, len(order)))
    ]
    distance = sum(one["pairs"] * abs(one["confidence"] - one["accuracy"]) for one in bins)
    return {"brier": float(((1 - probability) ** 2).mean()), "ece": distance / len(margins), "bins": bins}
