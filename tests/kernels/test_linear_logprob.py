import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.kernels import linear_logprob_torch
from dpo_fast.kernels.linear_logprob import linear_logprob, linear_logprob_ref, linear_logprob_with_stats


def make(n, v, d, *, dtype=torch.double, spread=1.0, seed=0, bias=False):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.double)
    weight = spread * torch.randn(v, d, generator=generator, dtype=torch.double) / d**0.5
    target = torch.randint(0, v, (n,), generator=generator)
    out = {"hidden": hidden, "weight": weight}
    if bias:
        out["bias"] = torch.randn(v, generator=generator, dtype=torch.double)
    return {k: x.to(dtype).requires_grad_() for k, x in out.items()}, target


def value_and_gradients(function, tensors, target, **options):
    logp = function(target=target, **tensors, **options)
    weights = torch.linspace(-1, 2, len(target), dtype=logp.dtype)
    return logp.detach(), torch.autograd.grad((logp * weights).sum(), list(tensors.values()))


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-300)).item()


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles and blocks at the sizes of tests."""
    monkeypatch.setattr(linear_logprob_torch, "TILE", 64)
    monkeypatch.setattr(linear_logprob_torch, "MAX_ROWS", 4)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("rows_kept", [0, 1, 6, 11])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}, {"temperature": 1.7}], ids=str)
def test_value_and_gradients_are_torchs_in_fp64(rows_kept, bias, options):
    tensors, target = make(11, 67, 5, bias=bias, spread=3)
    target[2] = -100
    got, grads = value_and_gradients(linear_logprob, tensors, target, memory_budget=rows_kept * 67 * 8, **options)
    want, true_grads = value_and_gradients(linear_logprob_ref, tensors, target, **options)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=1e-11, atol=1e-13)


def test_gradcheck():
    tensors, target = make(3, 5, 2, bias=True)
    for options in ({}, {"softcap": 2.0, "temperature": 0.5}):
        assert torch.autograd.gradcheck(
            lambda h, w, b, o=options: linear_logprob(h, w, target, bias=b, **o), tuple(tensors.values())
        )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 3000),
    st.floats(0.1, 60),
    st.integers(0, 99),
)
def test_any_shape_and_budget(n, v, d, budget, spread, seed):
    tensors, target = make(n, v, d, spread=spread, seed=seed)
    target[::3] = -1
    got, grads = value_and_gradients(linear_logprob, tensors, target, memory_budget=budget)
    want, true_grads = value_and_gradients(linear_logprob_ref, tensors, target)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("spread", [1.0, 100.0, 1e4], ids=["common", "69-nats-and-more", "1e4-nats"])
@pytest.mark.parametrize("rows_kept", [0, 20])
def test_fp32_rows_far_from_their_target(spread, rows_kept):
    tensors, target = make(20, 311, 16, dtype=torch.float32, spread=spread)
    doubles = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    want, true_grads = value_and_gradients(linear_logprob_ref, doubles, target)
    got, grads = value_and_gradients(linear_logprob, tensors, target, memory_budget=rows_kept * 311 * 4)
    plain, plain_grads = value_and_gradients(linear_logprob_ref, tensors, target)
    assert ((got - want) / want.abs().clamp(min=1)).abs().max() < 1e-6
    assert (got - want).abs().max() <= 2 * (plain - want).abs().max()
    for grad, plain_grad, true_grad in zip(grads, plain_grads, true_grads, strict=True):
        assert relative_error(grad, true_grad) <= 2 * relative_error(plain_grad, true_grad) + 1e-6


def test_confident_tokens_keep_their_relative_accuracy():
    """p = 1 - 3e-5: log_softmax in fp32 is off by 1e-3 of logp here."""
    d, v = 64, 4096
    tensors, _ = make(32, v, d, dtype=torch.float32, spread=0.5)
    target = torch.arange(32)
    with torch.no_grad():
        tensors["weight"][:32] = 18.7 * torch.nn.functional.normalize(tensors["hidden"]) ** 2 / tensors["hidden"]
    want = linear_logprob_ref(**{k: x.double() for k, x in tensors.items()}, target=target)
    assert -1e-3 < want.min() < want.max() < -1e-6
    got = linear_logprob(**tensors, target=target)
    assert (got / want - 1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_fp32(dtype):
    tensors, target = make(70, 501, 32, dtype=dtype, spread=4)
    doubles = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    want, true_grads = value_and_gradients(linear_logprob_ref, doubles, target)
    got, grads = value_and_gradients(linear_logprob, tensors, target)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 1e-5
    for grad, true_grad in zip(grads, true_grads, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, true_grad) < (2e-3 if dtype == torch.bfloat16 else 3e-4)


def test_frozen_parts_have_no_gradient_and_scoring_keeps_nothing():
    tensors, target = make(6, 40, 8, bias=True)
    names = list(tensors)
    _, all_grads = value_and_gradients(linear_logprob, tensors, target)
    for wanted in itertools.chain(*(itertools.combinations(names, k) for k in (1, 2))):
        some = {k: x.detach().requires_grad_(k in wanted) for k, x in tensors.items()}
        logp = linear_logprob(**some, target=target)
        (logp * torch.linspace(-1, 2, 6)).sum().backward()
        for name, grad in zip(names, all_grads, strict=True):
            if name in wanted:
                torch.testing.assert_close(some[name].grad, grad)
            else:
                assert some[name].grad is None
    with torch.no_grad():
        assert linear_logprob(**tensors, target=target).grad_fn is None


class Memory(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of tensors made while it is on: the most that were alive at once, and of the largest."""

    def __init__(self, *known):
        super().__init__()
        self.alive = {x.untyped_storage()._cdata: 0 for x in known}
        self.now = self.peak = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
                self.now += storage.nbytes()
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, storage.nbytes())
        return out

    def forget(self, key):
        self.now -= self.alive.pop(key, 0)


def test_no_large_tensor_is_made():
    n, v, d = 300, 50_000, 16
    tensors, target = make(n, v, d, dtype=torch.float32)
    full = n * v * 4
    with Memory() as scoring, torch.no_grad():
        linear_logprob(**tensors, target=target)
    assert scoring.largest <= linear_logprob_torch.TILE * 4 < full / 7
    with Memory() as training:
        linear_logprob(**tensors, target=target, memory_budget=full // 4).sum().backward()
    assert training.largest <= full // 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "v", "d", "dtype", "spread", "options"),
    [
        (1024, 12_000, 64, torch.float32, 1, {"softcap": 30.0}),
        (1024, 600, 4096, torch.float32, 1, {}),
        (1024, 1200, 4096, torch.bfloat16, 1, {"softcap": 30.0}),
        (4, 50_000, 256, torch.float32, 100, {}),
        (1024, 4000, 1024, torch.float32, 100, {"softcap": 300.0}),
        (1024, 1200, 4096, torch.bfloat16, 100, {}),
    ],
)
@pytest.mark.parametrize("function", [linear_logprob, linear_logprob_with_stats])
def test_scoring_takes_64_mib_at_most(n, v, d, dtype, spread, options, function):
    """Also with rows out of range, which are recomputed in fp64, and whatever the sizes."""
    tensors, target = make(n, v, d, dtype=dtype, spread=spread)
    with Memory(*tensors.values(), target) as memory, torch.no_grad():
        function(**tensors, target=target, **options)
    print(f"{memory.peak / 2**20:.0f} MiB")
    assert memory.peak < 64 * 2**20


def test_same_bits_every_time():
    tensors, target = make(50, 301, 24, dtype=torch.float32)
    first, first_grads = value_and_gradients(linear_logprob, tensors, target, memory_budget=20 * 301 * 4)
    again, again_grads = value_and_gradients(linear_logprob, tensors, target, memory_budget=20 * 301 * 4)
    assert torch.equal(first, again)
    assert all(map(torch.equal, first_grads, again_grads))


def test_nothing_to_score():
    for n, target in ((0, torch.zeros(0, dtype=torch.int64)), (4, torch.full((4,), -100))):
        tensors, _ = make(n, 7, 3, dtype=torch.float32)
        logp = linear_logprob(**tensors, target=target)
        assert logp.dtype == torch.float32
        assert logp.tolist() == [0] * n
        logp.sum().backward()
        assert all(x.grad is not None and not x.grad.any() for x in tensors.values())


def test_infinite_weights_are_log_softmaxs():
    tensors, _ = make(2, 6, 3, dtype=torch.float32)
    with torch.no_grad():
        tensors["hidden"].fill_(1)
        tensors["weight"][4] = torch.inf
    assert linear_logprob(**tensors, target=torch.tensor([0, 4])).isnan().all()
    with torch.no_grad():
        tensors["weight"][4] = -torch.inf
    want = linear_logprob_ref(**tensors, target=torch.tensor([0, 1]))
    torch.testing.assert_close(linear_logprob(**tensors, target=torch.tensor([0, 1])), want)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_bad_row_spoils_no_other(bad, frozen):
    """Its own log-prob is NaN, and so is all that it is summed into; other rows keep theirs."""
    tensors, target = make(11, 67, 5, dtype=torch.float32)
    if frozen:
        tensors["weight"].requires_grad_(False)
    wanted = [x for x in tensors.values() if x.requires_grad]
    good = torch.arange(11) != 6
    clean = linear_logprob(**tensors, target=target)
    clean_grads = torch.autograd.grad(clean.sum(), wanted)
    with torch.no_grad():
        tensors["hidden"][6, 3] = bad
    got = linear_logprob(**tensors, target=target)
    grads = torch.autograd.grad(got.sum(), wanted)
    assert got[6].isnan()
    assert torch.equal(got[good], clean[good])
    assert torch.equal(grads[0][good], clean_grads[0][good])
    assert frozen or grads[1].isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden: expected \(N, D\)"),
        ({"weight": torch.zeros(5, 4)}, r"weight: expected \(V, 3\)"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target: expected \(2,\) int64"),
        ({"target": torch.zeros(2)}, r"target: expected \(2,\) int64"),
        ({"target": torch.tensor([0, 5])}, "below the 5 rows of weight, got 5"),
        ({"bias": torch.zeros(3)}, r"bias: expected \(5,\)"),
        ({"softcap": 0.0}, "softcap: expected a positive"),
        ({"temperature": -1.0}, "temperature: expected a positive"),
        ({"backend": "cuda"}, "backend: expected"),
        ({"memory_budget": -1}, "memory_budget: expected 0 bytes or more, got -1"),
    ],
)
def test_mistakes_are_named(change, message):
    good = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "target": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**good, **change})
