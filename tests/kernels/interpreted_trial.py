"""Whether a trial tells right exponentials from wrong ones, in Triton's interpreter; run by test_kernels_triton.py."""

import pytest
import torch
from interpreted import all_variants, ignore_overflow, make

from dpo_fast.kernels import linear_logprob_gpu as gpu
from dpo_fast.kernels import linear_logprob_triton as kernels
from dpo_fast.kernels.head import Head
from dpo_fast.kernels.linear_logprob_trial import make_trial

pytestmark = ignore_overflow


def lose_a_row(e, odds, sums):
    e[3].fill_(-1)


def spoil_a_row(e, odds, sums):
    e[3, 5] = torch.nan


def halve_a_checked_row(e, odds, sums):
    e[0] *= 0.5


def miss_the_odds(e, odds, sums):
    odds *= 1.1


def miss_a_figure(e, odds, sums):
    sums[1].mul_(1.1)


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"bias": True}], ids=str)
@pytest.mark.parametrize("want_stats", [False, True])
@pytest.mark.parametrize("spoil", [None, lose_a_row, spoil_a_row, halve_a_checked_row, miss_the_odds, miss_a_figure])
def test_a_trial_knows_right_from_wrong(options, want_stats, spoil):
    tensors, target = make(40, 97, 16, torch.bfloat16, spread=8, bias="bias" in options)
    head = Head(tensors["weight"].detach(), tensors.get("bias"), options.get("softcap"), 1.0, torch.float32)
    hidden = tensors["hidden"].detach()
    anchor = kernels.target_logits(head, hidden, target)[0].float()

    def spoiled(*arguments):
        all_variants(head, hidden, want_stats=want_stats)["sliced"](*arguments)
        spoil(arguments[-2], arguments[-3], arguments[-1])

    variants = all_variants(head, hidden, want_stats=want_stats)
    if spoil is not None and (want_stats or spoil is not miss_a_figure):
        variants["spoiled"] = spoiled
    with torch.no_grad():
        trial = make_trial(
            variants, head, hidden, target, anchor, gpu._empty_exponentials(hidden, 40, 97), want_stats=want_stats
        )
        right = {name: trial.is_right(name) for name in variants}
    assert right == {name: name != "spoiled" for name in variants}
    assert len(right) >= 2


def nothing(hidden, weight, bias):
    pass


def a_row_of_nan(hidden, weight, bias):
    hidden[7, 3] = torch.nan


def a_row_of_infinity(hidden, weight, bias):
    hidden[7, 3] = torch.inf


def a_masked_vocabulary(hidden, weight, bias):
    bias[90:] = -torch.inf


def an_infinite_weight(hidden, weight, bias):
    weight[5] = torch.inf


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("want_stats", [False, True])
@pytest.mark.parametrize("change", [nothing, a_row_of_nan, a_row_of_infinity, a_masked_vocabulary, an_infinite_weight])
def test_inputs_that_are_not_finite_make_no_variant_wrong(change, want_stats):
    tensors, target = make(40, 97, 16, torch.bfloat16, spread=8, bias=True)
    hidden, weight, bias = (tensors[name].detach() for name in ("hidden", "weight", "bias"))
    change(hidden, weight, bias)
    target.clamp_(max=89)
    head = Head(weight, bias, None, 1.0, torch.float32)
    anchor = kernels.target_logits(head, hidden, target)[0].float()
    variants = all_variants(head, hidden, want_stats=want_stats)
    with torch.no_grad():
        trial = make_trial(
            variants, head, hidden, target, anchor, gpu._empty_exponentials(hidden, 40, 97), want_stats=want_stats
        )
        assert (trial is None) is (change is an_infinite_weight)
        assert trial is None or all(map(trial.is_right, variants))
