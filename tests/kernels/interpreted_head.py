"""The head's Triton kernels in Triton's interpreter, against the plain definition in fp64.

Run by test_kernels_triton.py.
"""

import pytest
import torch
from interpreted import SMALL, compare, ignore_overflow, make, take, value_and_gradients

from dpo_fast.kernels import linear_logprob_gpu as gpu
from dpo_fast.kernels import linear_logprob_triton as kernels
from dpo_fast.kernels.linear_logprob import linear_logprob, linear_logprob_ref, linear_logprob_with_stats
from dpo_fast.kernels.token_stats import token_stats_ref

# Rows out of range overflow on purpose, and NumPy says so.
pytestmark = ignore_overflow


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
def test_rows_out_of_range_are_recomputed(dtype, spread):
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
    """Whatever is kept, and under a frozen head: blocks have the same borders, and so the same variant."""
    monkeypatch.setattr(gpu, "MAX_BLOCK_ROWS", 16)
    borders = []
    exponentials = gpu._exponentials

    def spy(head, hidden, *arguments):
        borders.append(len(hidden))
        exponentials(head, hidden, *arguments)

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
    assert borders == 3 * [16, 16, 8]
    assert torch.equal(scored, trained)
    assert torch.equal(scored, frozen)


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


@pytest.mark.parametrize("path", ["fused", "sliced"])
def test_a_vocabulary_of_262144(path, monkeypatch):
    take(path, monkeypatch)
    monkeypatch.setattr(kernels, "FUSED", {key: [{**SMALL, "BLOCK_N": 4096}] for key in kernels.FUSED})
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
