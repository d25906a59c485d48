"""Best fit, and the sampler."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.packs.bins import best_fit_decreasing


@given(st.lists(st.integers(1, 100), max_size=80), st.integers(1, 120))
def test_every_item_lies_in_one_bin_and_no_bin_overflows(lengths, budget):
    bins = best_fit_decreasing(lengths, budget)
    assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
    for items in bins:
        assert len(items) == 1 or sum(lengths[i] for i in items) <= budget
    assert bins == best_fit_decreasing(lengths, budget)
    # Two bins of half the budget or less could have been one.
    small = [items for items in bins if 2 * sum(lengths[i] for i in items) <= budget]
    assert len(small) <= 1


def test_best_fit_by_hand():
    assert best_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert best_fit_decreasing([], 10) == []


def test_preference_like_lengths_fill_their_packs():
    lengths = np.random.default_rng(0).lognormal(6, 0.6, 5000).astype(int) + 1
    bins = best_fit_decreasing(lengths.tolist(), 8192)
    assert lengths.sum() / (8192 * len(bins)) > 0.99
