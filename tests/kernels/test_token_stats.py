"""Figures of each row's softmax, and gradients added to the caller's own, on the torch backend; Triton's twins are in
interpreted_head.py."""

import pytest
import torch

from dpo_fast.kernels import linear_logprob_torch
from dpo_fast.kernels.linear_logprob import linear_logprob, linear_logprob_with_stats
from dpo_fast.kernels.token_stats import TokenStats, token_stats_ref


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(linear_logprob_torch, "TILE", 64)
    monkeypatch.setattr(linear_logprob_torch, "MAX_ROWS", 4)


def make(n, v, d, *, dtype=torch.float32, spread=1.0):
    generator = torch.Generator().manual_seed(n + v)
    hidden = torch.randn(n, d, generator=generator)
    weight = spread * torch.randn(v, d, generator=generator) / d**0.5
    target = torch.randint(0, v, (n,), generator=generator)
    target[: n // 3] = (hidden @ weight.t()).argmax(1)[: n // 3]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


@pytest.mark.parametrize("spread", [0.1, 1.0, 12.0, 100.0, 1e4], ids="spread {}".format)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=str)
def test_stats_are_the_softmaxs(spread, options):
    hidden, weight, target = make(30, 211, 16, spread=spread)
    target[5] = -100
    logp, stats = linear_logprob_with_stats(hidden, weight, target, **options)
    logits = hidden.detach().double() @ weight.detach().double().t()
    if options:
        logits = 3.0 * torch.tanh(logits / 3.0) / 0.7
    want = token_stats_ref(logits, target)
    scale = logits.abs().max().item()
    torch.testing.assert_close(stats.sum_p2.double(), want.sum_p2, rtol=1e-6 * (1 + scale), atol=1e-7)
    torch.testing.assert_close(stats.entropy.double(), want.entropy, rtol=1e-5, atol=3e-6 * (1 + scale))
    torch.testing.assert_close(stats.mean_logit.double(), want.mean_logit, rtol=1e-5, atol=1e-6 * (1 + scale))
    top = logits.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > 1e-6 * scale  # a saturated softcap ties everything
    assert options or clear.sum() > 5
    assert torch.equal(stats.is_argmax[clear], want.is_argmax[clear])
    assert stats.is_argmax[: 30 // 3 - 5].any()
    torch.testing.assert_close(logp, linear_logprob(hidden, weight, target, **options), rtol=2e-6, atol=1e-6)


def test_stats_of_a_uniform_and_of_a_certain_row():
    hidden = torch.tensor([[0.0], [1.0]])
    weight = torch.tensor([[500.0], *[[0.0]] * 7])
    _, stats = linear_logprob_with_stats(hidden, weight, torch.tensor([3, 0]))
    torch.testing.assert_close(stats.sum_p2, torch.tensor([1 / 8, 1.0]))
    torch.testing.assert_close(stats.entropy, torch.tensor([8.0, 1.0]).log())
    torch.testing.assert_close(stats.mean_logit, torch.tensor([0.0, 62.5]))
    assert stats.is_argmax.tolist() == [True, True]


def test_stats_have_no_gradient_and_leave_log_probs_theirs():
    hidden, weight, target = make(9, 40, 8)
    logp, stats = linear_logprob_with_stats(hidden, weight, target)
    assert isinstance(stats, TokenStats)
    assert not any(x.requires_grad for x in stats)
    grads = torch.autograd.grad(logp.sum(), (hidden, weight))
    plain = torch.autograd.grad(linear_logprob(hidden, weight, target).sum(), (hidden, weight))
    for grad, other in zip(grads, plain, strict=True):
        torch.testing.assert_close(grad, other)
    with torch.no_grad():
        assert torch.equal(linear_logprob_with_stats(hidden, weight, target)[1].entropy, stats.entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows_kept", [0, 5, 99])
def test_main_grad_is_added_to(dtype, rows_kept):
    hidden, weight, target = make(11, 67, 8, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    (want,) = torch.autograd.grad(linear_logprob(hidden, weight, target).sum(), weight)
    main_grad = torch.full(weight.shape, 2.0, dtype=wide)
    for _ in range(2):
        logp = linear_logprob(hidden, weight, target, main_grad=main_grad, memory_budget=rows_kept * 67 * 8)
        logp.sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None
    torch.testing.assert_close(
        (main_grad - 2) / 2, want.to(wide), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("main_grad", "frozen", "message"),
    [
        (torch.zeros(3, 2), False, r"main_grad: expected \(5, 3\) torch\.float32"),
        (torch.zeros(5, 3, dtype=torch.bfloat16), False, r"got \(5, 3\) torch\.bfloat16"),
        (torch.zeros(5, 3), True, "weight does not require a gradient"),
    ],
)
def test_a_main_grad_that_does_not_fit_is_named(main_grad, frozen, message):
    weight = torch.zeros(5, 3).requires_grad_(not frozen)
    with pytest.raises(ValueError, match=message):
        linear_logprob(torch.zeros(2, 3), weight, torch.tensor([0, 1]), main_grad=main_grad)
