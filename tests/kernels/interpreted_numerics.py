"""Errors of the head's Triton kernels at real sizes in Triton's interpreter, and a table of them.

Run by test_kernels_triton.py.
"""

import numpy as np
import torch
from interpreted import ignore_overflow, take, value_and_gradients

from dpo_fast.kernels import linear_logprob_gpu as gpu
from dpo_fast.kernels import linear_logprob_triton as kernels
from dpo_fast.kernels.linear_logprob import linear_logprob, linear_logprob_ref

pytestmark = ignore_overflow


def numerics_rows(v, d):
    """64 bf16 rows: 32 ordinary, 16 up to about 113 nats from their target, 8 about 1000, 8 confident ones."""
    generator = torch.Generator().manual_seed(v + d)
    weight = (torch.randn(v, d, generator=generator) / d**0.5).bfloat16()
    hidden = torch.randn(64, d, generator=generator) * torch.tensor([3.0] * 32 + [19.0] * 16 + [260.0] * 16)[:, None]
    target = torch.randint(0, v, (64,), generator=generator)
    gap = np.log(v) + 10.4
    hidden[56:] = (gap + gap**2 / (2 * d)) * weight[target[56:]].float()
    return {"hidden": hidden.bfloat16().requires_grad_(), "weight": weight.requires_grad_()}, target


def numerics(v, d, path, monkeypatch):
    """Errors of ours and of PyTorch's bf16 path against fp64."""
    blocks = {"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_K": 64, "num_stages": 2, "num_warps": 4}
    monkeypatch.setattr(kernels, "FUSED", {key: [blocks] for key in kernels.FUSED})
    monkeypatch.setattr(kernels, "FUSED_REDO", blocks)
    monkeypatch.setattr(gpu, "FUSED_REDO", blocks)
    take(path, monkeypatch)
    tensors, target = numerics_rows(v, d)
    doubles = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    want, true_grads = value_and_gradients(linear_logprob_ref, doubles, target)
    got, grads = value_and_gradients(linear_logprob, tensors, target, backend="triton")
    usual, usual_grads = value_and_gradients(linear_logprob_ref, tensors, target)
    near = want > -113
    assert near[:32].all()
    assert -1e-3 < want[56:].min() < want[56:].max() < -1e-6
    assert want.min() < -1000

    def relative(some):
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(some, true_grads, strict=True)]

    far_error = ((got - want) / want).abs()[~near].max().item()
    confident = (got / want - 1).abs()[56:].max().item()
    ours = [(got - want).abs()[near].max().item(), far_error, confident, *relative(grads)]
    return ours, [(usual - want).abs()[near].max().item(), *relative(usual_grads)]


def test_numerics_table(monkeypatch):
    print("\n| V | D | variant | logp, to 113 nats | beyond, relative | p = 1 - 3e-5 | dH | dW | bf16 torch |")
    print("|---|---|---|---|---|---|---|---|---|")
    for v, d, path in (
        (32_000, 512, "fused"),
        (32_000, 2048, "sliced"),
        (128_256, 512, "sliced"),
        (128_256, 2048, "fused"),
    ):
        ours, usual = numerics(v, d, path, monkeypatch)
        cells = [*(f"{x:.1e}" for x in ours), ", ".join(f"{x:.1e}" for x in usual)]
        print(f"| {v} | {d} | {path} | " + " | ".join(cells) + " |")
        assert ours[0] < 1e-5
        assert ours[1] < 1e-6
        assert ours[2] < 1e-5
        assert max(ours[3:]) < 3e-3
        assert all(a <= b for a, b in zip(ours[3:], usual[1:], strict=True))
