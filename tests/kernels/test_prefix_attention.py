"""Attention over packs against its formula in fp64, and the gather of keys against plain indexing."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from oracle import random_groups
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import create_block_mask

from dpo_fast.kernels import attention_backends, deterministic_backward, prefix_attention_flex
from dpo_fast.kernels.attention_backends import BACKENDS, AttentionOptions, attention_backend, choose_attention
from dpo_fast.kernels.gather_rows import RowIndex, gather_rows
from dpo_fast.kernels.prefix_attention import prefix_attention, prefix_attention_ref, prefix_layout
from dpo_fast.packs.layout import pack

OPTIONS = [
    {},
    {"window": 1},
    {"window": 4},
    {"window": 1000},
    {"softcap": 1.5},
    {"sinks": True},
    {"window": 5, "softcap": 2.0, "sinks": True},
]


def make(heads, kv_heads, dim=8, *, dtype=torch.float64, num_answers=2, seed=0):
    batch = pack(random_groups(4, seed=seed, num_answers=num_answers))
    layout = prefix_layout(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index)
    generator = torch.Generator().manual_seed(seed)

    def random(h):
        return torch.randn(1, h, batch.num_tokens, dim, generator=generator, dtype=dtype).requires_grad_()

    return layout, (random(heads), random(kv_heads), random(kv_heads))


@pytest.fixture
def backward_of_flex_on_a_cpu(monkeypatch):
    """FlexAttention refuses gradients on a CPU, though its plain implementation has them: the refusal is taken out."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)


@pytest.mark.parametrize("backend", ["segments", "flex"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile", "ignore:The .grad attribute of a Tensor:UserWarning"
)
@pytest.mark.usefixtures("backward_of_flex_on_a_cpu")
def test_value_and_gradients_are_the_formulas(backend, options, heads, kv_heads):
    layout, inputs = make(heads, kv_heads, num_answers=3)
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.linspace(-1, 2, heads, dtype=torch.float64).requires_grad_()
        inputs = (*inputs, options["sinks"])
    want = prefix_attention_ref(*inputs[:3], layout, scale=0.4, **options)
    got = prefix_attention(*inputs[:3], layout, scale=0.4, backend=backend, **options)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    weights = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).view_as(want)
    true_grads = torch.autograd.grad((want * weights).sum(), inputs)
    for grad, true in zip(torch.autograd.grad((got * weights).sum(), inputs), true_grads, strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["segments", "flash_attn_3"])
def test_padding_after_the_last_segment_changes_nothing(backend, one_call):
    layout, inputs = make(4, 2)
    batch = pack(random_groups(4))
    padded = prefix_layout(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index, batch.num_tokens + 3)
    filled = [torch.cat([x, x.new_full((*x.shape[:2], 3, x.shape[3]), torch.nan)], 2).detach() for x in inputs]
    filled = [x.requires_grad_() for x in filled]
    want = prefix_attention(*inputs, layout, scale=0.3)
    got = prefix_attention(*filled, padded, scale=0.3, backend=backend)
    torch.testing.assert_close(got[:, :, :-3], want)
    assert not got[:, :, -3:].any()
    assert not prefix_attention_ref(*(x.detach() for x in filled), padded, scale=0.3)[:, :, -3:].any()
    grads, others = (torch.autograd.grad(x.square().sum(), i) for x, i in ((got, filled), (want, inputs)))
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad[:, :, :-3], other)
        assert not grad[:, :, -3:].any()


def varlen_by_hand(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False, softcap=0.0):
    """What PyTorch's documentation says of `varlen_attn`, in plain PyTorch, and flash-attn's cap."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert enable_gqa or q.shape[1] == k.shape[1]
    left, right = window_size
    assert right == 0
    repeats = q.shape[1] // k.shape[1]
    parts = []
    for m in range(len(cu_q) - 1):
        qs, ks, vs = q[cu_q[m] : cu_q[m + 1]], k[cu_k[m] : cu_k[m + 1]], v[cu_k[m] : cu_k[m + 1]]
        place = torch.arange(len(ks) - len(qs), len(ks))[:, None]
        keys = torch.arange(len(ks))
        seen = (keys <= place) & ((left < 0) | (keys >= place - left))
        scores = torch.einsum("qhd,khd->hqk", qs, ks.repeat_interleave(repeats, 1)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, vs.repeat_interleave(repeats, 1)))
    return torch.cat(parts)


def varlen_of_torch_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """It groups queries unasked."""
    return varlen_by_hand(*(q, k, v, cu_q, cu_k, max_q, max_k), scale=scale, window_size=window_size, enable_gqa=True)


def flash_attn_by_hand(*tensors_and_bounds, softmax_scale, causal, window_size, softcap, deterministic):
    """`flash_attn_varlen_func` of flash-attn 2.8 and 3: the same, grouped queries unasked."""
    assert causal
    assert deterministic
    return varlen_by_hand(
        *tensors_and_bounds, scale=softmax_scale, window_size=window_size, enable_gqa=True, softcap=softcap
    )


@pytest.fixture
def one_call(monkeypatch):
    """There are no such kernels for CPUs, so their documented behaviour stands in for them."""
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_by_hand)
    for name in ("flash_attn", "flash_attn_interface"):
        stand_in = ModuleType(name)
        stand_in.flash_attn_varlen_func = flash_attn_by_hand
        monkeypatch.setitem(sys.modules, name, stand_in)


@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    ("backend", "softcap"),
    [("varlen", None), ("flash_attn", None), ("flash_attn", 1.5), ("flash_attn_3", None), ("flash_attn_3", 1.5)],
)
def test_the_one_call_for_gpus_is_given_the_right_bounds(one_call, window, kv_heads, backend, softcap):
    layout, inputs = make(4, kv_heads)
    want = prefix_attention(*inputs, layout, scale=0.3, window=window, softcap=softcap, backend="segments")
    got = prefix_attention(*inputs, layout, scale=0.3, window=window, softcap=softcap, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    grads, others = (torch.autograd.grad(x.square().sum(), inputs) for x in (got, want))
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-11)


def test_an_early_flash_attn_3_returns_the_logsumexp_too(one_call, monkeypatch):
    layout, inputs = make(4, 2)
    want = prefix_attention(*inputs, layout, scale=0.3, backend="segments")
    flash_attn = sys.modules["flash_attn_interface"]
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", lambda *a, **k: (flash_attn_by_hand(*a, **k), None))
    torch.testing.assert_close(prefix_attention(*inputs, layout, scale=0.3, backend="flash_attn_3"), want)


NO_PACKAGES, BOTH = (), ("flash_attn", "flash_attn_interface")


@pytest.mark.parametrize(
    ("installed", "capability", "tensor", "options", "backend"),
    [
        (NO_PACKAGES, 9, {}, {}, "varlen"),
        (NO_PACKAGES, 9, {}, {"softcap": 2.0}, "flex"),
        (NO_PACKAGES, 9, {}, {"sinks": True}, "flex"),
        (("flash_attn",), 9, {}, {}, "varlen"),
        (("flash_attn",), 9, {}, {"softcap": 2.0}, "flash_attn"),
        (BOTH, 9, {}, {}, "flash_attn_3"),
        (BOTH, 9, {}, {"softcap": 2.0}, "flash_attn_3"),
        (BOTH, 9, {}, {"sinks": True}, "flex"),
        (BOTH, 8, {}, {}, "varlen"),
        (BOTH, 10, {}, {"softcap": 2.0}, "flash_attn"),
        (BOTH, 9, {"dtype": torch.float32}, {}, "segments"),
        (BOTH, 9, {"shape": (1, 4, 9, 320)}, {}, "segments"),
        (BOTH, 9, {"shape": (1, 4, 9, 8)}, {"sinks": True}, "segments"),
        (BOTH, 9, {"is_cuda": False}, {}, "segments"),
    ],
)
def test_the_backend_is_chosen_by_what_is_there(installed, capability, tensor, options, backend, monkeypatch):
    monkeypatch.setattr(attention_backends, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    query = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (1, 4, 9, 64), "device": "cuda"} | tensor
    chosen = choose_attention("auto", SimpleNamespace(**query), AttentionOptions(0.3, **options))
    assert chosen is BACKENDS[backend]


@pytest.fixture
def invented(monkeypatch):
    """A backend that exists by its definition alone: attention without softcap, for dtypes of 8 bytes."""
    monkeypatch.setattr(attention_backends, "BACKENDS", dict(BACKENDS))

    @attention_backend(priority=99, is_usable=lambda query: query.dtype.itemsize == 8, lacks=("softcap",))
    def invented(q, k, v, layout, options):
        return torch.full_like(q, 7.0)

    return invented


def test_a_new_backend_is_chosen_or_refused_by_its_definition_alone(invented):
    layout, doubles = make(2, 2)
    _, singles = make(2, 2, dtype=torch.float32)
    for backend in ("auto", "invented"):
        assert (prefix_attention(*doubles, layout, scale=0.3, backend=backend) == 7).all()
    # It is not usable for fp32, and has no softcap: another one is chosen.
    for tensors, options in ((singles, {}), (doubles, {"softcap": 2.0})):
        want = prefix_attention_ref(*tensors, layout, scale=0.3, **options)
        torch.testing.assert_close(prefix_attention(*tensors, layout, scale=0.3, **options), want)
    with pytest.raises(ValueError, match="invented has no softcap"):
        prefix_attention(*doubles, layout, scale=0.3, softcap=2.0, backend="invented")


def test_a_backend_is_never_given_an_option_that_it_lacks():
    layout, inputs = make(2, 2)
    with pytest.raises(ValueError, match="varlen has no sinks or softcap"):
        prefix_attention(*inputs, layout, scale=0.3, softcap=2.0, sinks=torch.zeros(2), backend="varlen")
    with pytest.raises(ValueError, match=r"expected .auto. or one of .*segments.*got 'flash'"):
        prefix_attention(*inputs, layout, scale=0.3, backend="flash")


@pytest.mark.parametrize("window", [None, 1, 40, 1000])
@pytest.mark.parametrize("num_groups", [1, 12, 30])
def test_flex_visits_the_blocks_that_its_mask_has_and_few_others(window, num_groups):
    """Against FlexAttention's own search through all queries and keys."""
    batch = pack(random_groups(num_groups, num_answers=3))
    layout = prefix_layout(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index)
    mask = prefix_attention_flex.block_mask(layout, window)
    assert prefix_attention_flex.block_mask(layout, window) is mask
    sizes = (batch.num_tokens, len(batch.kv_index))
    needed = create_block_mask(mask.mask_mod, None, None, *sizes, device="cpu").to_dense()
    visited = mask.to_dense()
    assert (visited >= needed).all()
    # A block's range is one piece, so at most the blocks between two that are needed come along.
    assert visited.sum() <= needed.sum() + needed.shape[-2]
    assert mask.shape == (1, 1, *sizes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flex_is_compiled_once_for_packs_of_all_sizes(monkeypatch):
    """On a CPU its compiled kernel gives no gradient, but reads the same list of blocks."""
    monkeypatch.setattr(
        prefix_attention_flex, "flex_attention", torch.compile(flex_module.flex_attention, dynamic=True)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for seed, num_groups in enumerate((25, 31, 40)):
        batch = pack(random_groups(num_groups, seed=seed))
        layout = prefix_layout(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index)
        inputs = [torch.randn(1, heads, batch.num_tokens, 16) for heads in (4, 2, 2)]
        for options in ({"window": 6, "softcap": 2.0}, {"window": 9 + seed}):
            want = prefix_attention(*inputs, layout, scale=0.3, **options)
            got = prefix_attention(*inputs, layout, scale=0.3, backend="flex", **options)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1] == graphs[2], graphs
    torch._dynamo.reset()


def test_masks_are_shared_by_layers():
    layout, inputs = make(2, 2)
    prefix_attention(*inputs, layout, scale=1.0)
    masks = dict(layout.masks)
    assert masks
    prefix_attention(*inputs, layout, scale=1.0)
    assert all(layout.masks[key] is mask for key, mask in masks.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gather_and_its_sum(dtype):
    index = torch.tensor([3, 0, 3, 3, 1, 0])
    rows = RowIndex.of(index, 5)
    x = torch.randn(2, 5, 3, dtype=dtype).transpose(0, 1).requires_grad_()
    got = gather_rows(x, rows)
    assert got.is_contiguous()
    assert torch.equal(got, x[index])
    grad = torch.randn_like(got)
    (found,) = torch.autograd.grad(got, x, grad)
    want = torch.zeros(5, 2, 3, dtype=torch.float64)
    for place, row in enumerate(index.tolist()):
        want[row] += grad[place].double()
    torch.testing.assert_close(found.double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    assert not found[2].any()
    assert not found[4].any()


def test_an_index_of_other_rows_is_refused():
    with pytest.raises(ValueError, match="expected 5 rows"):
        gather_rows(torch.zeros(4, 2), RowIndex.of(torch.tensor([0, 1]), 5))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_varlen_of_torch_2_11_knows_no_grouped_queries(kv_heads, monkeypatch):
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_of_torch_2_11)
    layout, inputs = make(4, kv_heads)
    want = prefix_attention_ref(*inputs, layout, scale=0.3)
    torch.testing.assert_close(prefix_attention(*inputs, layout, scale=0.3, backend="varlen"), want)


@pytest.mark.parametrize("mode", ["default", "warn", "error"])
def test_one_node_of_a_backward_runs_under_deterministic_algorithms(mode):
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory))
            return grad

    x = torch.ones(2, requires_grad=True)
    torch.set_deterministic_debug_mode(mode)
    try:
        middle = Watched.apply(Watched.apply(x))
        deterministic_backward.run_deterministically(middle.grad_fn)
        Watched.apply(middle).sum().backward()
        before = torch.get_deterministic_debug_mode()
    finally:
        torch.set_deterministic_debug_mode("default")
    outside = (["default", "warn", "error"].index(mode), True)
    assert before == outside[0]
    assert seen == [outside, (2, False), outside]


def test_only_kernels_of_attention_are_asked_for_a_fixed_order(monkeypatch):
    asked = []
    monkeypatch.setattr(deterministic_backward, "run_deterministically", lambda node: asked.append(node))
    kernel = SimpleNamespace(name=lambda: "ScaledDotProductEfficientAttentionBackward0")
    product = SimpleNamespace(name=lambda: "BmmBackward0")
    for is_cuda, node in ((True, kernel), (True, product), (True, None), (False, kernel)):
        deterministic_backward.in_fixed_order(SimpleNamespace(is_cuda=is_cuda, grad_fn=node))
    assert asked == [kernel]


def test_a_backward_that_ends_by_an_exception_leaves_no_trace():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.OutOfMemoryError("CUDA out of memory")

    out = Failing.apply(torch.ones(2, requires_grad=True))
    deterministic_backward.run_deterministically(out.grad_fn)
    with pytest.raises(torch.OutOfMemoryError):
        out.sum().backward()
    make(2, 2)  # the next pack's layout
    assert torch.get_deterministic_debug_mode() == 0
    assert torch.utils.deterministic.fill_uninitialized_memory
