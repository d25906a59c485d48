"""Triton's interpreter made to compute as a GPU does, and the head's kernels in blocks small enough for it."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from dpo_fast.kernels import linear_logprob_gpu as gpu
from dpo_fast.kernels import linear_logprob_triton as kernels
from dpo_fast.kernels import logprob_triton
from dpo_fast.kernels.linear_logprob import linear_logprob, linear_logprob_ref

# The interpreter keeps bf16 as the 16 bits of an integer; its dot multiplies these integers (Triton 3.9), which
# is where the infinities of bf16 products came from, and its conversion drops bits where a GPU rounds.
plain_dot = interpreter.InterpreterBuilder.create_dot
plain_trunc = interpreter.InterpreterBuilder.create_fp_trunc


def widen(handle):
    if handle.dtype != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def dot(self, a, b, d, *args):
    return plain_dot(self, widen(a), widen(b), d, *args)


def trunc(self, x, dtype):
    if dtype.scalar != tl.bfloat16 or x.dtype.scalar != tl.float32:
        return plain_trunc(self, x, dtype)
    rounded = torch.from_numpy(np.ascontiguousarray(x.data)).to(torch.bfloat16).view(torch.uint16).numpy()
    return interpreter.TensorHandle(rounded, tl.bfloat16)


interpreter.InterpreterBuilder.create_dot = dot
interpreter.InterpreterBuilder.create_fp_trunc = trunc

SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_stages": 2, "num_warps": 4}
for key in kernels.FUSED:
    kernels.FUSED[key] = [SMALL]
kernels.FUSED_REDO.update(SMALL)
kernels.FUSED_STATS.update(SMALL)
logprob_triton.OPTIONS["BLOCK"] = 64


ignore_overflow = pytest.mark.filterwarnings("ignore:(overflow|invalid|divide by zero).*:RuntimeWarning")

# Half-precision gradients: three roundings to bf16's 8 bits.
GRADIENT_ERROR = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 3.5e-3}


def make(n, v, d, dtype, *, spread=1.0, bias=False):
    generator = torch.Generator().manual_seed(n + v)
    tensors = {
        "hidden": torch.randn(n, d, generator=generator),
        "weight": spread * torch.randn(v, d, generator=generator) / d**0.5,
    }
    if bias:
        tensors["bias"] = torch.randn(v, generator=generator)
    target = torch.randint(0, v, (n,), generator=generator)
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}, target


def value_and_gradients(function, tensors, target, **options):
    logp = function(target=target, **tensors, **options)
    wanted = [x for x in tensors.values() if x.requires_grad]
    return logp.detach(), torch.autograd.grad((logp * torch.linspace(-1, 2, len(target))).sum(), wanted)


def compare(tensors, target, **options):
    """Values to fp32's accuracy and gradients to their dtype's, against the plain definition in fp64."""
    doubles = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    transforms = {k: v for k, v in options.items() if k in ("softcap", "temperature")}
    want, true_grads = value_and_gradients(linear_logprob_ref, doubles, target, **transforms)
    got, grads = value_and_gradients(linear_logprob, tensors, target, backend="triton", **options)
    assert got.dtype == torch.float32
    assert ((got - want).abs() / want.abs().clamp(min=1)).max() < 2e-6
    errors = [
        ((grad.double() - true).norm() / true.norm()).item() for grad, true in zip(grads, true_grads, strict=True)
    ]
    assert all(grad.dtype == tensors["hidden"].dtype for grad in grads)
    assert max(errors) < GRADIENT_ERROR[grads[0].dtype], errors
    return got


all_variants = gpu._variants


def take(path, monkeypatch):
    """Let half-precision blocks take this variant only: "fused" or "sliced"."""

    def variants(head, hidden, **options):
        found = all_variants(head, hidden, **options)
        return {name: run for name, run in found.items() if name.startswith(path)} or found

    monkeypatch.setattr(gpu, "_variants", variants)
