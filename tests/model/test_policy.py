"""Packs against the plain model: log-probs, gradients, and independence of a group from its neighbours."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from oracle import (
    as_policy,
    masked,
    padded_dpo_loss,
    padded_sequence_logps,
    random_groups,
    save_tiny_checkpoint,
    tiny_llama,
)

from dpo_fast.config import DPOConfig, ModelConfig
from dpo_fast.errors import UserError
from dpo_fast.kernels.prefix_attention import prefix_attention
from dpo_fast.losses.from_packs import pair_logps
from dpo_fast.losses.objective import preference_loss
from dpo_fast.model.attention import _in_one_dtype, reads_packs, use_packed_attention
from dpo_fast.model.check import Verdict, check_packed_forward, with_fitting_layout
from dpo_fast.model.load import load_tokenizer
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import pack

BETA = 0.3


@pytest.mark.parametrize("choose_targets", [list, masked], ids=["all", "masked"])
@pytest.mark.parametrize("num_answers", [2, 3])
def test_packed_log_probs_are_those_of_the_padded_model_in_fp64(num_answers, choose_targets):
    groups = choose_targets(random_groups(6, num_answers=num_answers))
    model = tiny_llama(dtype=torch.float64)
    with torch.no_grad():
        want = torch.stack([padded_sequence_logps(model, groups, a) for a in range(num_answers)], 1)
        policy = as_policy(model)
        batch = pack(groups)
        sums = policy.token_logps(batch).split(batch.answer_lengths.tolist())
    got = torch.stack([s.sum() for s in sums]).view_as(want)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_packed_gradient_is_that_of_padded_dpo_in_fp64():
    """The whole step in fp64, references included: every parameter's gradient to 1e-9."""
    groups = random_groups(7, seed=1)
    reference = tiny_llama(seed=0, dtype=torch.float64)
    plain = tiny_llama(seed=3, dtype=torch.float64)
    packed = copy.deepcopy(plain)
    loss = padded_dpo_loss(plain, reference, groups, BETA)
    loss.backward()

    policy = as_policy(packed)
    scorer = as_policy(reference)
    total = 0.0
    for part in (groups[:3], groups[3:]):
        batch = pack(part)
        pairs = pair_logps(batch_with_fp64_reference(batch, scorer), policy.token_logps(batch))
        share = preference_loss(pairs, DPOConfig(beta=BETA)).sum() / len(groups)
        share.backward()
        total += share.item()
    assert total == pytest.approx(loss.item(), abs=1e-12)
    for (name, want), got in zip(plain.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(
            got.grad, want.grad, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def batch_with_fp64_reference(batch, scorer):
    from dataclasses import replace

    return replace(batch, ref_logps=scorer.score(batch))


def test_a_group_does_not_depend_on_its_neighbours():
    """Poison the neighbours: token 2's embedding is NaN and lies in every group but the one that is looked at."""
    groups = random_groups(5, seed=2)
    groups = [g for g in groups if not any((a == 2).any() for a in (g.prompt_ids, *g.answers))]
    policy = as_policy(tiny_llama())
    alone = policy.score(pack(groups[:1]))
    for neighbour in groups[1:]:
        neighbour.answers[0][-1] = 2
        neighbour.prompt_ids[0] = 2
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[2] = torch.nan
        head = copy.deepcopy(policy.model.get_input_embeddings().weight)
        head[2] = 0
        policy.model.lm_head.weight = torch.nn.Parameter(head)
        clean = as_policy(copy.deepcopy(policy.model))
    batch = pack([groups[1], groups[0], groups[2]])
    scores = clean.score(batch).split(batch.answer_lengths.tolist())
    assert torch.isnan(scores[0]).any()
    own = torch.cat(scores[2:4])
    assert torch.isfinite(own).all()
    torch.testing.assert_close(own, clean.score(pack(groups[:1])), rtol=0, atol=1e-5)
    assert alone.shape == own.shape


# Dynamo looks at the .grad of its inputs, and PyTorch warns of that.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_layers_are_compiled_once_for_packs_of_all_sizes():
    groups = random_groups(18, seed=9)
    plain, compiled = as_policy(tiny_llama()), as_policy(tiny_llama()).compiled(backend="eager")
    assert compiled.numerics != plain.numerics
    torch._dynamo.utils.counters.clear()
    graphs = []
    for start in range(0, 18, 3):
        batch = pack(groups[start : start + 3])
        want, got = plain.token_logps(batch), compiled.token_logps(batch)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        got.sum().backward()
        want.sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert len(set(graphs)) == 1, graphs
    for got, want in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_with_static_shapes_all_packs_have_one_size_when_compiled():
    groups = random_groups(18, seed=9)
    plain = as_policy(tiny_llama())
    sizes = []

    def backend(graph, inputs):
        traced = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        sizes.append([x.shape for x in traced if isinstance(x, torch.Tensor) and x.dim() == 3])
        assert all(isinstance(size, int) for shape in sizes[-1] for size in shape), "a size is a symbol"
        return graph

    compiled = replace(as_policy(tiny_llama()), static_tokens=256).compiled(backend=backend)
    graphs = []
    for start in range(0, 18, 3):
        batch = pack(groups[start : start + 3])
        assert compiled.padding(batch) == 256 - batch.num_tokens > 0
        want, got = plain.token_logps(batch), compiled.token_logps(batch)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        got.sum().backward()
        want.sum().backward()
        graphs.append(len(sizes))
    assert {shape[1] for shapes in sizes for shape in shapes} == {256}
    assert graphs[0] == graphs[-1] > 0
    for got, want in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_bf16_autocast_stays_near_fp32():
    groups = random_groups(4, seed=7)
    model = tiny_llama()
    use_packed_attention(model)
    exact = as_policy(model).score(pack(groups))
    half = Policy(model, device=torch.device("cpu"), bf16=True, memory_budget=2**30)
    error = (half.score(pack(groups)) - exact).abs().max().item()
    assert 0 < error < 0.5
    assert half.numerics != as_policy(model).numerics


@pytest.mark.parametrize("choose_targets", [list, masked], ids=["all", "masked"])
def test_an_architecture_that_packs_do_not_fit_is_computed_answer_by_answer(monkeypatch, caplog, choose_targets):
    """Positions that are scaled in packs alone stand for any model whose packed forward is another."""
    policy = as_policy(tiny_llama())
    groups = choose_targets(random_groups(3, seed=8))
    assert check_packed_forward(policy, groups) == Verdict(shares_prompts=True)
    right = policy.score(pack(groups))
    decoder = policy.model.get_decoder()
    plain_forward = decoder.forward

    def forward(*args, packed_layout=None, position_ids=None, **kwargs):
        if packed_layout is not None:
            position_ids = position_ids // 2
        return plain_forward(*args, packed_layout=packed_layout, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(decoder, "forward", forward)
    verdict = check_packed_forward(policy, groups)
    assert not verdict.shares_prompts
    assert verdict.reason.startswith("row ")
    assert reads_packs(policy.model), "the check changes nothing"
    fitted = with_fitting_layout(policy, groups)
    assert not fitted.shares_prompts
    assert policy.shares_prompts
    assert fitted.numerics != policy.numerics
    assert "cannot share a prompt among answers (row" in caplog.text
    torch.testing.assert_close(fitted.score(pack(groups)), right, rtol=0, atol=1e-5)


def test_a_head_that_is_another_is_refused(monkeypatch):
    policy = as_policy(tiny_llama())
    head = policy.model.lm_head.forward
    monkeypatch.setattr(policy.model.lm_head, "forward", lambda x: head(x) * 1.5)
    with pytest.raises(UserError, match="its head is not supported yet"):
        check_packed_forward(policy, random_groups(3, seed=8))


def test_a_model_that_computes_nan_is_refused():
    policy = as_policy(tiny_llama())
    policy.model.model.norm.variance_epsilon = -1e6
    with pytest.raises(UserError, match="computes nan from weights that are finite"):
        check_packed_forward(policy, random_groups(3, seed=8))


def test_a_plain_batch_on_a_packed_model_is_refused():
    policy = as_policy(tiny_llama())
    with pytest.raises(ValueError, match="set to read packs"):
        policy.model(input_ids=torch.tensor([[2, 3]]))


def test_loading_errors_name_the_option_and_the_cure(tmp_path):
    with pytest.raises(UserError, match="no model given"):
        load_tokenizer("")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        Policy.load(ModelConfig(model=str(tmp_path / "missing.gguf")))


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_encoder_decoders_are_refused(name, tmp_path):
    """Of BART transformers would load the decoder alone, without a word."""
    getattr(transformers, f"{name}Config")().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=rf"--model {tmp_path}: {name.lower()} is an encoder-decoder.*expected a causal"
    ):
        Policy.load(ModelConfig(model=str(tmp_path)))


def test_saved_model_loads_and_agrees(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "base")
    policy = Policy.load(ModelConfig(model=str(folder)))
    policy.save(tmp_path / "copy", load_tokenizer(str(folder)))
    again = Policy.load(ModelConfig(model=str(tmp_path / "copy")))
    batch = pack(random_groups(2))
    assert torch.equal(policy.score(batch), again.score(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_gets_queries_keys_and_values_of_one_dtype(dtype, autocast, monkeypatch):
    """Under autocast rotary embeddings leave queries and keys in fp32, which no fused attention takes."""
    from dpo_fast.model import attention as model_module

    seen = []

    def spy(query, key, value, *args, **kwargs):
        seen.append((query.dtype, key.dtype, value.dtype))
        return prefix_attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(model_module, "prefix_attention", spy)
    llama = tiny_llama(dtype=dtype)
    use_packed_attention(llama)
    policy = Policy(llama, device=torch.device("cpu"), bf16=autocast, memory_budget=2**30)
    batch = pack(random_groups(3))
    policy.token_logps(batch).sum().backward()
    wanted = torch.bfloat16 if autocast else dtype
    assert seen == [(wanted,) * 3] * llama.config.num_hidden_layers


def test_mixed_dtypes_become_the_values():
    """Norms of queries and keys may be in fp32 in a model of half-precision weights."""
    query, key, value = (torch.zeros(1, 2, 3, 4, dtype=x) for x in (torch.float32, torch.float32, torch.bfloat16))
    assert {x.dtype for x in _in_one_dtype(query, key, value)} == {torch.bfloat16}
