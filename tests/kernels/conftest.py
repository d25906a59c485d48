"""What several of the interpreted kernels' tests start from."""

import pytest
import torch


@pytest.fixture(params=["fused", "sliced"])
def _path(request, monkeypatch):
    from interpreted import take

    from dpo_fast.kernels import linear_logprob_products

    take(request.param, monkeypatch)
    monkeypatch.setattr(linear_logprob_products, "SLICE_BYTES", 2**13)


@pytest.fixture(scope="module")
def far_rows():
    """Makes (3, width) tensors, the third row 2^31 numbers behind the first; what is untouched takes no memory."""

    def make(width, dtype):
        return torch.empty(2**31 + width, dtype=dtype).as_strided((3, width), (2**30, 1))

    return make
