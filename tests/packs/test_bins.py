"""Best fit, and the sampler."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.packs.bins import StepSampler, best_fit_decreasing


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


def sampler(**changes):
    settings = {"groups_per_step": 4, "max_tokens": 50, "seed": 3} | changes
    lengths = settings.pop("lengths", [10 + i for i in range(11)])
    return StepSampler(lengths, **settings)


def test_an_epoch_sees_every_group_once_and_the_next_in_another_order():
    s = sampler()
    assert s.steps_per_epoch == 3
    epochs = [[sorted(i for packed in next(s) for i in packed) for _ in range(3)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(i for step in epoch for i in step) == list(range(11))
        assert [len(step) for step in epoch] == [4, 4, 3]
    assert epochs[0] != epochs[1]
    assert [next(sampler(seed=4)) for _ in range(1)] != [next(sampler()) for _ in range(1)]


def test_a_restored_sampler_goes_on_where_it_was():
    first, second = sampler(), sampler()
    for _ in range(5):
        next(first)
    second.load_state_dict(first.state_dict())
    assert [next(first) for _ in range(6)] == [next(second) for _ in range(6)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "seed is 4, was 3"),
        ({"groups_per_step": 2}, "groups per step is 2, was 4"),
        ({"max_tokens": 60}, "tokens per pack is 60, was 50"),
        ({"lengths": [5] * 11}, "data"),
    ],
)
def test_a_state_of_another_run_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sampler(**changes).load_state_dict(sampler().state_dict())
