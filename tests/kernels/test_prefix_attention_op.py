"""Attention as an operator: a layer compiles to one graph and computes what it does uncompiled."""

import copy
import gc

import pytest
import torch
from families import gradients, make, settings_of
from oracle import as_policy, random_groups
from torch._dynamo.utils import counters

from dpo_fast.kernels import prefix_attention_op as operator
from dpo_fast.kernels.prefix_attention import LAYOUTS, prefix_attention, prefix_layout
from dpo_fast.packs.layout import pack

# Dynamo looks at the .grad of its inputs, and PyTorch warns of that.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# Gemma 2 has windows and softcaps in attention.
@pytest.mark.parametrize(
    ("name", "backend", "checkpointing"),
    [
        ("Llama", "eager", "none"),
        ("Llama", "aot_eager", "none"),
        ("Llama", "aot_eager", "full"),
        ("Llama", "aot_eager", "selective"),
        ("Llama", "inductor", "none"),
        ("Gemma2", "aot_eager", "none"),
    ],
)
def test_a_layer_is_one_graph_with_the_uncompiled_values_and_gradients(name, backend, checkpointing):
    plain = make(name, settings_of(name))
    compiled = copy.deepcopy(plain)
    policies = [as_policy(plain), as_policy(compiled)]
    for policy in policies:
        policy.set_trainable(checkpointing=checkpointing)
    policies[1] = policies[1].compiled(backend=backend)
    groups = random_groups(9, seed=9)
    for start in range(0, 9, 3):
        batch = pack(groups[start : start + 3])
        want, got = (policy.token_logps(batch) for policy in policies)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if backend == "inductor" else 0)
        true_grads, grads = gradients(want, plain), gradients(got, compiled)
        for parameter, true in true_grads.items():
            error = 1e-5 if backend == "inductor" else 0
            assert (grads[parameter] - true).norm() <= error * true.norm(), parameter
    assert not counters["graph_break"]
    # Layers of one kind share their code.
    assert counters["stats"]["unique_graphs"] <= 2
    assert not operator._kept


def test_graphs_and_layouts_are_dropped_without_a_backward():
    policy = as_policy(make("Llama", settings_of("Llama"))).compiled(backend="aot_eager")
    batch = pack(random_groups(3))
    policy.score(batch)
    assert not operator._kept
    logps = policy.token_logps(batch)
    assert len(operator._kept) == 2  # one a layer
    first = set(operator._kept)
    del logps
    policy.token_logps(batch).sum().backward()
    assert not first & set(operator._kept)
    assert not operator._kept
    gc.collect()
    assert not LAYOUTS


def test_a_second_backward_is_refused():
    policy = as_policy(make("Llama", settings_of("Llama"))).compiled(backend="eager")
    loss = policy.token_logps(pack(random_groups(3))).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="its backward can run only once"):
        loss.backward()


def test_sinks_have_a_gradient():
    batch = pack(random_groups(3))
    layout = prefix_layout(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index)
    shapes = [(1, batch.num_tokens, heads, 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [*shapes, (4,)]]
    got, _ = operator.prefix_attention_op(*inputs, layout.number, 0.4, 5, 2.0, True)
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])
    want = prefix_attention(q, k, v, layout, scale=0.4, window=5, softcap=2.0, sinks=inputs[3]).transpose(1, 2)
    assert torch.equal(got, want)
    weights = torch.randn_like(want)
    for grad, true in zip(*(torch.autograd.grad((x * weights).sum(), inputs) for x in (got, want)), strict=True):
        assert torch.equal(grad, true)


def test_shapes_and_registrations_pass_torchs_own_checks():
    batch = pack(random_groups(3))
    layout = prefix_layout(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index)
    tensors = [torch.randn(1, batch.num_tokens, heads, 8) for heads in (4, 2, 2)]
    arguments = (*tensors, None, layout.number, 0.4, None, None, False)
    torch.library.opcheck(operator.prefix_attention_op, arguments, test_utils=("test_schema", "test_faketensor"))
