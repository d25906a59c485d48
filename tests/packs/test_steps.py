"""The sampler of optimizer steps, for one process and for several."""

import numpy as np
import pytest

from dpo_fast.packs.layout import Group
from dpo_fast.packs.steps import StepSampler


def group_of(num_tokens):
    ids = np.zeros(num_tokens, dtype=np.int32)
    return Group(0, ids[2:], (ids[:1], ids[:1]))


def sampler(**changes):
    settings = {"groups_per_step": 4, "max_tokens": 50, "seed": 3} | changes
    lengths = settings.pop("lengths", [10 + i for i in range(11)])
    return StepSampler([group_of(length) for length in lengths], **settings)


def test_an_epoch_sees_every_group_once_and_the_next_in_another_order():
    s = sampler()
    assert s.steps_per_epoch == 3
    epochs = [[sorted(i for packed in next(s).packs for i in packed) for _ in range(3)] for _ in range(2)]
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


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_processes_share_each_step_in_lockstep(num_ranks):
    """The same steps whoever shares them; each group in one pack of one process; as many packs in each."""
    alone, together = sampler(), [sampler(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for _ in range(7):
        step, parts = next(alone), [next(of_rank) for of_rank in together]
        assert all(part.groups == step.groups for part in parts)
        assert sorted(i for part in parts for packed in part.packs for i in packed) == sorted(step.groups)
        assert len({len(part.packs) for part in parts}) == 1
        for packed in (packed for part in parts for packed in part.packs):
            assert len(packed) < 2 or sum(10 + i for i in packed) <= 50
