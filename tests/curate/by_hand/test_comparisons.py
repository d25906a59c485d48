"""The queue: what is compared, in which order, and what is repeated."""

from itertools import combinations

import pytest

from dpo_fast.config import LabelConfig
from dpo_fast.curate.by_hand.comparisons import make_queue
from dpo_fast.curate.by_hand.items import Item


def items_of(*answers):
    return [Item({}, (("", "p"),), tuple(own)) for own in answers]


def queue_of(items, **settings):
    return make_queue(items, LabelConfig(**settings))


def test_each_two_answers_that_differ_come_once():
    items = items_of("abcd", "xx", "y", "xxz")

    def pairs(which):
        queue = queue_of(items, pairs=which, repeat_share=0)
        found = [(c.item, *sorted((c.left, c.right))) for c in queue]
        assert len(found) == len(set(found))
        assert all(c.first is None for c in queue)
        return set(found)

    assert pairs("first_two") == {(0, 0, 1)}
    assert pairs("adjacent") == {(0, 0, 1), (0, 1, 2), (0, 2, 3), (3, 1, 2)}
    assert pairs("all") == {(0, *pair) for pair in combinations(range(4), 2)} | {(3, 0, 2), (3, 1, 2)}


def test_order_and_sides_are_random_and_follow_the_seed():
    items = items_of(*["ab"] * 400)
    queue = queue_of(items, repeat_share=0)
    assert queue == queue_of(items, repeat_share=0)
    assert queue != queue_of(items, repeat_share=0, seed=7)
    assert [c.item for c in queue] != sorted(c.item for c in queue)
    assert 140 < sum(c.left == 0 for c in queue) < 260  # six standard deviations of a fair coin


def test_some_come_a_second_time_later_on_sides_of_their_own():
    queue = queue_of(items_of(*["ab"] * 400), repeat_share=0.5)
    repeats = [(place, c) for place, c in enumerate(queue) if c.first is not None]
    assert len(queue) == 600
    assert len({c.first for _, c in repeats}) == len(repeats) == 200
    for place, again in repeats:
        first = queue[again.first]
        assert first.first is None
        assert first.item == again.item
        assert {first.left, first.right} == {again.left, again.right}
        assert place - again.first > 10
    assert 60 < sum(queue[c.first].left == c.left for _, c in repeats) < 140


@pytest.mark.parametrize("seed", range(30))
def test_where_few_come_twice_none_of_them_comes_soon(seed):
    queue = queue_of(items_of(*["ab"] * 30), repeat_share=0.1, seed=seed)
    gaps = [place - c.first for place, c in enumerate(queue) if c.first is not None]
    assert len(gaps) == 3
    assert min(gaps) > 9


@pytest.mark.parametrize(("number", "share", "repeats"), [(1, 1.0, 1), (2, 1.0, 2), (3, 0.1, 0), (12, 1.0, 12)])
def test_repeats_of_a_few_comparisons(number, share, repeats):
    queue = queue_of(items_of(*["ab"] * number), repeat_share=share)
    assert [c.first is not None for c in queue].count(True) == repeats
    assert all(c.first is None or c.first < place for place, c in enumerate(queue))
