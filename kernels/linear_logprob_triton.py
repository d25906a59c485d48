"""Triton kernels of the head, and their launchers. `linear_logprob_gpu.py` puts them together.

The maths and the names are those of `linear_logprob.py`. For N rows, a vocabulary V and a hidden size D:

    target_kernel      z_y and the softcap's slope there          reads 2·N·D
    fused_kernel       E and its row sums in the epilogue of      a product's reads; writes N·V of E, or nothing,
                       H·Wᵀ (TMA and WGMMA on sm_90a)             and N·V / BLOCK_N fp32 sums
    slice_kernel       the same in one pass over fp32 products    reads N·C·4 bytes, writes N·C of E
    scale_rows_kernel  v ⊙ X                                      reads and writes N·D

Every number is written by one program alone and sums are added in a fixed order: no atomics, the same bits
every time. Offsets that grow with N·V are 64-bit.
"""

# Kernels take pointers and numbers that Triton types at launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dpo_fast.kernels.head import Head
from dpo_fast.kernels.token_stats import StatsSums

LOG2E = tl.constexpr(1.4426950408889634)
FILL, PEAK, REDO = (tl.constexpr(i) for i in range(3))

# The fused kernel's blocks and launch options, checked by compiling without a GPU (benchmarks/aot.py): no spill, and
# within the GPU's shared memory. The first of each is the default, autotune.py tries the others. "plain" has no bias
# and no softcap, which leaves registers for a larger tile. Compute capabilities that are not listed take the next lower
# one. On 10.0 Triton 3.9 cannot lower eight warps with a softcap
# (TritonNvidiaGPUOptimizeTMemLayoutsPass fails).
_WIDE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_stages": 4, "num_warps": 8}
_SQUARE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_stages": 4, "num_warps": 8}
_SMALL = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_stages": 4, "num_warps": 8}
FUSED = {
    (80, "plain"): [_SMALL, {**_SMALL, "num_stages": 3}],
    (80, "epilogue"): [_SMALL],
    (90, "plain"): [{**_WIDE, "num_stages": 3}, _WIDE, _SQUARE],
    (90, "epilogue"): [_SQUARE],
    (100, "plain"): [_SQUARE, {**_SQUARE, "num_stages": 3}],
    (100, "epilogue"): [{"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_stages": 4, "num_warps": 4}],
}
# Statistics besides the odds take more registers.
FUSED_STATS = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_stages": 3, "num_warps": 4}
# Rows are recomputed in fp64, with the same blocks on every GPU.
FUSED_REDO = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 16, "num_stages": 2, "num_warps": 8}
# Consumer Blackwell (12.x) has TMA but Ampere's shared memory and tensor cores.
TMA_CAPABILITIES = range(90, 120)
# Triton 3.10 changes the default: contraction of a·b + c is wanted, and stated.
FP_FUSION = {"enable_fp_fusion": True}


@triton.jit
def _tanh(x):
    """tanh without libdevice, which the interpreter lacks; the error is 1e-7, absolute."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _add_product(acc, a, b):
    """acc + a·b in the dtype of `acc`; in fp64 whatever the operands are, without rounding them.

    Triton 3.6 cannot lower an fp64 product of operands that were cast from a narrower load ("fp64 don't support largeK
    MMA"); behind a sum, here over an axis of one, it does not see the cast.
    """
    if acc.dtype == tl.float64:
        a = tl.sum(a.to(tl.float64)[:, :, None], 2)
        b = tl.sum(b.to(tl.float64)[:, :, None], 2)
    return tl.dot(a, b, acc, out_dtype=acc.dtype)


@triton.jit
def _cap(product, factor, gain, HAS_CAP: tl.constexpr):
    """Logits and cap' of products: gain · tanh(factor · product), or factor · product without a cap."""
    x = product * factor
    slope = 1.0
    if HAS_CAP:
        # A capped logit is small: fp32 is enough for it where products are made in fp64.
        t = _tanh(x.to(tl.float32))
        slope = 1 - t * t
        x = t * gain
    return x, slope


@triton.jit
def _add_stats(square, energy, shifted, peak, e, distance, counts, inside, AXIS: tl.constexpr):
    """The sums of `StatsSums` with a tile's share; `counts` is `inside` without the targets."""
    square += tl.sum(e * e, AXIS)
    energy += tl.sum(tl.where(e > 0, e * distance, 0.0), AXIS)
    shifted += tl.sum(tl.where(inside, distance, 0.0), AXIS)
    peak = tl.maximum(peak, tl.max(tl.where(counts, distance, float("-inf")), AXIS))
    return square, energy, shifted, peak


@triton.jit
def target_kernel(
    hidden_ptr, weight_ptr, bias_ptr, label_ptr, logit_ptr, slope_ptr, dim, hidden_stride, weight_stride, factor, gain,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: the fp64 logit of its target and the softcap's slope there."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, dim, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        h = tl.load(hidden_ptr + row * hidden_stride + offsets, mask=offsets < dim, other=0.0)
        w = tl.load(weight_ptr + label * weight_stride + offsets, mask=offsets < dim, other=0.0)
        total += h.to(tl.float64) * w.to(tl.float64)
    product = tl.sum(total, 0)
    if HAS_BIAS:
        product += tl.load(bias_ptr + label).to(tl.float64)
    logit, slope = _cap(product, factor, gain, HAS_CAP)
    tl.store(logit_ptr + row, logit)
    tl.store(slope_ptr + row, slope)


@triton.jit
def slice_kernel(
    z_ptr, e_ptr, bias_ptr, anchor_ptr, label_ptr, odds_ptr, square_ptr, energy_ptr, shifted_ptr, peak_ptr,
    start, width, z_stride, e_stride, factor, gain,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: products of columns start .. start + width to exponentials at `e_ptr`, their sum onto the
    odds, and onto the sums of `StatsSums`, if there are any."""
    row = tl.program_id(0).to(tl.int64)
    anchor = tl.load(anchor_ptr + row)
    label = tl.load(label_ptr + row) - start
    odds = tl.load(odds_ptr + row)
    STATS: tl.constexpr = square_ptr is not None
    if STATS:
        square, energy = tl.load(square_ptr + row), tl.load(energy_ptr + row)
        shifted, peak = tl.load(shifted_ptr + row), tl.load(peak_ptr + row)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        product = tl.load(z_ptr + row * z_stride + columns, mask=inside, other=0.0)
        if HAS_BIAS:
            product += tl.load(bias_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        logit, slope = _cap(product, factor, gain, HAS_CAP)
        counts = inside & (columns != label)
        distance = logit - anchor
        e = tl.where(counts, tl.exp2(distance * LOG2E), 0.0)
        odds += tl.sum(e, 0)
        if STATS:
            square, energy, shifted, peak = _add_stats(square, energy, shifted, peak, e, distance, counts, inside, 0)
        out = e_ptr + row * e_stride + columns
        tl.store(out, (e * slope).to(e_ptr.dtype.element_ty), mask=inside)
    tl.store(odds_ptr + row, odds)
    if STATS:
        tl.store(square_ptr + row, square)
        tl.store(energy_ptr + row, energy)
        tl.store(shifted_ptr + row, shifted)
        tl.store(peak_ptr + row, peak)


@triton.jit
def _place(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: groups of row tiles share a tile of the head while it is in the L2 cache."""
    group = tile // (GROUP_M * num_n)
    height = tl.minimum(num_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (tile % (GROUP_M * num_n)) % height
    tile_n = (tile % (GROUP_M * num_n)) // height
    return tile_m, tile_n


@triton.jit
def _product(
    hidden_desc, weight_desc, hidden_ptr, weight_ptr, rows, columns, first_row, first_column, num_rows, vocab, dim,
    depth, ACC: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) products of hidden states and head, over the first `depth` of `dim` numbers."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if TMA:
        for k in range(0, depth, BLOCK_K):
            h = hidden_desc.load([first_row, k])
            w = weight_desc.load([first_column, k])
            acc = tl.dot(h, w.T, acc)
    else:
        # Rows over the end read the last one: cheaper than a mask, and their results are masked.
        h_rows = hidden_ptr + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * dim
        w_rows = weight_ptr + tl.minimum(columns, vocab - 1).to(tl.int64)[None, :] * dim
        for k in range(0, depth, BLOCK_K):
            depths = k + tl.arange(0, BLOCK_K)
            h = tl.load(h_rows + depths[None, :], mask=depths[None, :] < dim, other=0.0)
            w = tl.load(w_rows + depths[:, None], mask=depths[:, None] < dim, other=0.0)
            acc = _add_product(acc, h, w)
    return acc


@triton.jit
def fused_kernel(
    hidden_desc, weight_desc, e_desc, hidden_ptr, weight_ptr, e_ptr, bias_ptr, anchor_ptr, label_ptr, out_of_range_ptr,
    any_out_of_range_ptr, partial_ptr, num_rows, vocab, dim, e_stride, factor, gain,
    MODE: tl.constexpr, STATS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Tiles of logits, turned into exponentials in the epilogue; a partial result per row and tile of columns.

    FILL sums exponentials and stores them at `e_ptr`, if there is one. PEAK and REDO are for the rows that
    `out_of_range_ptr` marks, and make their products in fp64: PEAK takes the maximum of their logits, REDO does what
    FILL does. With STATS there are five partial results, those of `StatsSums` after the odds.
    """
    ONLY_MARKED: tl.constexpr = MODE != FILL
    ACC: tl.constexpr = tl.float64 if ONLY_MARKED else tl.float32
    if ONLY_MARKED:  # noqa: SIM102  one condition is Triton's, the other is evaluated on the device
        if tl.load(any_out_of_range_ptr) == 0:
            return
    num_m = tl.cdiv(num_rows, BLOCK_M)
    num_n = tl.cdiv(vocab, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, NUM_PROGRAMS):
        tile_m, tile_n = _place(tile, num_m, num_n, GROUP_M)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        live = rows < num_rows
        depth = dim
        if ONLY_MARKED:
            live = live & (tl.load(out_of_range_ptr + rows, mask=live, other=0) != 0)
            # A tile without such rows makes no product; its results are not read.
            depth = tl.where(tl.max(live.to(tl.int32), 0) > 0, dim, 0)
        acc = _product(
            hidden_desc, weight_desc, hidden_ptr, weight_ptr, rows, columns, tile_m * BLOCK_M, tile_n * BLOCK_N,
            num_rows, vocab, dim, depth, ACC, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        # The epilogue takes one half of the columns at a time: half the registers.
        halves = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        partial = tl.full((BLOCK_M,), float("-inf") if MODE == PEAK else 0.0, tl.float32)
        if STATS:
            square, energy, shifted = tl.zeros_like(partial), tl.zeros_like(partial), tl.zeros_like(partial)
            peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        for half in tl.static_range(2):
            columns = tile_n * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            inside = columns < vocab
            product = halves[half]
            if HAS_BIAS:
                product += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(ACC)[None, :]
            logit, slope = _cap(product, factor, gain, HAS_CAP)
            if MODE == PEAK:
                partial = tl.maximum(partial, tl.max(tl.where(inside[None, :], logit.to(tl.float32), float("-inf")), 1))
            else:
                anchor = tl.load(anchor_ptr + rows, mask=live, other=0.0)
                label = tl.load(label_ptr + rows, mask=live, other=-1)
                counts = inside[None, :] & (columns[None, :] != label[:, None])
                distance = (logit - anchor[:, None]).to(tl.float32)
                e = tl.where(counts, tl.exp2(distance * LOG2E), 0.0)
                partial += tl.sum(e, 1)
                if STATS:
                    square, energy, shifted, peak = _add_stats(
                        square, energy, shifted, peak, e, distance, counts, inside[None, :], 1
                    )
                if e_ptr is not None:
                    e = (e * slope).to(tl.float32).to(e_ptr.dtype.element_ty)
                    if TMA and not ONLY_MARKED:
                        e_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N + half * (BLOCK_N // 2)], e)
                    else:
                        out = e_ptr + rows.to(tl.int64)[:, None] * e_stride + columns[None, :]
                        tl.store(out, e, mask=live[:, None] & inside[None, :])
        out = partial_ptr + tile_n.to(tl.int64) * num_rows + rows
        tl.store(out, partial, mask=live)
        if STATS:
            plane = num_n.to(tl.int64) * num_rows
            tl.store(out + plane, square, mask=live)
            tl.store(out + 2 * plane, energy, mask=live)
            tl.store(out + 3 * plane, shifted, mask=live)
            tl.store(out + 4 * plane, peak, mask=live)


@triton.jit
def scale_rows_kernel(x_ptr, factor_ptr, out_ptr, width, x_stride, out_stride, BLOCK: tl.constexpr):
    """out[i, j] = factor[i] · x[i, j], one row a program, without the fp32 copy that PyTorch would make."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row)
    for start in range(0, width, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + offsets, mask=offsets < width, other=0.0).to(tl.float32)
        out = out_ptr + row * out_stride + offsets
        tl.store(out, (x * factor).to(out_ptr.dtype.element_ty), mask=offsets < width)


def fused_choices(hidden: Tensor, *, has_epilogue: bool, stats: bool) -> dict[str, dict[str, Any]]:
    """By name: blocks, launch options, path and grid that the fused kernel may fill with on this device; see FUSED."""
    capability = _capability(hidden)
    tma = capability in TMA_CAPABILITIES and hidden.shape[1] % 8 == 0
    known = max(key for key, _ in FUSED if key <= capability) if tma else 80
    common = {**FP_FUSION, "NUM_PROGRAMS": _num_programs(hidden), "TMA": tma}
    choices = [FUSED_STATS] if stats else FUSED[known, "epilogue" if has_epilogue else "plain"]
    return {_name(blocks): {**blocks, **common} for blocks in choices}


def _name(blocks: dict[str, int]) -> str:
    sizes = "x".join(str(blocks[f"BLOCK_{axis}"]) for axis in "MNK")
    return f"fused {sizes}, {blocks['num_stages']} stages"


def _capability(hidden: Tensor) -> int:
    if not hidden.is_cuda:
        return 90
    if torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(hidden.device)
    return 10 * major + minor


def _num_programs(hidden: Tensor) -> int:
    """One persistent program a multiprocessor; a few in the interpreter."""
    if not hidden.is_cuda:
        return 3
    return torch.cuda.get_device_properties(hidden.device).multi_processor_count


def _factors(head: Head) -> tuple[float, float]:
    """factor and gain of `_cap`."""
    if head.softcap is None:
        return head.scale, 1.0
    return 1 / head.softcap, head.softcap * head.scale


def target_logits(head: Head, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) fp64 logits of the targets, and the softcap's fp32 slope there."""
    logit = torch.empty(target.shape, dtype=torch.float64, device=hidden.device)
    slope = torch.empty(target.shape, dtype=torch.float32, device=hidden.device)
    if target.numel():
        target_kernel[(target.shape[0],)](
            hidden, head.weight, head.bias, target, logit, slope, hidden.shape[1], hidden.stride(0),
            head.weight.stride(0), *_factors(head), HAS_BIAS=head.bias is not None,
            HAS_CAP=head.softcap is not None, BLOCK=min(triton.next_power_of_2(hidden.shape[1]), 1024), **FP_FUSION,
        )  # fmt: skip
    return logit, slope


def fused(
    mode: tl.constexpr,
    head: Head,
    hidden: Tensor,
    target: Tensor,
    anchor: Tensor,
    e: Tensor | None,
    *,
    out_of_range: Tensor | None = None,
    stats: bool = False,
    choice: str | None = None,
) -> Tensor:
    """Launch `fused_kernel`; returns its partial results, (1, or 5 with stats, tiles of columns, N) fp32.

    Args:
        mode: FILL, PEAK or REDO.
        head: with a contiguous weight.
        hidden: (N, D), contiguous.
        target, anchor: (N,).
        e: (N, V) to write exponentials to, its rows 16 bytes aligned; or None.
        out_of_range: (N,) int32, not 0 for PEAK's and REDO's rows.
        stats: also make the partial results of `StatsSums`.
        choice: FILL's blocks, a name in `fused_choices`; None takes the first.
    """
    (num_rows, dim), vocab = hidden.shape, head.weight.shape[0]
    options = {**FUSED_REDO, **FP_FUSION, "NUM_PROGRAMS": _num_programs(hidden), "TMA": False}
    if mode.value == FILL.value:
        choices = fused_choices(hidden, has_epilogue=head.has_epilogue, stats=stats)
        options = choices[choice or next(iter(choices))]
    block_m, block_n, block_k = options["BLOCK_M"], options["BLOCK_N"], options["BLOCK_K"]
    planes, tiles = 5 if stats else 1, triton.cdiv(vocab, block_n)
    partial = torch.empty(planes, tiles, num_rows, dtype=torch.float32, device=hidden.device)
    any_out_of_range = None if out_of_range is None else out_of_range.amax()
    descriptors = [None, None, None]
    if options["TMA"]:
        blocks = (hidden, [block_m, block_k]), (head.weight, [block_n, block_k]), (e, [block_m, block_n // 2])
        descriptors = [None if x is None else TensorDescriptor.from_tensor(x, block) for x, block in blocks]
    fused_kernel[(options["NUM_PROGRAMS"],)](
        *descriptors, hidden, head.weight, e, head.bias, anchor, target, out_of_range, any_out_of_range, partial,
        num_rows, vocab, dim, 0 if e is None else e.stride(0), *_factors(head), MODE=mode, STATS=stats,
        HAS_BIAS=head.bias is not None, HAS_CAP=head.softcap is not None, GROUP_M=8, **options,
    )  # fmt: skip
    return partial


def add_slice(
    z: Tensor,
    start: int,
    head: Head,
    target: Tensor,
    anchor: Tensor,
    odds: Tensor,
    e: Tensor,
    sums: StatsSums | None,
) -> None:
    """Turn fp32 products `z` (N, C) of columns from `start` on into exponentials `e` (N, C); add them up in `odds`."""
    slice_kernel[(z.shape[0],)](
        z, e, head.bias, anchor, target, odds, *(sums or (None,) * 4), start, z.shape[1], z.stride(0),
        e.stride(0), *_factors(head), HAS_BIAS=head.bias is not None,
        HAS_CAP=head.softcap is not None, BLOCK=min(triton.next_power_of_2(z.shape[1]), 4096 if sums is None else 2048),
        num_warps=8, **FP_FUSION,
    )  # fmt: skip


def scale_rows(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor[:, None] · x, in place if `out` is `x`."""
    if x.numel():
        scale_rows_kernel[(x.shape[0],)](
            x, factor, out, x.shape[1], x.stride(0), out.stride(0), BLOCK=min(triton.next_power_of_2(x.shape[1]), 4096),
            **FP_FUSION,
        )  # fmt: skip
