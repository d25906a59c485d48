"""Rotary frequencies that depend on a row's length: the truth is transformers, a fresh model for every row."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from oracle import save_tiny_checkpoint
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PhimoeConfig, PhimoeForCausalLM

from dpo_fast.analysis.score import score
from dpo_fast.config import DPOConfig, ScoreConfig
from dpo_fast.model.attention import use_packed_attention
from dpo_fast.model.check import check_packed_forward, with_fitting_layout
from dpo_fast.model.policy import Policy
from dpo_fast.model.rotary import LengthRegimes
from dpo_fast.packs.layout import Group, pack
from dpo_fast.training.run import train

THRESHOLD = 16
SHAPE = {
    **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
MSCALE = {"original_max_position_embeddings": THRESHOLD, "short_mscale": 1.1, "long_mscale": 1.3}


def phi3():
    lengths = {"max_position_embeddings": 512, "original_max_position_embeddings": THRESHOLD}
    return Phi3ForCausalLM(Phi3Config(**SHAPE, **lengths, rope_parameters=dict(LONGROPE)))


def phimoe():
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2, "max_position_embeddings": 512}
    return PhimoeForCausalLM(PhimoeConfig(**SHAPE, **experts, rope_parameters=LONGROPE | MSCALE))


def dynamic():
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=THRESHOLD, rope_parameters=scaling))


MODELS = {"longrope": phi3, "longrope with scales": phimoe, "dynamic": dynamic}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    made = MODELS[request.param]().eval()
    return made if request.param == "longrope with scales" else made.double()  # experts know no fp64


def group(row, prompt, *answers):
    ids = np.random.default_rng(row).integers(2, 320, prompt + sum(answers)).astype(np.int32)
    parts = np.split(ids, np.cumsum([prompt, *answers])[:-1])
    return Group(row, parts[0], tuple(parts[1:]))


# Short, both sides within a prompt, long, exactly at the threshold, far beyond it, in the order that shows a memory.
GROUPS = [group(0, 4, 5, 6), group(1, 8, 3, 20), group(2, 18, 3, 9), group(3, 10, 6, 6), group(4, 30, 40, 9)]


def plain_logps(model, one, answer):
    """By the model's own eager forward."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([[*one.prompt_ids, *answer]])
    logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None])[-len(answer) :, 0]


def fresh_logps(model, groups):
    """Each answer by a model that has seen nothing yet."""
    return torch.cat([plain_logps(copy.deepcopy(model), one, answer) for one in groups for answer in one.answers])


def as_policy(model):
    model = copy.deepcopy(model)
    use_packed_attention(model)
    return Policy(model, device=torch.device("cpu"), memory_budget=2**30)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 0], [2, 4], [3, 0], [1]], ids=str)
def test_every_row_counts_by_its_own_length(model, order):
    groups = [GROUPS[i] for i in order]
    policy = as_policy(model)
    want = fresh_logps(model, groups)
    for _ in range(2):  # the second time the model has seen long rows
        got = policy.token_logps(pack(groups))
        torch.testing.assert_close(got.to(want.dtype), want, rtol=0, atol=1e-5)
    apart = torch.cat([policy.score(pack([one])) for one in groups])
    torch.testing.assert_close(apart, got, rtol=0, atol=1e-5)


def test_gradients_are_those_of_single_rows(model):
    policy, plain = as_policy(model), copy.deepcopy(model)
    weights = torch.linspace(-1, 2, sum(len(a) for one in GROUPS for a in one.answers), dtype=torch.float64)
    (policy.token_logps(pack(GROUPS)) * weights).sum().backward()
    start = 0
    for one in GROUPS:
        for answer in one.answers:
            single = copy.deepcopy(model)
            own = weights[start : (start := start + len(answer))]
            (plain_logps(single, one, answer) * own).sum().backward()
            for parameter, part in zip(plain.parameters(), single.parameters(), strict=True):
                parameter.grad = part.grad if parameter.grad is None else parameter.grad + part.grad
    for got, want in zip(policy.model.parameters(), plain.parameters(), strict=True):
        # The rounding of fp32 log-probs, and of an fp32 model.
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5 if want.dtype is torch.float64 else 1e-4)


def test_the_check_at_start_sees_what_one_group_does_not(model, monkeypatch, caplog):
    """Without regimes, a pack of rows on both sides of the threshold gives it away."""
    policy = as_policy(model.float())
    assert check_packed_forward(policy, GROUPS).shares_prompts
    monkeypatch.setattr(LengthRegimes, "of_length", lambda self, length: 0)
    with caplog.at_level(logging.WARNING, "dpo_fast"):
        careful = with_fitting_layout(policy, GROUPS)
    assert not careful.shares_prompts
    assert "each answer is computed with its own copy" in caplog.text
    got = careful.score(pack(GROUPS))
    torch.testing.assert_close(got, fresh_logps(model, GROUPS), rtol=0, atol=1e-4)


def test_ordinary_models_have_no_regimes():
    assert LengthRegimes.of(LlamaForCausalLM(LlamaConfig(**SHAPE))) is None
    assert "lengths apart" in as_policy(phi3()).numerics


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_store_of_short_rows_serves_a_run_with_long_ones(kind, tmp_path):
    """At learning rate 0 all margins are 0, whatever shares a pack."""
    folder = save_tiny_checkpoint(tmp_path / "m")
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(folder)
    words = "the cat sat on the mat and " * 12
    rows = [
        {"prompt": words[:n], "chosen": words[: n + 9], "rejected": words[: 2 * n + 3]} for n in (3, 4, 60, 5, 90, 8)
    ]
    short, everything = tmp_path / "short.jsonl", tmp_path / "all.jsonl"
    short.write_text("".join(json.dumps(row) + "\n" for row in rows if len(row["prompt"]) < 9))
    everything.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": str(folder), "reference_store": str(tmp_path / "store.sqlite"), "max_length": 512}
    console = Console(quiet=True)
    score(ScoreConfig(**settings, data=str(short), out=str(tmp_path / "scores.jsonl")), console=console)
    run = {"learning_rate": 0.0, "max_steps": 3, "per_device_train_batch_size": 3, "logging_steps": 1}
    result = train(
        DPOConfig(**settings, **run, data=str(everything), output_dir=str(tmp_path / "run")), console=console
    )
    assert len(result.metrics) == 3
    for row in result.metrics:
        assert abs(row["rewards/margins"]) < 1e-4
        assert row["loss"] == pytest.approx(np.log(2), abs=1e-4)
