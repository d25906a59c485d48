"""Means and shares with 95% intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        """`55% [52%, 58%]`."""
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]"


def wilson_interval(successes: int, trials: int) -> Estimate:
    """Share of independent trials, with Wilson's score interval (JASA 1927), which holds near 0 and 1 too."""
    z = 1.959964
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return Estimate(share, centre - half, centre + half)


def bootstrap_interval(per_prompt: np.ndarray, *, resamples: int = 4000) -> Estimate:
    """Mean of a (P,) array; percentile bootstrap over prompts, since answers to one prompt are not independent."""
    rng = np.random.default_rng(0)
    means = per_prompt[rng.integers(len(per_prompt), size=(resamples, len(per_prompt)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(per_prompt.mean()), float(low), float(high))
