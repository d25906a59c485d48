"""Packing and the sampler."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.packs.balance import BalancedSampler, deal, group_cost
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


def test_a_cost_by_hand():
    """1000 tokens of prompt and two answers of 500: 500k scores of the prompt, 625k of each answer."""
    assert group_cost(1000, [500, 500], 100) == 2000 + 1_750_000 / 600


@given(st.lists(st.floats(0, 1e6), max_size=60), st.integers(1, 8))
def test_shares_are_equally_many_and_hold_everything(costs, num_shares):
    if len(costs) % num_shares:
        with pytest.raises(ValueError, match="expected a multiple"):
            deal(costs, num_shares)
        return
    shares = deal(costs, num_shares)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    assert {len(share) for share in shares} == {len(costs) // num_shares}
    assert shares == deal(costs, num_shares)


def test_dealt_steps_cost_all_processes_alike():
    """Preference-like lengths, 8 processes, 8 pairs each: the slowest one waits 3% where it waited a quarter."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5.5, 0.7, (4096, 3)).astype(int) + 1
    costs = [group_cost(prompt, answers, 1024) for prompt, *answers in lengths.tolist()]
    balanced = BalancedSampler(range(4096), costs, num_processes=8, batch_size=8)
    order = list(balanced)
    assert len(balanced) == 4096

    def excess(order):
        """Cost of a step's slowest process over the mean, averaged over steps."""
        of_processes = np.asarray(costs)[order].reshape(-1, 8, 8).sum(2)
        return (of_processes.max(1) / of_processes.mean(1)).mean() - 1

    assert excess(order) < 0.03
    assert excess(list(range(4096))) > 0.25
    steps = np.asarray(order).reshape(-1, 64)
    assert (np.sort(steps, 1) == np.arange(4096).reshape(-1, 64)).all(), "a step holds the rows that it held"


def test_the_end_of_an_epoch_stays_as_it_was():
    class Epochs:
        def set_epoch(self, epoch):
            self.order = [*range(8 - epoch)][::-1]

        def __iter__(self):
            return iter(self.order)

    balanced = BalancedSampler(Epochs(), [1, 2, 3, 4, 5, 6, 7, 8], num_processes=2, batch_size=2)
    balanced.set_epoch(0)
    assert list(balanced) == [7, 4, 6, 5, 3, 0, 2, 1]
    balanced.set_epoch(1)
    assert list(balanced) == [6, 5, 4, 3, 2, 1, 0]
    balanced = BalancedSampler(range(11), range(11), num_processes=2, batch_size=2)
    assert list(balanced) == [0, 1, 2, 3, 7, 4, 6, 5, 8, 9, 10]


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
