"""The cost of a group, and how rows are dealt to processes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.packs.balance import BalancedSampler, deal, group_cost


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
