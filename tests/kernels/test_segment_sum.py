from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.kernels.segment_sum import segment_mean, segment_sum, segment_sum_ref


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=12), st.integers(0, 2**31))
def test_sums_are_numpys_in_fp64(lengths, seed):
    cu = torch.tensor(np.cumsum([0, *lengths]))
    values = torch.from_numpy(np.random.default_rng(seed).normal(-3, 2, int(cu[-1])).astype(np.float32))
    want = [values[a:b].double().sum().item() for a, b in pairwise(cu)]
    np.testing.assert_array_equal(segment_sum(values, cu).numpy(), np.array(want, dtype=np.float32))


def test_long_sequences_keep_every_fp32_digit():
    values = torch.full((100_000,), -0.1)
    got = segment_sum(values, torch.tensor([0, 100_000]))
    assert got.item() == np.float32(100_000 * float(values[0]))


def test_gradient_and_empty_segments():
    cu = torch.tensor([0, 0, 2, 2, 5])
    values = torch.arange(5, dtype=torch.double).requires_grad_()
    assert segment_sum(values, cu).tolist() == [0, 1, 0, 9]
    assert segment_mean(values, cu).tolist() == [0, 0.5, 0, 3]
    for op in (segment_sum, segment_mean):
        assert torch.autograd.gradcheck(lambda x, op=op: op(x, cu), (values,))
    weights = torch.tensor([7.0, 1, 7, 2])
    (segment_sum(values, cu) * weights).sum().backward()
    assert values.grad.tolist() == [1, 1, 2, 2, 2]
    assert torch.equal(segment_sum_ref(values, cu), segment_sum(values, cu))


def test_a_nan_stays_in_its_segment():
    values = torch.tensor([1.0, torch.nan, 2.0, 3.0])
    got = segment_sum(values, torch.tensor([0, 1, 2, 4]))
    assert got[0] == 1
    assert got[1].isnan()
    assert got[2] == 5


def test_nothing_at_all():
    values = torch.zeros(0, requires_grad=True)
    assert segment_sum(values, torch.tensor([0])).shape == (0,)
    sums = segment_sum(values, torch.tensor([0, 0, 0]))
    assert sums.tolist() == [0, 0]
    sums.sum().backward()
    assert values.grad.shape == (0,)


@pytest.mark.parametrize(
    ("values", "cu", "message"),
    [
        (torch.zeros(3), torch.tensor([0, 2]), "rise from 0 to the number of values, 3; got 0 .. 2"),
        (torch.zeros(3), torch.tensor([0, 3, 2, 3]), "decreasing in between"),
        (torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32), "int64"),
        (torch.zeros(3, 1), torch.tensor([0, 3]), r"\(N,\)"),
        (torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3]), "floating point"),
    ],
)
def test_mistakes_are_named(values, cu, message):
    with pytest.raises(ValueError, match=message):
        segment_sum(values, cu)
