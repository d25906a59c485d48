"""Liger's kernels in plain PyTorch, with their signatures, for machines without a GPU.

Triton's interpreter (3.6 to 3.9) cannot run Liger's norm and MLPs: they convert plain floats and call libdevice. What
is tested with these is therefore everything but the kernels: which layers are replaced, with which constants, and what
the kernels do to memory (rotation happens in place, unseen by autograd).
"""

import torch
from torch.nn import functional as F


class Norm:
    """`LigerRMSNormFunction`."""

    @staticmethod
    def apply(x, weight, eps, offset, casting_mode, in_place, row_mode):
        assert casting_mode in ("llama", "gemma")
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if casting_mode == "llama":  # back in the input's dtype before the weight
            return normed.to(x.dtype) * (weight + offset)
        return (normed * (weight.float() + offset)).to(x.dtype)


class SwiGLU:
    """`LigerSiLUMulFunction`."""

    @staticmethod
    def apply(gate, up, gate_multiplier=1.0, down_multiplier=1.0):
        assert gate_multiplier == down_multiplier == 1
        return F.silu(gate) * up


class GeGLU:
    """`LigerGELUMulFunction`."""

    @staticmethod
    def apply(gate, up):
        return F.gelu(gate, approximate="tanh") * up


class Rotation(torch.autograd.Function):
    """`LigerRopeFunction`, which rotates in place without telling autograd."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, rotary_dim):
        ctx.save_for_backward(cos, sin)
        ctx.rotary_dim = rotary_dim
        return tuple(_rotate_in_place(x.detach(), cos, sin, rotary_dim) for x in (q, k))

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return *(_rotate_in_place(x.clone(), cos, -sin, ctx.rotary_dim) for x in (dq, dk)), None, None, None


def _rotate_in_place(x, cos, sin, rotary_dim):
    rotary_dim = rotary_dim or cos.shape[-1]
    half = rotary_dim // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
    a, b = x[..., :half].clone(), x[..., half:rotary_dim].clone()
    x.data[..., :half] = a * cos - b * sin
    x.data[..., half:rotary_dim] = b * cos + a * sin
    return x


def _dispatch(name, q, k, cos, sin, position_ids, unsqueeze_dim, rotary_dim=None):
    assert name == "rope"
    assert position_ids is None
    return Rotation.apply(q, k, cos, sin, rotary_dim)


def use(monkeypatch):
    """Let Liger's layers call these."""
    from liger_kernel.transformers import geglu, rms_norm, rope, swiglu

    monkeypatch.setattr(rms_norm, "LigerRMSNormFunction", Norm)
    monkeypatch.setattr(swiglu, "LigerSiLUMulFunction", SwiGLU)
    monkeypatch.setattr(geglu, "LigerGELUMulFunction", GeGLU)
    monkeypatch.setattr(rope, "dispatch", _dispatch)
