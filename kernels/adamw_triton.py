"""The step of `adamw.py` in one Triton pass over many tensors.

A program is one warp and takes `BLOCKS` blocks of 256 elements of one tensor: 8 elements per thread, so that all 2-byte
streams are read 16 bytes at a time, and a block's maximum is found within the warp. A table on the device holds a row
of addresses per tensor (64 bytes), a second one names the tensor and place of each program. Both stay there from step
to step; when gradients move, the first is replaced by one asynchronous copy. bf16 is handled as its bits.

Tensors that do not start at a multiple of 16 bytes, or whose size is not a multiple of 16, go through a variant with
narrower loads. Offsets are 64 bits.
"""

# Kernels take pointers and numbers that Triton types at launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast.kernels.adamw import BLOCK, ELEMENT_STRIDE, FIRST, SECOND, Hyper, Slot
from dpo_fast.kernels.backends import on_its_device

SIZE = tl.constexpr(BLOCK)
STRIDE = tl.constexpr(ELEMENT_STRIDE)
M_FRACTION, M_OCTAVES, M_HEADROOM = (tl.constexpr(x) for x in (FIRST.fraction, FIRST.octaves, FIRST.headroom))
V_FRACTION, V_OCTAVES, V_HEADROOM = (tl.constexpr(x) for x in (SECOND.fraction, SECOND.octaves, SECOND.headroom))
# Fields of a tensor's row in the table: five addresses, the number of elements, and two that are empty.
FIELDS = tl.constexpr(8)
ALIGNMENT = 16
# One warp is one program, and a block of 256 elements is 8 per thread: 16 bytes of each 2-byte stream. Of 1 to 64
# blocks, with and without prefetch, 4 with prefetch were the fastest on an H200: 2.91 ms per 1e9 parameters.
OPTIONS = {"BLOCKS": 4, "PREFETCH": True, "num_warps": 1, "enable_fp_fusion": False}


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _exponent(bits, OCTAVES: tl.constexpr, FRACTION: tl.constexpr, HEADROOM: tl.constexpr):
    """Bits order as the magnitudes they stand for, and the maximum of integers takes a warp one instruction."""
    highest = tl.max(bits, 0) + (HEADROOM << (23 - FRACTION))
    return tl.maximum((highest >> 23) - (OCTAVES - 1), 1)


@triton.jit
def _load(p_weight, p_grad, p_moments, p_exponents, p_remainder, start, left, HAS_REMAINDER: tl.constexpr):
    """One block from element `start`, of which `left` are in the tensor."""
    offsets = tl.arange(0, SIZE)
    m_ok = offsets < left
    b_weight = tl.load(p_weight + start + offsets, mask=m_ok, other=0)
    b_grad = tl.load(p_grad + start + offsets, mask=m_ok, other=0)
    b_moments = tl.load(p_moments + start + offsets, mask=m_ok, other=0)
    exponents = tl.load(p_exponents + start // SIZE, mask=left > 0, other=0)
    b_remainder = tl.load(p_remainder + start + offsets, mask=m_ok, other=0) if HAS_REMAINDER else b_moments
    return b_weight, b_grad, b_moments, exponents, b_remainder


@triton.jit
def _update(
    p_weight, p_moments, p_exponents, p_remainder, start, left,
    b_weight, b_grad, b_moments, exponents, b_remainder, factor,
    decay, step_size, beta1, other1, beta2, other2, second_scale, eps, seed, HAS_REMAINDER: tl.constexpr,
):  # fmt: skip
    """Step and store the block that `_load` read."""
    offsets = tl.arange(0, SIZE)
    m_ok = offsets < left
    if HAS_REMAINDER:
        b_weight = _float((b_weight.to(tl.int32) << 16) + (b_remainder.to(tl.int32) << 8))
        b_grad = _float(b_grad.to(tl.int32) << 16)
    codes = b_moments.to(tl.int32) << 16
    exponents = exponents.to(tl.int32)
    m_shift, v_shift = (exponents & 0xFF) << 23, ((exponents >> 8) & 0xFF) << 23
    m = _float(((codes & 0x7F000000) >> (1 + M_FRACTION)) + m_shift) - _float(m_shift)
    m = _float(_bits(m) | (codes & -0x80000000))
    v = _float(((codes & 0x00FF0000) << (7 - V_FRACTION)) + v_shift) - _float(v_shift)

    m = tl.fma(m, beta1, b_grad * (other1 * factor))
    root = b_grad * (other2 * factor)
    v = tl.fma(root, root, v * beta2)
    # No smaller than v's first code: m would be divided by eps alone where v was rounded to zero.
    smallest = _float(tl.maximum(v_shift - (V_FRACTION << 23), 1 << 23))
    reciprocal = tl.rsqrt(tl.fma(tl.sqrt(tl.maximum(v, smallest)), second_scale, eps))
    b_weight = tl.fma(b_weight, decay, -(m * reciprocal * reciprocal * step_size))

    noise = (start.to(tl.int32) + offsets) * STRIDE + seed
    high = (noise >> 9) & 0x7FFFFF
    m_bits = _bits(m) & 0x7FFFFFFF
    m_exponent = _exponent(m_bits, M_OCTAVES, M_FRACTION, M_HEADROOM)
    v_exponent = _exponent(_bits(v), V_OCTAVES, V_FRACTION, V_HEADROOM)
    m_shift, v_shift = m_exponent << 23, v_exponent << 23
    m_codes = (_bits(tl.abs(m) + _float(m_shift)) + ((high >> M_FRACTION) - m_shift)) << (1 + M_FRACTION)
    v_codes = (_bits(v + _float(v_shift)) + ((high >> V_FRACTION) - v_shift)) >> (7 - V_FRACTION)
    codes = (m_codes & 0x7F000000) | (_bits(m) & -0x80000000) | (v_codes & 0x00FF0000)
    tl.store(p_moments + start + offsets, (codes >> 16).to(tl.int16), mask=m_ok)
    tl.store(p_exponents + start // SIZE, (m_exponent | (v_exponent << 8)).to(tl.int16), mask=left > 0)
    if HAS_REMAINDER:
        bits = _bits(b_weight) + (noise & 0xFF)
        tl.store(p_weight + start + offsets, ((bits + 0x8000) >> 16).to(tl.int16), mask=m_ok)
        tl.store(p_remainder + start + offsets, (bits >> 8).to(tl.int8), mask=m_ok)
    else:
        tl.store(p_weight + start + offsets, b_weight, mask=m_ok)


@triton.jit
def _update_blocks(
    p_weight, p_grad, p_moments, p_exponents, p_remainder, start, size, factor_ptr,
    decay, step_size, beta1, other1, beta2, other2, second_scale, eps, seed,
    HAS_REMAINDER: tl.constexpr, ALIGNED: tl.constexpr, BLOCKS: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """`BLOCKS` blocks from element `start`, the next one read before this one is computed."""
    factor = 1.0 if factor_ptr is None else tl.load(factor_ptr)
    left = tl.minimum(size - start, BLOCKS * SIZE).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    if PREFETCH:
        b = _load(p_weight, p_grad, p_moments, p_exponents, p_remainder, start, left, HAS_REMAINDER)
    for _ in range(BLOCKS):
        if PREFETCH:
            ahead = _load(
                p_weight, p_grad, p_moments, p_exponents, p_remainder, start + SIZE, left - SIZE, HAS_REMAINDER
            )
        else:
            b = _load(p_weight, p_grad, p_moments, p_exponents, p_remainder, start, left, HAS_REMAINDER)
        _update(
            p_weight, p_moments, p_exponents, p_remainder, start, left, b[0], b[1], b[2], b[3], b[4], factor,
            decay, step_size, beta1, other1, beta2, other2, second_scale, eps, seed, HAS_REMAINDER,
        )  # fmt: skip
        if PREFETCH:
            b = ahead
        start += SIZE
        left -= SIZE


@triton.jit
def _address(row_ptr, FIELD: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row_ptr + FIELD).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit(do_not_specialize=["seed"])
def adamw_kernel(
    table_ptr, place_ptr, factor_ptr, decay, step_size, beta1, other1, beta2, other2, second_scale, eps, seed,
    HAS_REMAINDER: tl.constexpr, ALIGNED: tl.constexpr, BLOCKS: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Blocks of the tensor that the program's row of places names, from the place that it names."""
    place_ptr += tl.program_id(0).to(tl.int64) * 2
    row_ptr = table_ptr + tl.load(place_ptr) * FIELDS
    start = tl.load(place_ptr + 1).to(tl.int64) * (BLOCKS * SIZE)
    size = tl.load(row_ptr + 5)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    dtype: tl.constexpr = tl.int16 if HAS_REMAINDER else tl.float32
    _update_blocks(
        _address(row_ptr, 0, dtype, ALIGNED), _address(row_ptr, 1, dtype, ALIGNED),
        _address(row_ptr, 2, tl.int16, ALIGNED), _address(row_ptr, 3, tl.int16, ALIGNED),
        _address(row_ptr, 4, tl.int8, ALIGNED), start, size, factor_ptr,
        decay, step_size, beta1, other1, beta2, other2, second_scale, eps, seed,
        HAS_REMAINDER, ALIGNED, BLOCKS, PREFETCH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["seed"])
def adamw_single_kernel(
    p_weight, p_grad, p_moments, p_exponents, p_remainder, size, factor_ptr,
    decay, step_size, beta1, other1, beta2, other2, second_scale, eps, seed,
    HAS_REMAINDER: tl.constexpr, ALIGNED: tl.constexpr, BLOCKS: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Blocks of one tensor whose addresses are arguments."""
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * SIZE)
    _update_blocks(
        p_weight, p_grad, p_moments, p_exponents, p_remainder, start, size, factor_ptr,
        decay, step_size, beta1, other1, beta2, other2, second_scale, eps, seed,
        HAS_REMAINDER, ALIGNED, BLOCKS, PREFETCH,
    )  # fmt: skip


@on_its_device
def step_single_(weight: Tensor, slot: Slot, grad: Tensor, hyper: Hyper, factor: Tensor | None) -> None:
    """Step one tensor without a table, as while a backward is still running."""
    adamw_single_kernel[(triton.cdiv(weight.numel(), OPTIONS["BLOCKS"] * BLOCK),)](
        *_pointers(slot, grad), weight.numel(), factor, *hyper.scalars,
        HAS_REMAINDER=slot.remainder is not None, ALIGNED=_is_aligned(slot, grad), **OPTIONS,
    )  # fmt: skip


def step_(slots: Sequence[Slot], grads: Sequence[Tensor], hyper: Hyper, factor: Tensor | None) -> None:
    """Step many tensors of one device and dtype: a launch for those that are aligned, and one for the others."""
    if len(slots) == 1:
        step_single_(slots[0].weight, slots[0], grads[0], hyper, factor)
        return
    by_alignment: dict[bool, list[tuple[Slot, Tensor]]] = {}
    for slot, grad in zip(slots, grads, strict=True):
        by_alignment.setdefault(_is_aligned(slot, grad), []).append((slot, grad))
    for is_aligned, pairs in by_alignment.items():
        _launch(slots[0].weight, pairs, hyper, factor, is_aligned)


@on_its_device
def _launch(
    weight: Tensor, pairs: Sequence[tuple[Slot, Tensor]], hyper: Hyper, factor: Tensor | None, is_aligned: bool
) -> None:
    rows = tuple(number for slot, grad in pairs for number in _row(slot, grad))
    programs = tuple(triton.cdiv(slot.weight.numel(), OPTIONS["BLOCKS"] * BLOCK) for slot, _ in pairs)
    adamw_kernel[(sum(programs),)](
        _table(rows, weight.device), _places(programs, weight.device), factor, *hyper.scalars,
        HAS_REMAINDER=pairs[0][0].remainder is not None, ALIGNED=is_aligned, **OPTIONS,
    )  # fmt: skip


def _pointers(slot: Slot, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Tensors as the kernel types them: bf16 as int16, a block's two exponents as one int16."""
    weight = slot.weight.detach()
    if slot.remainder is not None:
        weight, grad = weight.view(torch.int16), grad.view(torch.int16)
    return weight, grad, slot.moments, slot.exponents.view(torch.int16), slot.remainder


def _row(slot: Slot, grad: Tensor) -> tuple[int, ...]:
    remainder = 0 if slot.remainder is None else slot.remainder.data_ptr()
    addresses = (slot.weight.data_ptr(), grad.data_ptr(), slot.moments.data_ptr(), slot.exponents.data_ptr(), remainder)
    return (*addresses, slot.weight.numel(), 0, 0)


def _is_aligned(slot: Slot, grad: Tensor) -> bool:
    return not any(number % ALIGNMENT for number in _row(slot, grad))


# What a table holds is its key, so that an old one can only be unused, never wrong.
@lru_cache(maxsize=8)
def _table(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """The rows on the device, by a copy that nobody waits for."""
    host = torch.tensor(rows, dtype=torch.int64)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


@lru_cache(maxsize=8)
def _places(programs: tuple[int, ...], device: torch.device) -> Tensor:
    """(all programs, 2) int32: each program's tensor and its number within the tensor."""
    counts = torch.tensor(programs)
    tensor = torch.arange(len(programs)).repeat_interleave(counts)
    number = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    return torch.stack([tensor, number], 1).int().to(device)
