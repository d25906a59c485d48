"""The Triton kernels in Triton's interpreter, against their plain definitions in fp64; see test_kernels_triton.py."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from dpo_fast.kernels import linear_logprob_gpu as gpu
from dpo_fast.kernels import linear_logprob_triton as kernels
from dpo_fast.kernels import logprob_triton
from dpo_fast.kernels.gather_rows import RowIndex, gather_rows
from dpo_fast.kernels.linear_logprob import linear_logprob, linear_logprob_ref, linear_logprob_with_stats
from dpo_fast.kernels.linear_logprob_torch import Head
from dpo_fast.kernels.logprob import logprob, logprob_ref
from dpo_fast.kernels.token_stats import token_stats_ref

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

small = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_stages": 2, "num_warps": 4}
for key in kernels.FUSED:
    kernels.FUSED[key] = [small]
kernels.FUSED_REDO.update(small)
kernels.FUSED_STATS.update(small)
logprob_triton.OPTIONS["BLOCK"] = 64

# Rows out of range overflow on purpose, and NumPy says so.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid|divide by zero).*:RuntimeWarning")

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


all_ways = gpu._ways


def take(path, monkeypatch):
    """Let half-precision blocks go this way alone: "fused" or "sliced"."""

    def ways(head, hidden, **options):
        found = all_ways(head, hidden, **options)
        return {name: way for name, way in found.items() if name.startswith(path)} or found

    monkeypatch.setattr(gpu, "_ways", ways)


@pytest.fixture(params=["fused", "sliced"])
def _path(request, monkeypatch):
    take(request.param, monkeypatch)
    monkeypatch.setattr(gpu, "SLICE_BYTES", 2**13)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"softcap": 3.0, "temperature": 0.7}, {"bias": True, "softcap": 5.0}], ids=str
)
def test_head(dtype, options):
    options = dict(options)
    tensors, target = make(19, 97, 24, dtype, bias=options.pop("bias", False))
    target[4] = -100
    compare(tensors, target, **options)


@pytest.mark.parametrize(("n", "v", "d"), [(1, 1, 8), (1, 33, 8), (17, 32, 16), (16, 31, 40), (33, 65, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_of_odd_sizes(n, v, d, dtype):
    if v == 1:
        tensors, target = make(n, v, d, dtype)
        assert value_and_gradients(linear_logprob, tensors, target, backend="triton")[0].tolist() == [0]
    else:
        compare(*make(n, v, d, dtype))


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [80.0, 3000.0], ids=["some-rows-out-of-range", "1e4-nats"])
def test_rows_out_of_range_are_redone(dtype, spread):
    tensors, target = make(40, 97, 16, dtype, spread=spread)
    got = compare(tensors, target)
    assert got.min() < -80
    if spread == 80:
        assert got.max() > -60


@pytest.mark.parametrize("rows_kept", [0, 1, 16, 39])
def test_memory_budget(rows_kept, monkeypatch):
    tensors, target = make(40, 97, 16, torch.bfloat16)
    monkeypatch.setattr(gpu, "MAX_BLOCK_ROWS", 8)
    compare(tensors, target, memory_budget=rows_kept * 224)


@pytest.mark.parametrize("spread", [1.0, 80.0])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}], ids=str)
def test_frozen_head_and_scoring(spread, options, monkeypatch):
    tensors, target = make(40, 97, 16, torch.bfloat16, spread=spread)
    tensors["weight"].requires_grad_(False)
    monkeypatch.setattr(gpu, "MAX_BLOCK_ROWS", 8)
    trained = compare(tensors, target, **options)
    with torch.no_grad():
        scored = linear_logprob(**tensors, target=target, backend="triton", **options)
    assert torch.equal(scored, trained)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 50.0], ids=["common", "some-rows-out-of-range"])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}], ids=str)
def test_stats(dtype, spread, options):
    tensors, target = make(40, 97, 16, dtype, spread=spread)
    target[3] = -100
    _, stats = linear_logprob_with_stats(**tensors, target=target, backend="triton", **options)
    logits = tensors["hidden"].detach().double() @ tensors["weight"].detach().double().t()
    if options:
        logits = 4.0 * torch.tanh(logits / 4.0)
    want = token_stats_ref(logits, target)
    for got, true in zip(stats[:3], want[:3], strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-4)
    top = logits.topk(2).values
    clear = top[:, 0] - top[:, 1] > 1e-4  # a saturated softcap ties everything
    assert torch.equal(stats.is_argmax[clear], want.is_argmax[clear])
    assert options or clear.sum() > 30
    assert (options or spread == 1) or (value_and_gradients(linear_logprob, tensors, target)[0] < -45).any()


@pytest.mark.parametrize("function", [linear_logprob, linear_logprob_with_stats])
def test_partial_sums_stay_within_their_bytes(function, monkeypatch):
    sizes = []

    def fused(*args, **kwargs):
        made = kernels.fused(*args, **kwargs)
        sizes.append(made.untyped_storage().nbytes())
        return made

    monkeypatch.setattr(gpu, "fused", fused)
    monkeypatch.setattr(gpu, "PARTIAL_BYTES", 12_000)
    tensors, target = make(300, 97, 16, torch.bfloat16)
    with torch.no_grad():
        function(**tensors, target=target, backend="triton")
    assert len(sizes) >= 3
    assert max(sizes) <= 12_000


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows_kept", [0, 20, 40])
def test_scored_and_trained_log_probs_are_the_same_to_the_bit(dtype, rows_kept, monkeypatch):
    """Whatever is kept, and under a frozen head: blocks have the same borders and go the same way."""
    monkeypatch.setattr(gpu, "MAX_BLOCK_ROWS", 16)
    borders = []
    exponentials = gpu._exponentials

    def spy(head, hidden, *arguments, is_whole):
        borders.append((len(hidden), is_whole))
        exponentials(head, hidden, *arguments, is_whole=is_whole)

    monkeypatch.setattr(gpu, "_exponentials", spy)
    tensors, target = make(40, 97, 16, dtype)
    options = {
        "target": target,
        "backend": "triton",
        "memory_budget": rows_kept * (224 if dtype == torch.bfloat16 else 448),
    }
    with torch.no_grad():
        scored = linear_logprob(**tensors, **options)
    trained = linear_logprob(**tensors, **options)
    frozen = linear_logprob(tensors["hidden"], tensors["weight"].detach(), **options)
    assert borders == 3 * [(16, True), (16, True), (8, False)]
    assert torch.equal(scored, trained)
    assert torch.equal(scored, frozen)


def lose_a_row(e, odds, sums):
    e[3].fill_(-1)


def spoil_a_row(e, odds, sums):
    e[3, 5] = torch.nan


def halve_a_checked_row(e, odds, sums):
    e[0] *= 0.5


def miss_the_odds(e, odds, sums):
    odds *= 1.1


def miss_a_figure(e, odds, sums):
    sums[1].mul_(1.1)


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"bias": True}], ids=str)
@pytest.mark.parametrize("want_stats", [False, True])
@pytest.mark.parametrize("spoil", [None, lose_a_row, spoil_a_row, halve_a_checked_row, miss_the_odds, miss_a_figure])
def test_a_trial_knows_right_from_wrong(options, want_stats, spoil):
    tensors, target = make(40, 97, 16, torch.bfloat16, spread=8, bias="bias" in options)
    head = Head(tensors["weight"].detach(), tensors.get("bias"), options.get("softcap"), 1.0, torch.float32)
    hidden = tensors["hidden"].detach()
    anchor = kernels.target_logits(head, hidden, target)[0].float()

    def spoiled(*arguments):
        all_ways(head, hidden, want_stats=want_stats)["sliced"](*arguments)
        spoil(arguments[-2], arguments[-3], arguments[-1])

    ways = all_ways(head, hidden, want_stats=want_stats)
    if spoil is not None and (want_stats or spoil is not miss_a_figure):
        ways["spoiled"] = spoiled
    with torch.no_grad():
        trial = gpu._trial(ways, head, hidden, target, anchor, want_stats=want_stats)
        right = {name: trial.is_right(name) for name in ways}
    assert right == {name: name != "spoiled" for name in ways}
    assert len(right) >= 2


def nothing(hidden, weight, bias):
    pass


def a_row_of_nan(hidden, weight, bias):
    hidden[7, 3] = torch.nan


def a_row_of_infinity(hidden, weight, bias):
    hidden[7, 3] = torch.inf


def a_masked_vocabulary(hidden, weight, bias):
    bias[90:] = -torch.inf


def an_infinite_weight(hidden, weight, bias):
    weight[5] = torch.inf


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("want_stats", [False, True])
@pytest.mark.parametrize("change", [nothing, a_row_of_nan, a_row_of_infinity, a_masked_vocabulary, an_infinite_weight])
def test_inputs_that_are_not_finite_make_no_way_wrong(change, want_stats):
    tensors, target = make(40, 97, 16, torch.bfloat16, spread=8, bias=True)
    hidden, weight, bias = (tensors[name].detach() for name in ("hidden", "weight", "bias"))
    change(hidden, weight, bias)
    target.clamp_(max=89)
    head = Head(weight, bias, None, 1.0, torch.float32)
    anchor = kernels.target_logits(head, hidden, target)[0].float()
    ways = all_ways(head, hidden, want_stats=want_stats)
    with torch.no_grad():
        trial = gpu._trial(ways, head, hidden, target, anchor, want_stats=want_stats)
        assert (trial is None) is (change is an_infinite_weight)
        assert trial is None or all(map(trial.is_right, ways))


@pytest.mark.parametrize("rows_kept", [0, 16, 40])
def test_main_grad(rows_kept):
    tensors, target = make(40, 97, 16, torch.bfloat16)
    (want,) = torch.autograd.grad(linear_logprob(**tensors, target=target, backend="triton").sum(), tensors["weight"])
    main_grad = torch.ones(97, 16)
    budget = rows_kept * 224
    linear_logprob(
        **tensors, target=target, backend="triton", main_grad=main_grad, memory_budget=budget
    ).sum().backward()
    assert tensors["weight"].grad is None
    torch.testing.assert_close(main_grad - 1, want.float(), rtol=1e-2, atol=2e-3)


def test_second_backward_and_same_bits():
    tensors, target = make(19, 97, 24, torch.bfloat16)
    runs = [linear_logprob(**tensors, target=target, backend="triton").sum() for _ in range(2)]
    grads = [torch.autograd.grad(run, list(tensors.values()), retain_graph=True) for run in (*runs, runs[0])]
    assert torch.equal(runs[0], runs[1])
    for other in grads[1:]:
        assert all(map(torch.equal, grads[0], other))


@pytest.mark.parametrize("tma", [True, False])
def test_poisoned_memory_is_never_read(tma, monkeypatch):
    def poisoned(*size, **kwargs):
        return torch.full(size[0] if isinstance(size[0], tuple | torch.Size) else size, torch.nan, **kwargs)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kw: torch.full_like(x, torch.nan, **kw))
    monkeypatch.setattr(kernels, "TMA_CAPABILITIES", range(90, 120) if tma else ())
    compare(*make(19, 97, 24, torch.bfloat16, spread=60))


@pytest.fixture(scope="module")
def far_rows():
    """Makes (3, width) tensors, the third row 2^31 numbers behind the first; what is untouched takes no memory."""

    def make(width, dtype):
        return torch.empty(2**31 + width, dtype=dtype).as_strided((3, width), (2**30, 1))

    return make


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("path", ["fused", "sliced"])
def test_exponentials_beyond_2_to_the_31(path, tma, far_rows, monkeypatch):
    monkeypatch.setattr(kernels, "TMA_CAPABILITIES", range(90, 120) if tma else ())
    take(path, monkeypatch)
    tensors, target = make(3, 64, 16, torch.bfloat16, spread=30)
    near = value_and_gradients(linear_logprob, tensors, target, backend="triton")
    monkeypatch.setattr(gpu, "_empty_exponentials", lambda hidden, rows, vocab: far_rows(vocab, torch.bfloat16))
    far = value_and_gradients(linear_logprob, tensors, target, backend="triton")
    assert torch.equal(near[0], far[0])
    assert all(map(torch.equal, near[1], far[1]))


def test_logits_beyond_2_to_the_31(far_rows):
    logits, target = far_rows(130, torch.bfloat16), torch.tensor([0, 129, 64])
    logits.copy_(torch.randn(3, 130, generator=torch.Generator().manual_seed(0)))
    near = logits.contiguous()
    found = {}
    for name, z in (("near", near), ("far", logits)):
        logp, lse = logprob_triton.forward(z, target)
        logprob_triton.backward(z, target, lse, logp, torch.ones(3), z)
        found[name] = (logp, z)
    assert all(map(torch.equal, found["near"], found["far"]))


@pytest.mark.parametrize("path", ["fused", "sliced"])
def test_a_vocabulary_of_262144(path, monkeypatch):
    take(path, monkeypatch)
    monkeypatch.setattr(kernels, "FUSED", {key: [{**small, "BLOCK_N": 4096}] for key in kernels.FUSED})
    tensors, target = make(5, 262_144, 16, torch.bfloat16)
    target[1] = 262_143
    compare(tensors, target)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_bad_row_spoils_no_other(bad, frozen):
    """Its own log-prob is NaN, and so is all that it is summed into; other rows keep theirs."""
    tensors, target = make(20, 97, 16, torch.bfloat16)
    tensors["weight"].requires_grad_(not frozen)
    good = torch.arange(20) != 7
    want, grads = value_and_gradients(linear_logprob, tensors, target, backend="triton")
    with torch.no_grad():
        tensors["hidden"][7, 3] = bad
    got, bad_grads = value_and_gradients(linear_logprob, tensors, target, backend="triton")
    assert got[7].isnan()
    assert torch.equal(got[good], want[good])
    assert torch.equal(bad_grads[0][good], grads[0][good])
    assert frozen or bad_grads[1].isnan().any()


def test_infinite_weights_are_log_softmaxs():
    tensors, target = make(3, 40, 16, torch.float32)
    with torch.no_grad():
        tensors["hidden"].abs_()
        tensors["weight"][7] = torch.inf
        assert linear_logprob(**tensors, target=target, backend="triton").isnan().all()
        tensors["weight"][7] = -torch.inf
        want = linear_logprob_ref(**tensors, target=target)
        torch.testing.assert_close(linear_logprob(**tensors, target=target, backend="triton"), want)


def test_nothing_to_score():
    tensors, _ = make(4, 40, 16, torch.float16)
    got, grads = value_and_gradients(linear_logprob, tensors, torch.full((4,), -1), backend="triton")
    assert got.tolist() == [0] * 4
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 131), (2, 3, 64)])
@pytest.mark.parametrize("spread", [1.0, 300.0, 1e4])
def test_logprob(dtype, shape, spread):
    torch.manual_seed(0)
    base = (spread * torch.randn(shape)).to(dtype).requires_grad_()
    target = torch.randint(0, shape[-1], shape[:-1])
    target.view(-1)[-1] = -1 if target.numel() > 1 else 0
    double = base.detach().double().requires_grad_()
    want = logprob_ref(double, target)
    (true_grad,) = torch.autograd.grad(want.sum(), double)
    for inplace in (False, True):
        got = logprob(base * 1, target, backend="triton", inplace_backward=inplace)
        (grad,) = torch.autograd.grad(got.sum(), base)
        assert ((got - want).abs() / want.abs().clamp(min=1)).max() < 1e-6
        # z - logsumexp(z) cannot be had more exactly than logsumexp(z) is known.
        known = double.abs().max().item() * 2**-23
        assert (grad - true_grad).abs().max() < known + {torch.float32: 1e-6}.get(dtype, 5e-3)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("target", [0, 1])
def test_infinite_logits_are_log_softmaxs(target):
    logits = torch.tensor([[torch.inf, 0, 0], [-torch.inf, 0, 0], [torch.nan, 0, 0], [-torch.inf] * 3, [0, 1, 2]])
    target = torch.full((5,), target)
    want = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(logprob(logits, target, backend="triton"), want, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 1, 5), (7, 3, 1030), (7, 9)])
def test_gather_rows(dtype, shape):
    rows = RowIndex.of(torch.tensor([6, 0, 2, 2, 1, 2, 0]), 7)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if len(shape) == 3:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    x.requires_grad_()
    got, want = (gather_rows(x, rows, backend=backend) for backend in ("triton", "torch"))
    assert torch.equal(got, want)
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, true = (torch.autograd.grad(y, x, grad)[0] for y in (got, want))
    torch.testing.assert_close(found, true, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6)


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
    print("\n| V | D | way | logp, to 113 nats | beyond, relative | p = 1 - 3e-5, relative | dH | dW | bf16 torch |")
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
