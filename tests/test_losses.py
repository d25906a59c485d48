"""Losses against hand-written fp64 formulas, and TRL where it has the same loss."""

import math

import pytest
import torch

from dpo_fast.losses import LOSSES, PairLogps

PAIRS = 7


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)

    def draw():
        return -50 * torch.rand(PAIRS, generator=generator)

    lengths = torch.tensor([1, 2, 3, 5, 8, 13, 400])
    return PairLogps(draw(), draw(), draw(), draw(), lengths, lengths.flip(0))


def formula(name, w, l, rw, rl, nw, nl, beta, eps):  # noqa: E741
    """One pair in Python floats, from the papers."""
    delta = (w - rw) - (l - rl)

    def logsig(x):
        return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))

    return {
        "sigmoid": -logsig(beta * delta),
        "cdpo": -(1 - eps) * logsig(beta * delta) - eps * logsig(-beta * delta),
        "robust": (-(1 - eps) * logsig(beta * delta) + eps * logsig(-beta * delta)) / (1 - 2 * eps),
        "hinge": max(0.0, 1 - beta * delta),
        "ipo": ((w - rw) / nw - (l - rl) / nl - 1 / (2 * beta)) ** 2,
    }[name]


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize(("beta", "eps"), [(0.1, 0.0), (0.5, 0.2)])
def test_loss_is_the_papers_formula(name, beta, eps, pairs):
    got = LOSSES[name](pairs, beta, eps)
    columns = [
        getattr(pairs, field).tolist()
        for field in ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_len", "rejected_len")
    ]
    want = [formula(name, *row, beta, eps) for row in zip(*columns, strict=True)]
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), rtol=2e-5, atol=2e-5)


def test_loss_at_the_reference_is_ln_2(pairs):
    at_reference = pairs.at_reference()
    assert torch.equal(at_reference.margin, torch.zeros(PAIRS))
    torch.testing.assert_close(
        LOSSES["sigmoid"](at_reference, 0.1, 0.0), torch.full((PAIRS,), math.log(2)), rtol=0, atol=1e-7
    )


def test_gradient_of_sigmoid_is_the_papers_weight(pairs):
    """DPO section 4: d loss / d log pi(w) = -beta sigmoid(-beta Δ)."""
    chosen = pairs.chosen.clone().requires_grad_()
    moved = PairLogps(
        chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, pairs.chosen_len, pairs.rejected_len
    )
    LOSSES["sigmoid"](moved, 0.1, 0.0).sum().backward()
    torch.testing.assert_close(chosen.grad, -0.1 * torch.sigmoid(-0.1 * pairs.margin))
