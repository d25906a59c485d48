"""Means and shares with 95% intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Half the width of the normal distribution's 95% interval.
_Z = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        """`55% [52%, 58%]`."""
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]"


def bootstrap_interval(per_prompt: np.ndarray, *, share: bool = False, resamples: int = 4000) -> Estimate:
    """Mean and percentile bootstrap over prompts, since answers to one prompt are not independent.

    Args:
        per_prompt: (P,) one value per prompt.
        share: values are shares of a whole. If all are 0 or all are 1, resampling would claim certainty, so the
            interval is Wilson's for P trials (JASA 1927).
        resamples: their number; drawn with a fixed seed.
    """
    value, count = float(per_prompt.mean()), len(per_prompt)
    if share and value in (0.0, 1.0):
        width = _Z**2 / (count + _Z**2)
        return Estimate(value, value * (1 - width), value + (1 - value) * width)
    means = per_prompt[np.random.default_rng(0).integers(count, size=(resamples, count))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(value, float(low), float(high))
