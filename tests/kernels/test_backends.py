"""Which backend a call takes, and that everything works where Triton is not installed."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.cuda._utils import _get_device_index

from dpo_fast.errors import UserError
from dpo_fast.kernels import backends
from dpo_fast.model.placement import pick_device

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


def test_every_kernel_is_launched_on_the_gpu_of_its_tensors(monkeypatch):
    """Triton launches on the current GPU, whichever that is, so it is made that of the first tensor."""
    from contextlib import contextmanager

    from triton.runtime.jit import JITFunction

    from dpo_fast.kernels import gather_rows_triton, linear_logprob_gpu, logprob_triton
    from dpo_fast.kernels.gather_rows import RowIndex
    from dpo_fast.kernels.head import Head

    current, launched = [], set()

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    def launch(kernel, *args, **kwargs):
        assert current == [torch.device("meta")], kernel.__name__
        launched.add(kernel.__name__)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(JITFunction, "run", launch)

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, logps = empty(12, dtype=torch.int64), empty(12, dtype=torch.float32)
    head = Head(empty(64, 16), None, None, 1.0, torch.float32)
    for frozen in (False, True):
        _, state, _ = linear_logprob_gpu.forward(head, empty(12, 16), ids, 0, frozen=frozen)
        linear_logprob_gpu.backward(head, empty(12, 16), ids, state, logps, (True, not frozen, False))
    lse = logprob_triton.forward(empty(12, 64), ids)[1]
    logprob_triton.backward(empty(12, 64), ids, lse, logps, logps, empty(12, 64))
    rows = RowIndex(ids, ids, empty(13, dtype=torch.int64))
    gather_rows_triton.backward(gather_rows_triton.forward(empty(12, 2, 8), rows), rows)
    assert len(launched) >= 7
    assert not current


@pytest.fixture
def two_gpus(monkeypatch):
    """As far as asking goes; the list of devices that were made current."""
    chosen = []
    # What `set_device` makes of its argument: PyTorch's own, which takes no device without an index.
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index else (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    return chosen


def test_the_device_that_is_asked_for_becomes_the_current_one(two_gpus):
    """Triton and bitsandbytes launch on the current GPU."""
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    assert two_gpus == [1]


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_without_a_number_is_the_current_one(name, two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert pick_device(name) == torch.device("cuda")
    assert two_gpus == []


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
@pytest.mark.usefixtures("two_gpus")
def test_gpus_without_the_arithmetic_are_refused_by_name(name):
    with pytest.raises(UserError, match=r"Tesla T4: compute capability 7.5, expected 8.0 .* --device cpu"):
        pick_device(name)
