"""The fused AdamW's PyTorch path against `torch.optim.AdamW` in fp64, and its 8-bit codes against hand-made bounds."""

from unittest import mock

import pytest
import torch

from dpo_fast.kernels.adamw import (
    Hyper,
    Slot,
    adamw_step_,
    decode_moments,
    encode_moments,
    join_weight,
    split_weight,
)

BETAS, EPS = (0.9, 0.999), 1e-8
SHAPES = [(1,), (255,), (256,), (257,), (1031,), (37, 53)]
# Spacing of a number in [1, 2) with a bf16 weight and 8 more bits, 15 in all behind the point.
SPACING_24 = 2.0**-15


def random_weights(shape, dtype, generator):
    """Normal, of standard deviation 0.02, as a model has them."""
    return torch.randn(shape, generator=generator).mul_(0.02).to(dtype)


def run_both(weight, grads, *, lr, weight_decay=0.0, scale=None):
    """Joined weights of the fused AdamW, and weights of torch's in fp64, both in fp64 and of the weight's shape."""
    slot = Slot.zeros(weight.clone())
    factor = None if scale is None else torch.tensor(scale)
    exact = torch.nn.Parameter(weight.double())
    reference = torch.optim.AdamW([exact], lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay)
    for step, grad in enumerate(grads, 1):
        adamw_step_([slot], [grad], Hyper(lr, *BETAS, EPS, weight_decay, step), factor, backend="torch")
        exact.grad = grad.double() * (1.0 if factor is None else factor.double())
        reference.step()
    return join_weight(slot.weight, slot.remainder).double(), exact.detach(), slot


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("weight_decay", "scale"), [(0.0, None), (0.1, None), (0.1, 0.37)])
def test_first_step_is_off_by_no_more_than_the_weights_rounding(shape, dtype, weight_decay, scale):
    """A first step reads moments that are exactly zero: only fp32 arithmetic and the weight's rounding remain."""
    generator = torch.Generator().manual_seed(1)
    weight = random_weights(shape, dtype, generator)
    grad = torch.randn(shape, generator=generator).mul_(1e-3).to(dtype)
    lr = 1e-3
    got, want, slot = run_both(weight, [grad], lr=lr, weight_decay=weight_decay, scale=scale)
    spacing = SPACING_24 if dtype == torch.bfloat16 else 2.0**-23
    assert ((got - want).abs() <= spacing * want.abs() + 8 * 2.0**-24 * lr).all()
    if dtype == torch.bfloat16:
        # The model sees the nearest bf16 number, half of bf16's spacing (2^-7) away at most.
        assert ((slot.weight.double() - got).abs() <= 2.0**-8 * got.abs()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("weight_decay", "scale"), [(0.0, None), (0.1, 0.37)])
def test_ten_steps_are_off_by_what_8_bit_moments_allow(shape, dtype, weight_decay, scale):
    """Bounds are measured: up to 1.8% of the distance moved, and up to 0.27 lr for an element.

    The size is what to expect: a code's step is 1/32 to 1/16 of its number, and rounding it up or down by chance has
    a standard deviation of about 0.4 steps, or 2%.
    """
    generator = torch.Generator().manual_seed(2)
    weight = random_weights(shape, dtype, generator)
    grads = [torch.randn(shape, generator=generator).mul_(1e-3).to(dtype) for _ in range(10)]
    lr = 1e-3
    got, want, _ = run_both(weight, grads, lr=lr, weight_decay=weight_decay, scale=scale)
    error = got - want
    assert error.norm() <= 0.025 * (want - weight.double()).norm()
    assert error.abs().max() <= 0.4 * lr


def test_at_a_small_learning_rate_joined_weights_follow_fp64_and_plain_bf16_stands_still():
    """Rounded to nearest, plain bf16 loses every step: lr is 1/240 of its spacing, and 1.05 of the 24-bit spacing."""
    generator = torch.Generator().manual_seed(3)
    num, steps, lr = 4096, 50, 5e-7
    weight = (0.016 + 0.014 * torch.rand(num, generator=generator)).bfloat16()
    direction = torch.randn(num, generator=generator)
    grads = [((direction + torch.randn(num, generator=generator)) * 1e-3).bfloat16() for _ in range(steps)]
    got, want, _ = run_both(weight, grads, lr=lr)

    plain = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([plain], lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0)
    for grad in grads:
        plain.grad = grad
        optimizer.step()
    true_move, move = want - weight.double(), got - weight.double()
    unit = 2.0**-6 * SPACING_24
    should_move = true_move.abs() > 8 * unit
    assert should_move.sum() > num / 2
    assert (move[should_move] != 0).all()
    assert (plain != weight).sum() == 0
    # Measured: 1.0006 of the true distance along the true direction, 4.9% off it, no element by more than 5.6 units.
    assert abs((move * true_move).sum() / true_move.square().sum() - 1) < 0.003
    assert (move - true_move).norm() < 0.06 * true_move.norm()
    assert (move - true_move).abs().max() < 8 * unit


def test_moments_survive_the_codes_within_half_a_step():
    """Half a step of 1/16 of an octave of |x| + A, where A is at most 1/120 (m) or 1/30720 (v) of a block's largest."""
    generator = torch.Generator().manual_seed(4)
    blocks, size = 64, 256
    magnitude = 10 ** (12 * torch.rand(blocks * size - 3, generator=generator, dtype=torch.float64) - 14)
    m = (magnitude * (2 * torch.randint(2, magnitude.shape, generator=generator) - 1)).float()
    v = (magnitude.flip(0) ** 2).float()
    moments, exponents = encode_moments(m, v)
    assert moments.dtype == torch.int16
    assert moments.shape == m.shape
    assert exponents.shape == (blocks, 2)
    decoded = decode_moments(moments, exponents)
    for x, y, octaves_below in zip((m, v), decoded, (120, 30720), strict=True):
        padded = torch.nn.functional.pad(x.abs().double(), (0, 3)).view(blocks, size)
        anchor = (padded.amax(1, keepdim=True) / octaves_below).expand_as(padded).flatten()[: len(x)]
        limit = (x.abs().double() + anchor) / 32 * (1 + 2.0**-18)
        assert ((x.double() - y.double()).abs() <= limit).all()
    # The bound is not idle: some number comes within a tenth of it.
    assert ((m.double() - decoded[0].double()).abs() * 32 / m.abs().double())[m.abs() > 1e-4].max() > 0.9
    assert (m * decoded[0] >= 0).all()
    assert (decoded[1] >= 0).all()


@pytest.mark.parametrize("top", [1.0, 1.8749999, 1.875, 1.9375, 1.9999999, 1.5e-36])
def test_the_largest_number_of_a_block_fits_its_code(top):
    m, v = torch.full((256,), -top), torch.full((256,), top)
    m[1:], v[1:] = 0, 0
    back_m, back_v = decode_moments(*encode_moments(m, v))
    assert abs(back_m[0] + top) <= top * (1 + 1 / 120) / 32
    assert abs(back_v[0] - top) <= top * (1 + 1 / 30720) / 32
    assert not back_m[1:].any()
    assert not back_v[1:].any()


def test_moments_of_a_tensor_keep_its_shape_and_zeros():
    moments, exponents = encode_moments(torch.zeros(3, 100), torch.zeros(3, 100))
    assert not moments.any()
    m, v = decode_moments(moments, exponents)
    assert m.shape == v.shape == (3, 100)
    assert not m.any()
    assert not v.any()


def test_numbers_of_24_bits_are_split_and_joined_exactly():
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).int()
    numbers = (bits & ~0xFF).view(torch.float32)
    # The last half spacing below infinity has no bf16 number above it.
    numbers = numbers[numbers.abs() < 3.38e38]
    weight, remainder = split_weight(numbers)
    assert weight.dtype == torch.bfloat16
    assert remainder.dtype == torch.int8
    assert torch.equal(join_weight(weight, remainder), numbers)
    is_tie = remainder == -128
    assert torch.equal(weight[~is_tie], numbers.bfloat16()[~is_tie])
    assert is_tie.any()


def test_other_numbers_are_rounded_to_the_nearest_24_bits_or_by_the_threshold():
    generator = torch.Generator().manual_seed(6)
    numbers = torch.randn(100_000, generator=generator)
    bits = numbers.view(torch.int32)
    nearest, truncated, risen = (
        join_weight(*split_weight(numbers, noise)).view(torch.int32) for noise in (128, 0, torch.tensor(255))
    )
    assert (nearest - bits).abs().max() == 128
    assert torch.equal(truncated, bits & ~0xFF)
    assert torch.equal(risen, -(-bits // 256) * 256)


def test_an_fp32_weight_needs_no_remainder():
    weight = torch.randn(5)
    assert Slot.zeros(weight).remainder is None
    assert join_weight(weight, None) is weight


def test_a_step_of_many_tensors_and_chunks_is_the_same_as_of_each(monkeypatch):
    from dpo_fast.kernels import adamw

    generator = torch.Generator().manual_seed(7)
    weights = [random_weights(shape, torch.bfloat16, generator) for shape in [*SHAPES, (0,), (3000,)]]
    grads = [torch.randn(w.shape, generator=generator).bfloat16() for w in weights]
    together, single = ([Slot.zeros(w.clone()) for w in weights] for _ in range(2))
    for step in (1, 2):
        hyper = Hyper(1e-3, *BETAS, EPS, 0.1, step)
        monkeypatch.setattr(adamw, "CPU_CHUNK", 1 << 20)
        adamw_step_(together, grads, hyper)
        monkeypatch.setattr(adamw, "CPU_CHUNK", 512)
        for slot, grad in zip(single, grads, strict=True):
            adamw_step_([slot], [grad], hyper)
    for a, b in zip(together, single, strict=True):
        for field in ("weight", "moments", "exponents", "remainder"):
            assert torch.equal(getattr(a, field), getattr(b, field))


def test_a_gradient_that_is_not_contiguous_is_read_in_its_order():
    weight, grad = torch.randn(6, 9), torch.randn(9, 6)
    hyper = Hyper(1e-3, *BETAS, EPS, 0.0, 1)
    strided, copied = Slot.zeros(weight.clone()), Slot.zeros(weight.clone())
    adamw_step_([strided], [grad.t()], hyper)
    adamw_step_([copied], [grad.t().contiguous()], hyper)
    assert torch.equal(strided.weight, copied.weight)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3, dtype=torch.float16), "expected bfloat16 or float32, got torch.float16"),
        (torch.zeros(4, 3).t(), r"contiguous tensor, got shape \(3, 4\), strides \(1, 3\); replace it by"),
    ],
)
def test_a_weight_that_cannot_be_stepped_is_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        Slot.zeros(weight)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([torch.ones(4, 2)], r"expected \(2, 4\) torch.bfloat16 on cpu as its weight, got \(4, 2\) torch.float32"),
        ([torch.ones(2, 4)], r"got \(2, 4\) torch.float32 on cpu"),
        ([torch.ones(2, 4, dtype=torch.bfloat16, device="meta")], "torch.bfloat16 on meta"),
        ([torch.ones(2, 4, dtype=torch.bfloat16).to_sparse()], "expected a dense tensor, got torch.sparse_coo"),
        ([], "shorter"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused_and_nothing_is_stepped(grads, message):
    slot = Slot.zeros(torch.ones(2, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=message):
        adamw_step_([slot], grads, Hyper(1e-3, *BETAS, EPS, 0.0, 1))
    assert (slot.weight == 1).all()
    assert not slot.moments.any()


@pytest.mark.parametrize(
    ("shapes", "launches"),
    [
        ([(64, 48)], ["adamw_single_kernel"]),
        ([(64, 48), (16,), (32, 16)], ["adamw_kernel"]),
        ([(64, 48), (16,), (17,), (3, 5)], ["adamw_kernel", "adamw_kernel"]),
    ],
)
def test_all_tensors_of_a_dtype_take_one_launch_and_odd_sizes_a_second(shapes, launches):
    """Programs: one for each 4 blocks of 256 elements of a tensor."""
    from triton.runtime.jit import JITFunction

    from dpo_fast.kernels import adamw_triton

    caught = []
    slots = [Slot.zeros(torch.empty(shape, dtype=torch.bfloat16, device="meta")) for shape in shapes]
    with mock.patch.object(JITFunction, "run", lambda self, *_, grid, **__: caught.append((self.__name__, grid))):
        adamw_triton.step_(slots, [slot.weight for slot in slots], Hyper(1e-3, *BETAS, EPS, 0.0, 1), None)
    assert [name for name, _ in caught] == launches
    assert sum(grid[0] for _, grid in caught) == sum(-(-slot.weight.numel() // 1024) for slot in slots)


def test_a_step_moves_twelve_bytes_per_parameter():
    """Weight, remainder and moments are read and written, the gradient is read; 4 bytes more per block of 256."""
    slot = Slot.zeros(torch.zeros(256, 256, dtype=torch.bfloat16))
    state = [slot.weight, slot.remainder, slot.moments, slot.exponents]
    moved = 2 * sum(x.nbytes for x in state) + torch.empty_like(slot.weight).nbytes
    assert moved / slot.weight.numel() == 12 + 4 / 256
