"""The loss of a step: the same loss and gradient however its pairs are cut into packs."""

import copy
from dataclasses import replace

import pytest
import torch
from oracle import as_policy, random_groups, tiny_llama

from dpo_fast.config import DPOConfig
from dpo_fast.packs.layout import Group, Ranking, pack
from dpo_fast.reference.scores import StoredScores
from dpo_fast.training.step import PairSet, StepLoss

BETA = 0.3


def reference_set(groups, reference):
    """The groups with per-token log-probs of `reference`, from packs of one group each."""
    policy = as_policy(copy.deepcopy(reference))
    scores = []
    for group in groups:
        batch = pack([group])
        scores.append(tuple(x.numpy() for x in policy.score(batch).split(batch.answer_lengths.tolist())))
    return PairSet(groups, StoredScores(groups, scores))


def step(policy, config, batches, num_pairs):
    """(len(PAIR_METRICS), P) of a step; its gradient is in the model."""
    return torch.cat([metrics for _, metrics in StepLoss(policy, config).backward(batches, num_pairs)], 1)


def test_all_pairs_of_a_group_are_those_of_groups_of_two():
    """Three answers in one group, three pairs, against three groups of two answers: equal loss and gradient."""
    (three,) = random_groups(1, seed=4, num_answers=3)
    pairs = ((0, 1), (2, 0), (2, 1))
    together = Group(0, three.prompt_ids, three.answers, Ranking(pairs))
    apart = [Group(i, three.prompt_ids, (three.answers[a], three.answers[b])) for i, (a, b) in enumerate(pairs)]
    found = []
    for groups in ([together], apart):
        policy = as_policy(tiny_llama(seed=5))
        data = reference_set(groups, tiny_llama(seed=6))
        metrics = step(policy, DPOConfig(beta=BETA), [data.pack(list(range(len(groups))))], num_pairs=3)
        found.append((metrics, [p.grad for p in policy.model.parameters()]))
    (metrics, grads), (other_metrics, other_grads) = found
    torch.testing.assert_close(metrics, other_metrics, rtol=1e-4, atol=1e-5)
    for grad, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


LOSSES = {
    "DPO": {},
    "WPO": {"use_weighting": True},
    "AOT": {"loss_type": "aot", "label_smoothing": 0.1},
    "AOT, unpaired": {"loss_type": "aot_unpaired"},
    "KTO and TRL's SFT": {"loss_type": ["kto", "sft_tokens"], "loss_weights": [1.0, 0.5], "use_weighting": True},
    "TPO and KTO": {"loss_type": ["tpo", "kto"]},
}


@pytest.mark.parametrize("settings", LOSSES.values(), ids=LOSSES)
def test_packs_do_not_change_a_steps_loss_and_gradient(settings):
    """Not even if the loss compares the step's pairs with each other."""
    groups = random_groups(8, seed=4, num_answers=3)
    weight = 1.0 if "aot" in str(settings) else 0.5
    groups = [replace(group, ranking=Ranking(((0, 1),), weight=weight, gold=2)) for group in groups]
    start = tiny_llama(seed=5)
    pairs = reference_set(groups, tiny_llama(seed=6))
    config = DPOConfig(beta=BETA, **settings)
    found = []
    for packs in ([list(range(8))], [[i] for i in range(8)], [[7, 2, 1], [0, 3, 4, 5, 6]]):
        policy = as_policy(copy.deepcopy(start))
        metrics = step(policy, config, [pairs.pack(packed) for packed in packs], num_pairs=8)
        evaluated = torch.cat(list(StepLoss(policy, config).metrics(pairs.pack(packed) for packed in packs)), 1)
        torch.testing.assert_close(evaluated, metrics, rtol=1e-5, atol=1e-5)
        found.append((metrics[0].mean().item(), [p.grad for p in policy.model.parameters()]))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        for got, want in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient():
    groups = random_groups(3, seed=4)
    pairs = reference_set(groups, tiny_llama(seed=6))
    grads = []
    for checkpointing in (False, True):
        policy = as_policy(tiny_llama(seed=5))
        policy.set_trainable(checkpointing="full" if checkpointing else "none")
        step(policy, DPOConfig(), [pairs.pack([0, 1, 2])], num_pairs=3)
        grads.append([p.grad for p in policy.model.parameters()])
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)
