"""What would wait for a GPU: every value of a tensor that Python asks for, with the function that asks."""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ASKING = {
    torch.ops.aten._local_scalar_dense.default,  # item, bool, int, float
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.repeat_interleave.Tensor,  # without the size of its output, that is
    torch.ops.aten.equal.default,
}
# These ask nothing of a GPU: the functions are a CPU's own, or the tensors always lie on the host.
ON_THE_HOST = {
    "segment_sum._check_bounds",
    "linear_logprob_torch._reanchor",
    "prefix_attention.prefix_layout",
    "prefix_attention.__post_init__",
    "trl_metrics.num_unshared_tokens",
}


class _Dispatched(TorchDispatchMode):
    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        by_mask = func is torch.ops.aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        if by_mask or (func in ASKING and kwargs.get("output_size") is None):
            self.note()
        return func(*args, **kwargs)


def _asker():
    """`module.function` of the innermost frame outside of torch."""
    frame = sys._getframe(2)
    while "torch" in (path := Path(frame.f_code.co_filename)).parts or path.stem in ("waits", "mock"):
        frame = frame.f_back
    return f"{path.stem}.{frame.f_code.co_name}"


@contextmanager
def waits():
    """A counter of who asked, filled inside; what lies on the host is left out."""
    found = Counter()

    def note():
        if (asker := _asker()) not in ON_THE_HOST:
            found[asker] += 1

    def noting(method):
        def wrapper(self, *args, **kwargs):
            note()
            return method(self, *args, **kwargs)

        return wrapper

    with (
        mock.patch.object(torch.Tensor, "tolist", noting(torch.Tensor.tolist)),
        mock.patch.object(torch.Tensor, "numpy", noting(torch.Tensor.numpy)),
        mock.patch.object(torch.Tensor, "cpu", noting(torch.Tensor.cpu)),
        _Dispatched(note),
    ):
        yield found
