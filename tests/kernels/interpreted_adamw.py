"""The fused AdamW's Triton kernel against its PyTorch path, in Triton's interpreter."""

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from dpo_fast.kernels.adamw import Hyper, Slot, adamw_step_

SHAPES = [(1,), (257,), (16, 17), (1031,), (1280,)]


@pytest.fixture(autouse=True)
def _exact_fma(monkeypatch):
    """Round an fma once, as a GPU does and Triton 3.6's interpreter does not."""

    def fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


def make_slots(weights, shift):
    """States of copies of the weights, each moved by `shift` elements off its alignment."""
    slots = []
    for weight in weights:
        room = weight.new_empty(weight.numel() + shift)
        room[shift:] = weight.flatten()
        slots.append(Slot.zeros(room[shift:].view(weight.shape)))
    return slots


def weight_in_units(slot):
    """The weight as an integer that counts its spacings: of 24 bits, or of fp32."""
    if slot.remainder is None:
        return slot.weight.view(torch.int32).long()
    return (slot.weight.view(torch.int16).long() << 8) + slot.remainder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_the_kernel_steps_as_the_cpu_does(dtype, shift, one_by_one):
    generator = torch.Generator().manual_seed(2)
    # Away from zero, so that a unit in the last place is larger than rounding errors of an update of 1e-5.
    weights = [(0.01 + 0.02 * torch.rand(s, generator=generator)).to(dtype) for s in SHAPES]
    want, got = make_slots(weights, 0), make_slots(weights, shift)
    factor = torch.tensor(0.37)
    for step in (1, 2, 3):
        grads = [torch.randn(s, generator=generator).mul_(1e-3 * step).to(dtype) for s in SHAPES]
        hyper = Hyper(1e-5, 0.9, 0.999, 1e-8, 0.1, step)
        adamw_step_(want, grads, hyper, factor, backend="torch")
        for some in [[i] for i in range(len(SHAPES))] if one_by_one else [list(range(len(SHAPES)))]:
            adamw_step_([got[i] for i in some], [grads[i] for i in some], hyper, factor, backend="triton")
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a.exponents, b.exponents)
        assert torch.equal(a.moments, b.moments)
        assert (weight_in_units(a) - weight_in_units(b)).abs().max() <= 2


def test_without_a_factor_the_gradient_is_used_as_it_is():
    weight, grad = torch.full((300,), 0.02), torch.linspace(-1e-3, 1e-3, 300)
    hyper = Hyper(1e-3, 0.9, 0.999, 1e-8, 0.1, 1)
    plain, one = Slot.zeros(weight.clone()), Slot.zeros(weight.clone())
    adamw_step_([plain], [grad], hyper, backend="triton")
    adamw_step_([one], [grad], hyper, torch.ones(()), backend="triton")
    assert torch.equal(plain.weight, one.weight)
    assert torch.equal(plain.moments, one.moments)
