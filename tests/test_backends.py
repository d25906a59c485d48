"""Which backend a call takes, and that everything works where Triton is not installed."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dpo_fast.kernels import backends

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails, as where it is not installed
import torch
from dpo_fast import linear_logprob, logprob, segment_sum
hidden, weight = (torch.randn(n, 8, requires_grad=True) for n in (3, 5))
target = torch.tensor([0, 4, -100])
linear_logprob(hidden, weight, target).sum().backward()
want = (hidden @ weight.t()).log_softmax(-1)[[0, 1], [0, 4]]
torch.testing.assert_close(segment_sum(logprob(hidden @ weight.t(), target), torch.tensor([0, 3])), want.sum()[None])
assert weight.grad.any()
"""


def on(device, dtype=torch.float32):
    return SimpleNamespace(is_cuda=device == "cuda", device=device, dtype=dtype)


@pytest.fixture
def _no_triton(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    backends._has_triton.cache_clear()
    yield
    backends._has_triton.cache_clear()


def test_the_device_chooses():
    assert backends.choose_backend("auto", on("cpu")) == "torch"
    assert backends.choose_backend("auto", on("cuda")) == "triton"
    assert backends.choose_backend("auto", on("cuda", torch.float64)) == "torch"
    assert backends.choose_backend("torch", on("cuda")) == "torch"
    with pytest.raises(ValueError, match='"triton" expects CUDA tensors, got cpu'):
        backends.choose_backend("triton", on("cpu"))
    with pytest.raises(ValueError, match="up to 32 bits"):
        backends.choose_backend("triton", on("cuda", torch.float64))


@pytest.mark.usefixtures("_no_triton")
def test_without_triton_a_gpu_takes_the_torch_backend_and_is_told_once():
    with pytest.warns(UserWarning, match="Triton is not installed: CUDA tensors take the slower torch backend"):
        assert backends.choose_backend("auto", on("cuda")) == "torch"
    assert backends.choose_backend("auto", on("cuda")) == "torch"  # a second warning would be an error


def test_everything_works_where_triton_is_not_installed():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)
