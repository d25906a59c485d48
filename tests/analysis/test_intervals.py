"""Intervals against their definitions."""

import numpy as np
import pytest

from dpo_fast.analysis.intervals import bootstrap_interval


def test_bootstrap_interval_covers_at_its_rate():
    rng = np.random.default_rng(1)
    covered = [
        (interval := bootstrap_interval(rng.normal(0.3, 1, 80), resamples=500)).low <= 0.3 <= interval.high
        for _ in range(200)
    ]
    assert 0.88 < np.mean(covered) < 0.99


def test_one_value_has_no_width():
    interval = bootstrap_interval(np.array([0.25]))
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25))


@pytest.mark.parametrize("count", [1, 40])
def test_a_share_of_none_or_all_is_not_certain(count):
    for value in (0.0, 1.0):
        interval = bootstrap_interval(np.full(count, value), share=True)
        assert interval.value == value
        for end in (interval.low, interval.high):
            # Solves (p - share)^2 = z^2 p (1 - p) / n, which is what Wilson's interval means.
            assert (end - value) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, abs=1e-12)
