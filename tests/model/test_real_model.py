"""The real model on real rows: SmolLM2-135M-Instruct and UltraFeedback.

`python benchmarks/smollm2.py FOLDER` makes the model; the tests find it by `DPO_FAST_TEST_MODEL=FOLDER`. The rows lie
in `shared/data` beside the checkout.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_fast.config import DPOConfig
from dpo_fast.data.load import load_groups
from dpo_fast.model.load import load_tokenizer
from dpo_fast.model.policy import Policy
from dpo_fast.packs.bins import best_fit_decreasing
from dpo_fast.packs.layout import pack
from dpo_fast.reference.scores import score_groups

MODEL = os.environ.get("DPO_FAST_TEST_MODEL", "")
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "ultrafeedback_500.jsonl"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL, reason="DPO_FAST_TEST_MODEL is not set: no SmolLM2 here (benchmarks/smollm2.py)"),
    pytest.mark.skipif(not DATA.exists(), reason=f"no {DATA.name} in shared/data beside the checkout"),
]


@pytest.fixture(scope="module")
def scored():
    """Groups, the policy, and the sums of an unpacked, unpadded forward with an fp64 log-softmax."""
    config = DPOConfig(model=MODEL, data=str(DATA), max_length=512, max_rows=4)
    groups, _ = load_groups(config, load_tokenizer(MODEL))
    policy = Policy.load(config)
    policy.model.set_attn_implementation("sdpa")
    sums = []
    for group in groups:
        for answer in group.answers:
            ids = torch.tensor([*group.prompt_ids, *answer])
            with torch.no_grad():
                logits = policy.model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
            logps = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            sums.append(logps[-len(answer) :].sum().item())
    policy.model.set_attn_implementation("dpo_fast_packed")
    return groups, policy, np.array(sums).reshape(-1, 2)


@pytest.mark.parametrize(("budget", "seed"), [(1, None), (1500, 1), (10**6, 2)])
def test_log_probs_are_exact_in_every_order_and_token_budget(scored, budget, seed):
    groups, policy, want = scored
    order = np.arange(len(groups)) if seed is None else np.random.default_rng(seed).permutation(len(groups))
    got = np.zeros_like(want)
    for packed in best_fit_decreasing([groups[i].num_tokens for i in order], budget):
        members = [order[i] for i in packed]
        for i, answers in zip(members, score_groups([groups[i] for i in members], policy.score), strict=True):
            got[i] = [a.astype(np.float64).sum() for a in answers]
    error = np.abs(got - want).max()
    print(f"budget {budget}, order {order.tolist()}: largest error {error:.2g} nats, sums down to {want.min():.0f}")
    assert error < 2e-4


def test_a_token_spans_no_boundary(scored):
    """Prompt + answer is the tokenization of the whole text, token for token."""
    import json

    groups, _, _ = scored
    tokenizer = load_tokenizer(MODEL)
    rows = [json.loads(line) for line in DATA.read_text().splitlines()[:4]]
    for group in groups:
        row = rows[group.row]
        for answer, side in zip(group.answers, ("chosen", "rejected"), strict=True):
            whole = [*tokenizer(row["prompt"] + row[side])["input_ids"], tokenizer.eos_token_id]
            assert [*group.prompt_ids, *answer] == whole[:512]
    assert pack(groups).num_tokens < sum(group.num_unshared_tokens for group in groups)
