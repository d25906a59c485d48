"""AdamW whose step costs what its memory traffic costs: 8-bit moments, bf16 weights with an 8-bit remainder.

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g²          g = factor · gradient
    w <- (1 - lr wd) w - lr / (1 - b1^t) · m / (sqrt(v / (1 - b2^t)) + eps)

Loshchilov and Hutter 2019 (arXiv 1711.05101), Algorithm 2. Blockwise 8-bit states go back to Dettmers et al. 2022
(arXiv 2110.02861); the codes below are different, because theirs take a binary search per number.

**Moments.** A block is 256 consecutive elements. Let A be a power of two, 2^(octaves - 1) below the block's largest
magnitude. A magnitude x is stored as the leading bits of the fp32 number x + A, counted from those of A: linear steps
near zero, relative steps above A, and an encoder of one addition and one shift. m has a sign and 7 bits (8 octaves of
16 steps), v has 8 bits (16 octaves of 16 steps). The exponent of A is all that a block keeps, one byte per moment.

**Weights.** The optimizer's weight is the leading 24 bits of an fp32 number: a bf16 weight, rounded to nearest, and a
signed remainder in 1/256 of its spacing. The model only sees the bf16 part.

**Rounding.** At b2 = 0.999 a step changes v by 0.1%, and at lr 5e-7 it changes a weight of 0.02 by less than half of
the 24th bit: rounded to nearest, neither would move. Discarded bits are therefore rounded up with the probability that
they stand for. The threshold is not random but a Kronecker sequence in the element's index and the step, so that a
result depends on nothing but its inputs, and the errors of one element cancel over its steps.

Bytes read and written per parameter: bf16 weight 2 + 2, remainder 1 + 1, moments 2 + 2, gradient 2: 12, plus 4/256.
Held between steps: 5.01, and 2 for the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from ctypes import c_float
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dpo_fast.kernels.backends import Backend, choose_backend

BLOCK = 256
FP32_FRACTION = 23
# Over 2^32, per element and per step: the plastic number's fractions, whose sequence in two dimensions is even.
ELEMENT_STRIDE = 1_052_792_407
STEP_STRIDE = 2_447_445_413
# The CPU takes this many elements at a time, so that temporary tensors stay in its cache.
CPU_CHUNK = 1 << 17


@dataclass(frozen=True)
class Code:
    """An 8-bit code of non-negative numbers: `bits` bits, `fraction` of them of the mantissa."""

    bits: int
    fraction: int

    @property
    def octaves(self) -> int:
        """Powers of two from A to the largest number."""
        return 1 << (self.bits - self.fraction)

    @property
    def dropped(self) -> int:
        """Bits of fp32's mantissa that the code drops."""
        return FP32_FRACTION - self.fraction

    @property
    def headroom(self) -> int:
        """Codes left above the largest number, for the addition of A and for rounding up."""
        return 1 + max(1, (1 << self.fraction) >> (self.octaves - 1))

    def exponents(self, top: Tensor) -> Tensor:
        """fp32's biased exponent of A for blocks whose largest number is `top`; int32."""
        highest = top.view(torch.int32) + (self.headroom << self.dropped)
        return ((highest >> FP32_FRACTION) - (self.octaves - 1)).clamp(min=1)

    def encode(self, x: Tensor, exponents: Tensor, noise: Tensor | int) -> Tensor:
        """int32 codes of `x` ≥ 0, fp32; `noise` is below 2^dropped, and half of that rounds to nearest."""
        shifted = x + (exponents << FP32_FRACTION).view(torch.float32)
        return ((shifted.view(torch.int32) + noise) >> self.dropped) - (exponents << self.fraction)

    def decode(self, codes: Tensor, exponents: Tensor) -> Tensor:
        """fp32 numbers of int32 codes."""
        shifted = (codes + (exponents << self.fraction)) << self.dropped
        return shifted.view(torch.float32) - (exponents << FP32_FRACTION).view(torch.float32)


FIRST = Code(bits=7, fraction=4)
SECOND = Code(bits=8, fraction=4)


@dataclass(frozen=True)
class Slot:
    """A weight and its state, which a step writes. `remainder` is None for fp32 weights.

    Shapes, for a contiguous `weight` of n elements:
        moments: as `weight`, int16: m's sign and code in the high byte, v's code in the low byte.
        exponents: (ceil(n / 256), 2), uint8: of A for m and for v.
        remainder: as `weight`, int8: of the 24-bit weight, in 1/256 of the spacing of bf16.
    """

    weight: Tensor
    moments: Tensor
    exponents: Tensor
    remainder: Tensor | None

    @classmethod
    def zeros(cls, weight: Tensor) -> Slot:
        """The state before the first step.

        Raises:
            ValueError: the weight is neither bf16 nor fp32, or not contiguous.
        """
        if weight.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"weight: expected bfloat16 or float32, got {weight.dtype}")
        if not weight.is_contiguous():
            raise ValueError(
                f"weight: expected a contiguous tensor, got shape {tuple(weight.shape)}, strides {weight.stride()}; "
                "replace it by weight.contiguous()"
            )
        remainder = torch.zeros_like(weight, dtype=torch.int8) if weight.dtype == torch.bfloat16 else None
        exponents = torch.ones(-(-weight.numel() // BLOCK), 2, dtype=torch.uint8, device=weight.device)
        return cls(weight, torch.zeros_like(weight, dtype=torch.int16), exponents, remainder)


@dataclass(frozen=True)
class Hyper:
    """One step's scalars; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    @property
    def decay(self) -> float:
        """What weights are multiplied by."""
        return 1 - self.lr * self.weight_decay

    @property
    def step_size(self) -> float:
        """lr over m's bias correction."""
        return self.lr / (1 - self.beta1**self.step)

    @property
    def second_scale(self) -> float:
        """What sqrt(v) is multiplied by for its bias correction."""
        return 1 / math.sqrt(1 - self.beta2**self.step)

    @property
    def scalars(self) -> tuple[float | int, ...]:
        """What kernels take, rounded to fp32: v is built from the square of `factor · gradient · sqrt(1 - b2)`."""
        numbers = (
            *(self.decay, self.step_size, self.beta1, 1 - self.beta1, self.beta2, math.sqrt(1 - self.beta2)),
            *(self.second_scale, self.eps),
        )
        seed = self.step * STEP_STRIDE % (1 << 32)
        return *(c_float(x).value for x in numbers), seed - (1 << 32) if seed >= 1 << 31 else seed


def adamw_ref(
    w: Tensor, m: Tensor, v: Tensor, grad: Tensor, hyper: Hyper, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The step in plain PyTorch, in the dtype of its tensors: new weight, first and second moment."""
    grad = grad * factor
    m = hyper.beta1 * m + (1 - hyper.beta1) * grad
    v = hyper.beta2 * v + (1 - hyper.beta2) * grad * grad
    w = hyper.decay * w - hyper.step_size * m / (v.sqrt() * hyper.second_scale + hyper.eps)
    return w, m, v


def encode_moments(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`Slot.moments` and `Slot.exponents` of fp32 moments, rounded to nearest."""
    m_blocks, v_blocks = _blocks(m), _blocks(v)
    first = FIRST.exponents(m_blocks.abs().amax(1, keepdim=True))
    second = SECOND.exponents(v_blocks.amax(1, keepdim=True))
    nearest = (1 << FIRST.dropped - 1, 1 << SECOND.dropped - 1)
    moments = _pack(m_blocks, v_blocks, first, second, nearest)
    return moments.flatten()[: m.numel()].view(m.shape), torch.cat([first, second], 1).to(torch.uint8)


def decode_moments(moments: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 moments of `Slot.moments` and `Slot.exponents`."""
    m, v = _unpack(_blocks(moments).int(), *exponents.int().split(1, 1))
    return tuple(x.flatten()[: moments.numel()].view(moments.shape) for x in (m, v))  # type: ignore[return-value]


def join_weight(weight: Tensor, remainder: Tensor | None) -> Tensor:
    """The optimizer's weight as fp32: bf16 `weight` with its remainder, or an fp32 `weight` itself."""
    if remainder is None:
        return weight
    return ((weight.view(torch.int16).int() << 16) + (remainder.int() << 8)).view(torch.float32)


def split_weight(weight: Tensor, noise: Tensor | int = 128) -> tuple[Tensor, Tensor]:
    """bf16 weight and int8 remainder of an fp32 weight; `noise` is below 256, and 128 rounds to the nearest 24 bits."""
    leading = (weight.view(torch.int32) + noise) >> 8
    nearest = (leading + 128) >> 8
    return nearest.to(torch.int16).view(torch.bfloat16), (leading - (nearest << 8)).to(torch.int8)


def adamw_step_(
    slots: Sequence[Slot],
    grads: Sequence[Tensor],
    hyper: Hyper,
    factor: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Step weights and states in place: on a GPU one launch for each kind of tensor, however many there are.

    Moments are the same to the bit on every device. A GPU's square root and reciprocal are good to a few units in the
    last place of fp32, by which an update differs from a CPU's; now and then that tips the rounding of the 24th bit.

    Args:
        slots: of one device and one dtype, whose weights share no memory; neither is checked.
        grads: of the weights' shape, dtype and device; one that is not contiguous is copied.
        hyper: the step's scalars.
        factor: fp32 scalar on the same device by which gradients are multiplied, as for clipping; read on the device.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: a gradient does not fit its weight, there are more of one than of the other, or the backend
            cannot take these tensors.
    """
    pairs = [(s, g.contiguous()) for s, g in zip(slots, grads, strict=True) if _fits(s, g) and g.numel()]
    if not pairs:
        return
    if choose_backend(backend, pairs[0][0].weight) == "triton":
        from dpo_fast.kernels import adamw_triton

        adamw_triton.step_([slot for slot, _ in pairs], [grad for _, grad in pairs], hyper, factor)
        return
    for slot, grad in pairs:
        _step_on_cpu(slot, grad, hyper, factor)


def _fits(slot: Slot, grad: Tensor) -> bool:
    weight = slot.weight
    if grad.layout != torch.strided:
        raise ValueError(f"gradient: expected a dense tensor, got {grad.layout}")
    if (grad.shape, grad.dtype, grad.device) != (weight.shape, weight.dtype, weight.device):
        raise ValueError(
            f"gradient: expected {tuple(weight.shape)} {weight.dtype} on {weight.device} as its weight, "
            f"got {tuple(grad.shape)} {grad.dtype} on {grad.device}"
        )
    return True


def _step_on_cpu(slot: Slot, grad: Tensor, hyper: Hyper, factor: Tensor | None) -> None:
    decay, step_size, beta1, other1, beta2, other2, second_scale, eps, seed = hyper.scalars
    if factor is None:
        factor = torch.ones(())
    for start, weight, gradient, moments, exponents, remainder in _chunks(slot, grad):
        size = weight.numel()
        g = _blocks(gradient.float())
        first, second = exponents.int().split(1, 1)
        m, v = _unpack(_blocks(moments).int(), first, second)
        m = _fma(m, beta1, g * (other1 * factor))
        root = (g * (other2 * factor)).double()
        # As an fma on the GPU: in fp64 the square of an fp32 number is exact.
        v = v.mul_(beta2).double().addcmul_(root, root).float()
        # No smaller than v's first code: m would be divided by eps alone where v was rounded to zero.
        smallest = ((second - SECOND.fraction).clamp(min=1) << FP32_FRACTION).view(torch.float32)
        # PyTorch's fp32 square root is not rounded to nearest on every CPU.
        root = v.maximum(smallest).double().sqrt_().float()
        reciprocal = root.double().mul_(second_scale).add_(eps).float().rsqrt_()
        update = (m * reciprocal).mul_(reciprocal).mul_(-step_size)
        w = _fma(_blocks(join_weight(weight, remainder)), decay, update).flatten()[:size]
        noise = _element_noise(m.numel()).view(m.shape) + (start * ELEMENT_STRIDE + seed + 2**31) % 2**32 - 2**31
        high = noise >> 9 & 0x7FFFFF
        first = FIRST.exponents(m.abs().amax(1, keepdim=True))
        second = SECOND.exponents(v.amax(1, keepdim=True))
        codes = _pack(m, v, first, second, (high >> FIRST.fraction, high >> SECOND.fraction))
        moments.copy_(codes.flatten()[:size])
        exponents.copy_(torch.cat([first, second], 1))
        if remainder is None:
            weight.copy_(w)
        else:
            new, rest = split_weight(w, noise.flatten()[:size] & 0xFF)
            weight.copy_(new)
            remainder.copy_(rest)


def _fma(a: Tensor, b: float, c: Tensor) -> Tensor:
    """a · b + c, rounded once, as the GPU does: the product of fp32 numbers is exact in fp64."""
    return c.double().add_(a.double(), alpha=b).float()


@lru_cache(maxsize=8)
def _element_noise(num: int) -> Tensor:
    """int32 multiples of `ELEMENT_STRIDE`, modulo 2^32."""
    return (torch.arange(num) * ELEMENT_STRIDE).to(torch.int32)


def _chunks(slot: Slot, grad: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor | None]]:
    """(first element, weight, gradient, moments, exponents, remainder) of `CPU_CHUNK` elements at a time."""
    weight, gradient, moments = (x.detach().view(-1) for x in (slot.weight, grad, slot.moments))
    remainder = None if slot.remainder is None else slot.remainder.view(-1)
    for start in range(0, weight.numel(), CPU_CHUNK):
        some = slice(start, start + CPU_CHUNK)
        blocks = slot.exponents[start // BLOCK : (start + CPU_CHUNK) // BLOCK]
        rest = None if remainder is None else remainder[some]
        yield start, weight[some], gradient[some], moments[some], blocks, rest


def _blocks(x: Tensor) -> Tensor:
    """(blocks, 256), the last one filled up with zeros."""
    return torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-(-x.numel() // BLOCK), BLOCK)


def _pack(m: Tensor, v: Tensor, first: Tensor, second: Tensor, thresholds: tuple[Tensor | int, Tensor | int]) -> Tensor:
    magnitude = FIRST.encode(m.abs(), first, thresholds[0]) << 8
    return (m.view(torch.int32) >> 16 & 0x8000 | magnitude | SECOND.encode(v, second, thresholds[1])).to(torch.int16)


def _unpack(moments: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = FIRST.decode(moments >> 8 & 0x7F, first)
    m = (magnitude.view(torch.int32) | (moments & 0x8000) << 16).view(torch.float32)
    return m, SECOND.decode(moments & 0xFF, second)
