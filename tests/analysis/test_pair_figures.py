"""Accuracy, margins and calibration, calculated by hand."""

import math

import numpy as np
import pytest

from dpo_fast.analysis.pair_figures import calibration, pair_figures


def test_pair_figures_by_hand():
    # Rewards 0.5 * (own - ref): rows of one and of two pairs, the second row's pairs averaged before rows are.
    policy = [np.array([[-10.0, -12.0]]), np.array([[-5.0, -4.0], [-6.0, -6.0]])]
    reference = [np.array([[-12.0, -10.0]]), np.array([[-5.0, -2.0], [-6.0, -6.0]])]
    figures = pair_figures(policy, reference, 0.5)
    assert (figures["rows"], figures["pairs"]) == (2, 3)
    margins = [0.5 * 4, [0.5 * 2, 0.0]]
    assert figures["margin"]["value"] == pytest.approx((margins[0] + np.mean(margins[1])) / 2)
    assert figures["accuracy"]["value"] == pytest.approx((1 + 0.75) / 2)
    loss = [math.log1p(math.exp(-2)), (math.log1p(math.exp(-1)) + math.log(2)) / 2]
    assert figures["loss"]["value"] == pytest.approx(np.mean(loss))
    assert figures["reward_chosen"]["value"] == pytest.approx((1.0 + 0.0) / 2)
    assert figures["reward_rejected"]["value"] == pytest.approx((-1.0 - 0.5) / 2)
    assert figures["policy_prefers_chosen"]["value"] == pytest.approx((1 + 0.25) / 2)
    assert figures["reference_prefers_chosen"]["value"] == pytest.approx((0 + 0.25) / 2)


def test_an_honest_model_is_calibrated_and_an_overconfident_one_is_not():
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 40_000)
    truth = rng.random(40_000) < 1 / (1 + np.exp(-margins))
    honest = np.where(truth, margins, -margins)  # the better answer is the chosen one
    assert calibration(honest)["ece"] < 0.01
    assert calibration(3 * honest)["ece"] > 0.08
    assert calibration(honest)["brier"] < calibration(3 * honest)["brier"]
    bins = calibration(honest)["bins"]
    assert [one["pairs"] for one in bins] == [4000] * 10
    assert all(abs(one["confidence"] - one["accuracy"]) < 0.03 for one in bins)


def test_a_model_that_knows_nothing():
    figures = calibration(np.zeros(7))
    assert figures["brier"] == 0.25
    assert figures["ece"] == 0
    assert len(figures["bins"]) == 7
