"""The Triton kernels of `logprob` and `gather_rows` in Triton's interpreter, against plain PyTorch.

Run by test_kernels_triton.py.
"""

import pytest
import torch
from interpreted import ignore_overflow

from dpo_fast.kernels import logprob_triton
from dpo_fast.kernels.gather_rows import RowIndex, gather_rows
from dpo_fast.kernels.logprob import logprob, logprob_ref

pytestmark = ignore_overflow


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 131), (2, 3, 64)])
@pytest.mark.parametrize("spread", [1.0, 300.0, 1e4])
def test_logprob(dtype, shape, spread):
    torch.manual_seed(0)
    base = (spread * torch.randn(shape)).to(dtype).requires_grad_()
    target = torch.randint(0, shape[-1], shape[:-1])
    target.view(-1)[-1] = -1 if target.numel() > 1 else 0
    double = base.detach().double().requires_grad_()
    want = logprob_ref(double, target)
    (true_grad,) = torch.autograd.grad(want.sum(), double)
    for inplace in (False, True):
        got = logprob(base * 1, target, backend="triton", inplace_backward=inplace)
        (grad,) = torch.autograd.grad(got.sum(), base)
        assert ((got - want).abs() / want.abs().clamp(min=1)).max() < 1e-6
        # z - logsumexp(z) cannot be had more exactly than logsumexp(z) is known.
        known = double.abs().max().item() * 2**-23
        assert (grad - true_grad).abs().max() < known + {torch.float32: 1e-6}.get(dtype, 5e-3)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("target", [0, 1])
def test_infinite_logits_are_log_softmaxs(target):
    logits = torch.tensor([[torch.inf, 0, 0], [-torch.inf, 0, 0], [torch.nan, 0, 0], [-torch.inf] * 3, [0, 1, 2]])
    target = torch.full((5,), target)
    want = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(logprob(logits, target, backend="triton"), want, equal_nan=True)


def test_logits_beyond_2_to_the_31(far_rows):
    logits, target = far_rows(130, torch.bfloat16), torch.tensor([0, 129, 64])
    logits.copy_(torch.randn(3, 130, generator=torch.Generator().manual_seed(0)))
    near = logits.contiguous()
    found = {}
    for name, z in (("near", near), ("far", logits)):
        logp, lse = logprob_triton.forward(z, target)
        logprob_triton.backward(z, target, lse, logp, torch.ones(3), z)
        found[name] = (logp, z)
    assert all(map(torch.equal, found["near"], found["far"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 1, 5), (7, 3, 1030), (7, 9)])
def test_gather_rows(dtype, shape):
    rows = RowIndex.of(torch.tensor([6, 0, 2, 2, 1, 2, 0]), 7)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if len(shape) == 3:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    x.requires_grad_()
    got, want = (gather_rows(x, rows, backend=backend) for backend in ("triton", "torch"))
    assert torch.equal(got, want)
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, true = (torch.autograd.grad(y, x, grad)[0] for y in (got, want))
    torch.testing.assert_close(found, true, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6)
