import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from dpo_fast.kernels import logprob as module
from dpo_fast.kernels.logprob import logprob, logprob_ref, sequence_logprob


@pytest.fixture(params=[None, 64], ids=["one-slice", "many-slices"])
def _slices(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(module, "SLICE", request.param)


@pytest.mark.usefixtures("_slices")
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 31), (2, 3, 65), (0, 5)])
def test_value_and_gradient_are_torchs_in_fp64(shape):
    torch.manual_seed(0)
    logits = (4 * torch.randn(shape, dtype=torch.double)).requires_grad_()
    target = torch.randint(0, shape[-1], shape[:-1])
    weights = torch.randn(shape[:-1], dtype=torch.double)
    got, want = logprob(logits, target), logprob_ref(logits, target)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)
    (grad,) = torch.autograd.grad((got * weights).sum(), logits)
    (true_grad,) = torch.autograd.grad((want * weights).sum(), logits)
    torch.testing.assert_close(grad, true_grad, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("_slices")
def test_gradcheck():
    torch.manual_seed(0)
    logits = (3 * torch.randn(4, 7, dtype=torch.double)).requires_grad_()
    target = torch.tensor([6, -1, 0, 3])
    for function in (logprob, logprob_ref):
        assert torch.autograd.gradcheck(lambda z, f=function: f(z, target), (logits,))


def test_masked_rows_are_zero_and_silent():
    logits = torch.randn(3, 5, requires_grad=True)
    logp = logprob(logits, torch.tensor([1, -100, -1]))
    logp.sum().backward()
    assert logp.tolist()[1:] == [0, 0]
    assert not logits.grad[1:].any()
    assert logits.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_fp32s_whatever_the_logits(dtype):
    torch.manual_seed(0)
    logits = (8 * torch.randn(64, 4001)).to(dtype)
    target = torch.randint(0, 4001, (64,))
    want = logprob_ref(logits.double(), target)
    got = logprob(logits, target)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 5e-6
    logits[:, :] = 0
    logits[:, 7] = 18.5  # p = 1 - 3.7e-5
    confident, want = logprob(logits, torch.full((64,), 7)), logprob_ref(logits.double(), torch.full((64,), 7))
    assert (confident / want - 1).abs().max() < 1e-6


def test_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    assert logprob(logits, torch.zeros(2, dtype=torch.int64)).tolist() == [0, -2e4]


@pytest.mark.parametrize("target", [0, 1])
def test_infinite_logits_are_log_softmaxs(target):
    logits = torch.tensor([[torch.inf, 0, 0], [-torch.inf, 0, 0], [torch.nan, 0, 0], [-torch.inf] * 3, [0, 1, 2]])
    target = torch.full((5,), target)
    want = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(logprob(logits, target), want, equal_nan=True)


def test_gradient_in_place_takes_the_logits_memory():
    base = torch.randn(4, 9, dtype=torch.double, requires_grad=True)
    target = torch.tensor([0, 8, -1, 3])
    logits = base * 1
    logprob(logits, target, inplace_backward=True).sum().backward()
    (want,) = torch.autograd.grad(logprob_ref(base, target).sum(), base)
    torch.testing.assert_close(base.grad, want)
    torch.testing.assert_close(logits.detach(), want)


def test_sequence_logprob_is_transformers_loss():
    torch.manual_seed(0)
    logits = torch.randn(2, 7, 13, requires_grad=True)
    labels = torch.randint(0, 13, (2, 7))
    labels[0, :3] = labels[1, 5:] = -100
    got = sequence_logprob(logits, labels)
    for row in range(2):
        loss = ForCausalLMLoss(logits[row : row + 1], labels[row : row + 1], 13, num_items_in_batch=1)
        torch.testing.assert_close(got[row], -loss)
    other = labels.masked_fill(labels == -100, 12)
    assert torch.equal(
        sequence_logprob(logits, other, ignore_index=12)[0],
        sequence_logprob(logits, other.masked_fill(other == 12, -100))[0],
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: logprob(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)), r"target: expected \(2,\)"),
        (lambda: logprob(torch.zeros(2, 3), torch.tensor([0, 3])), "ids below 3"),
        (lambda: logprob(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 3])), "floating point"),
        (lambda: sequence_logprob(torch.zeros(2, 3), torch.zeros(2, 3)), r"\(B, L, V\)"),
        (
            lambda: logprob(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 0]), inplace_backward=True),
            "leaf",
        ),
        (lambda: logprob(torch.zeros(3, 2).t(), torch.tensor([0, 0]), inplace_backward=True), "contiguous"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
