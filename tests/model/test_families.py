"""Shared-prompt packs on the model families that people use, against each model's own forward, answer by answer."""

import copy
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch
from chat_templates import family_tokenizer
from families import COMMON, FAMILIES, ONE_BY_ONE, gradients, make, settings_of
from inference_rows import REFUSED, ROWS, SETTINGS, expected_causes, runs
from oracle import random_groups
from preference_rows import load

from dpo_fast.model.attention import CannotPack, use_own_attention, use_packed_attention
from dpo_fast.model.check import with_fitting_layout
from dpo_fast.model.load import load_model
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import Group, Ranking, pack

pytestmark = pytest.mark.slow


def as_policy(model):
    use_packed_attention(model)
    return Policy(model, device=torch.device("cpu"), memory_budget=2**30)


def own_logps(model, groups):
    """Log-probs of all answers by the model's own eager forward, one unpadded sequence at a time."""
    model.set_attn_implementation("eager")
    parts = []
    for group in groups:
        for answer in group.answers:
            ids = torch.tensor([[*group.prompt_ids, *answer]])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
            parts.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[-len(answer) :, 0])
    return torch.cat(parts)


@pytest.fixture(params=FAMILIES)
def family(request):
    return make(request.param, settings_of(request.param))


def test_packed_is_the_models_own_forward_and_backward(family):
    groups = random_groups(5, seed=3, num_answers=3)
    want = own_logps(family, groups)
    true_grads = gradients(want, family)
    policy = as_policy(family)
    got = policy.token_logps(pack(groups))
    assert (got - want).abs().max() < 1e-4
    assert want.min() < -6.5, "the model is all but uniform, so that nothing would show"
    grads = gradients(got, family)
    assert grads.keys() == true_grads.keys()
    for name, true in true_grads.items():
        # The bias of keys has no gradient but rounding: what is added to all keys changes no softmax.
        assert (grads[name] - true).norm() <= 1e-5 * true.norm() + 2e-6, name


def test_a_groups_result_depends_on_nothing_else_in_the_pack(family):
    """In other orders, beside other neighbours, and beside neighbours whose tokens have embeddings of NaN."""
    if any("num_experts" in key or "num_local_experts" in key for key in family.config.to_dict()):
        poison = 1.0  # NaN reaches the others through the sorting of tokens by expert, in the model's own code
    else:
        poison = torch.nan
    groups = [g for g in random_groups(6, seed=5) if not any((a == 2).any() for a in (g.prompt_ids, *g.answers))]
    policy = as_policy(family)
    alone = [policy.score(pack([group])) for group in groups]
    order = [2, 0, 3, 1]
    batch = pack([groups[i] for i in order])
    scores = policy.score(batch).split(batch.answer_lengths.tolist())
    for place, i in enumerate(order):
        torch.testing.assert_close(torch.cat(scores[2 * place : 2 * place + 2]), alone[i], rtol=0, atol=1e-5)
    bad = Group(9, groups[1].prompt_ids.copy(), tuple(a.copy() for a in groups[1].answers))
    bad.prompt_ids[-1] = bad.answers[0][-1] = 2
    embedding = family.get_input_embeddings()
    head = copy.deepcopy(family.get_output_embeddings())  # untied: its row 2 stays finite
    with torch.no_grad():
        embedding.weight[2] = poison
    family.set_output_embeddings(head)
    batch = pack([bad, groups[0], bad])
    scores = policy.score(batch).split(batch.answer_lengths.tolist())
    torch.testing.assert_close(torch.cat(scores[2:4]), alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family_name", ONE_BY_ONE)
def test_models_that_share_no_prompt_compute_each_answer_with_its_own(family_name, caplog):
    model = make(family_name, ONE_BY_ONE[family_name])
    groups = random_groups(3, seed=3)
    want = own_logps(model, groups).detach()
    policy = with_fitting_layout(as_policy(model), groups)
    assert not policy.shares_prompts
    assert "cannot share a prompt among answers" in caplog.text
    got = policy.token_logps(pack(groups))
    assert (got - want).abs().max() < 1e-4
    got.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_only_long_rows_would_show_is_seen_at_the_start(caplog):
    """Llama 4 cuts attention into chunks by a mask that packs do not have; rows that fit in a chunk look the same."""
    model = make("Llama4Text", {**COMMON, **FAMILIES["Llama4Text"], "attention_chunk_size": 40})
    rng = np.random.default_rng(0)
    fits, cut = (
        Group(
            row,
            *[rng.integers(2, 320, n).astype(np.int32) for n in (prompt,)],
            tuple(rng.integers(2, 320, (3, 12)).astype(np.int32)),
        )
        for row, prompt in enumerate((28, 50))
    )
    policy = with_fitting_layout(as_policy(model), [fits])
    assert policy.shares_prompts
    assert (policy.score(pack([cut])) - own_logps(model, [cut]).detach()).abs().max() > 0.1
    policy = with_fitting_layout(as_policy(model), [fits, cut])
    assert not policy.shares_prompts
    assert "row 1 differs by" in caplog.text
    assert (policy.score(pack([fits, cut])) - own_logps(model, [fits, cut]).detach()).abs().max() < 1e-4


def test_a_model_that_masks_by_itself_shares_no_prompt(caplog):
    model = make("Llama", COMMON)
    attention = model.model.layers[0].self_attn
    plain_forward = attention.forward
    attention.forward = lambda *args, attention_mask=None, **kwargs: plain_forward(
        *args, attention_mask=torch.zeros(1) if attention_mask is None else attention_mask, **kwargs
    )
    policy = as_policy(model)
    with pytest.raises(CannotPack, match="LlamaAttention masks its attention by itself"):
        policy.score(pack(random_groups(1)))


@pytest.mark.parametrize(("family_name", "attribute"), [("OPT", "dropout"), ("GPT2", "resid_pdrop")])
def test_nothing_drops_out_in_training(family_name, attribute, tmp_path):
    """OPT has a number and a function where GPT-2 has modules."""
    own = {"vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"}
    base = {name: COMMON[name] for name in own} if family_name == "GPT2" else COMMON
    make(family_name, {**base, **FAMILIES[family_name], attribute: 0.5}).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), torch.float32)
    policy = as_policy(model)
    batch = pack(random_groups(2))
    want = policy.score(batch)
    policy.set_trainable()
    assert torch.equal(policy.score(batch), want)


@pytest.mark.parametrize("family_name", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "GptOss"])
def test_router_loss_is_the_models_own(family_name):
    settings = {**COMMON, **FAMILIES[family_name], "output_router_logits": True, "router_aux_loss_coef": 0.3}
    model = make(family_name, settings)
    # One prompt with one answer is one sequence, so the model's own statistics are over the same tokens.
    (group,) = random_groups(1, seed=4, num_answers=1)
    group = Group(0, group.prompt_ids, group.answers, Ranking(pairs=()))
    ids = torch.tensor([[*group.prompt_ids, *group.answers[0]]])
    want = 0.3 * model(input_ids=ids, output_router_logits=True, use_cache=False).aux_loss
    policy = as_policy(model)
    for shares_prompts in (True, False):
        if not shares_prompts:
            use_own_attention(model)
        got = replace(policy, shares_prompts=shares_prompts).forward(pack([group])).router_loss
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        assert got.requires_grad
    use_packed_attention(model)
    filled = replace(policy, static_tokens=100)
    torch.testing.assert_close(filled.forward(pack([group])).router_loss, want, rtol=1e-5, atol=1e-7)
    assert replace(policy, router_loss_coef=0.0).forward(pack([group])).router_loss is None


def test_llama_4_with_temperatures_is_computed_answer_by_answer():
    """Its layers without rotary positions scale queries by their place in the pack."""
    tuned = {"no_rope_layers": [1, 0], "attn_temperature_tuning": True, "floor_scale": 8, "attn_scale": 0.3}
    model = make("Llama4Text", settings_of("Llama4Text") | tuned)
    groups = random_groups(4)
    want = own_logps(copy.deepcopy(model), groups)
    packed = as_policy(model)
    assert (packed.score(pack(groups)) - want).abs().max() > 1e-3
    careful = with_fitting_layout(packed, groups)
    assert not careful.shares_prompts
    torch.testing.assert_close(careful.score(pack(groups)).double(), want, rtol=0, atol=1e-4)


TEMPLATES = dict(zip(FAMILIES, cycle(SETTINGS), strict=False))


@pytest.mark.parametrize("name", FAMILIES)
def test_rendered_rows_are_scored_as_at_inference(name, tmp_path):
    """Rows of all kinds by a published template, in one pack: each turn as the model reads it alone at inference."""
    template, kwargs = TEMPLATES[name]
    tokenizer = family_tokenizer(template)
    kinds = [k for k in ROWS if (template, k) not in REFUSED and not expected_causes(template, kwargs, k)]
    kinds = kinds or ["single"]  # DeepSeek's template renders no row as inference does, and each row says so
    rows = [ROWS[kind] | {"chat_template_kwargs": kwargs} for kind in kinds]
    groups, report = load(tmp_path, rows, tokenizer, max_length=None)
    assert len(groups) == len(rows)
    model = make(name, settings_of(name) | {"vocab_size": len(tokenizer) + 3})
    batch = pack(groups)
    with torch.no_grad():
        parts = iter(as_policy(copy.deepcopy(model)).token_logps(batch).split(batch.answer_lengths.tolist()))
        for group, row in zip(groups, rows, strict=True):
            for number, answer in enumerate((row["chosen"], row["rejected"])):
                stretches = runs(group, number)
                want = [inference_logps(model, *stretch) for stretch in stretches]
                torch.testing.assert_close(next(parts).double(), torch.cat(want), rtol=0, atol=2e-5)
                if template == "deepseek":
                    assert "differs_from_inference" in report.causes
                    continue
                turns = [*row["prompt"], *answer]
                options = {"tools": row.get("tools"), "tokenize": False, **kwargs}
                last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
                before = tokenizer.apply_chat_template(turns[:last], add_generation_prompt=True, **options)
                whole = tokenizer.apply_chat_template(turns[: last + 1], **options)
                context, scored = stretches[-1]
                assert context == tokenizer(before, add_special_tokens=False).input_ids
                assert tokenizer.decode([*context, *scored]) == whole


def inference_logps(model, context, scored):
    """Log-probs of the tokens that a model would write after a context, by its own eager forward."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([[*context, *scored]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, ids[0, len(context) :, None])[:, 0]


@pytest.mark.parametrize("name", [*FAMILIES, *ONE_BY_ONE])
@pytest.mark.filterwarnings("ignore")
def test_a_saved_model_loads_whole(name, tmp_path):
    """Tied heads and buffers that files lack are no missing weights."""
    model = make(name, settings_of(name))
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), torch.float32)
    for (key, want), got in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(want, got), key
