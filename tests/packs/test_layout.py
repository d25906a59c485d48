"""The packed layout, by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import random_groups
from trl_oracle import trl_token_loss

from dpo_fast.config import LossConfig
from dpo_fast.losses.from_packs import pair_logps
from dpo_fast.losses.objective import preference_loss
from dpo_fast.packs.layout import Group, Ranking, pack
from dpo_fast.reference.scores import StoredScores


def ids(*values):
    return np.array(values, dtype=np.int32)


def test_layout_of_the_module_docstring():
    first = Group(0, ids(10, 11, 12, 13), (ids(20, 21, 22), ids(30, 31)))
    second = Group(7, ids(40, 41, 42), (ids(50, 51), ids(60, 61, 62)))
    batch = pack([first, second])
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 20, 21, 22, 30, 31, 40, 41, 42, 50, 51, 60, 61, 62]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 3, 4, 3, 4, 5]
    assert batch.cu_seqlens_q.tolist() == [0, 4, 7, 9, 12, 14, 17]
    assert batch.cu_seqlens_k.tolist() == [0, 4, 11, 17, 20, 25, 31]
    assert batch.kv_index[11:17].tolist() == [0, 1, 2, 3, 7, 8]
    assert batch.hidden_index.tolist() == [3, 4, 5, 3, 7, 11, 12, 11, 14, 15]
    assert batch.targets.tolist() == [20, 21, 22, 30, 31, 50, 51, 60, 61, 62]
    assert batch.cu_answers.tolist() == [0, 3, 5, 7, 10]
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 2], [1, 3])
    assert batch.pair_rows == (0, 7)
    assert (first.num_tokens, first.num_unshared_tokens) == (9, 13)


def test_an_answer_without_a_prompt_does_not_score_its_first_token():
    batch = pack([Group(0, ids(), (ids(5, 6), ids(7)))])
    assert batch.targets.tolist() == [6]
    assert batch.hidden_index.tolist() == [0]
    assert batch.cu_answers.tolist() == [0, 1, 1]
    assert batch.cu_seqlens_q.tolist() == batch.cu_seqlens_k.tolist() == [0, 2, 3]


def scored(groups, answers):
    batch = pack(groups)
    return replace(batch, ref_logps=StoredScores(groups, answers).score(batch))


def test_only_scored_tokens_are_targets():
    """The row before a target may hold a token that is none: hidden states come from the whole answer."""
    masks = (np.array([True, False, False, True]), None)
    batch = pack([Group(0, ids(1, 2), (ids(20, 21, 22, 23), ids(30, 31)), scored=masks)])
    assert batch.input_ids.tolist() == [1, 2, 20, 21, 22, 23, 30, 31]
    assert batch.targets.tolist() == [20, 23, 30, 31]
    assert batch.hidden_index.tolist() == [1, 4, 1, 6]
    assert batch.answer_lengths.tolist() == [2, 2]
    assert batch.num_pair_tokens == 4
    no_prompt = pack([Group(0, ids(), (ids(20, 21, 22, 23), ids(30, 31)), scored=masks)])
    assert (no_prompt.targets.tolist(), no_prompt.hidden_index.tolist()) == ([23, 31], [2, 4])


def test_pairs_of_a_larger_group_share_their_answers():
    group = Group(3, ids(1), (ids(2), ids(3), ids(4)), Ranking(((2, 0), (0, 1))))
    reference = [tuple(np.array([v], dtype=np.float32) for v in (-1.0, -2.0, -3.0))]
    batch = scored([group], reference)
    pairs = pair_logps(batch, torch.tensor([-0.5, -0.25, -0.125]))
    assert pairs.chosen.tolist() == [-0.125, -0.5]
    assert pairs.rejected.tolist() == [-0.5, -0.25]
    assert pairs.ref_chosen.tolist() == [-3.0, -1.0]
    assert batch.pair_rows == (3, 3)


def test_reference_of_another_length_is_refused():
    group = Group(0, ids(1), (ids(2, 3), ids(4)))
    with pytest.raises(AssertionError, match="one reference log-prob"):
        scored([group], [(np.zeros(1, np.float32), np.zeros(1, np.float32))])


@pytest.mark.parametrize("options", [{"ld_alpha": 0.3}, {"ld_alpha": 0.0}, {"use_weighting": True}], ids=str)
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "nca_pair"])
def test_length_desensitised_and_weighted_losses_are_trls(options, loss_type):
    """LD-DPO and WPO read tokens, so TRL gets the very tokens that the pack has."""
    config = LossConfig(loss_type=loss_type, **options)
    groups = random_groups(5, seed=2)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[len(a) for a in group.answers] for group in groups])
    num = int(lengths.sum())
    logps, ref = (-3 * torch.rand(num, generator=generator) for _ in range(2))
    log_sum_p2 = -torch.rand(num, generator=generator)
    parts = iter(ref.split(lengths.flatten().tolist()))
    batch = scored(groups, [tuple(next(parts).numpy() for _ in group.answers) for group in groups])

    def padded(tokens):
        answers = tokens.split(lengths.flatten().tolist())
        return torch.nn.utils.rnn.pad_sequence(answers[0::2] + answers[1::2], batch_first=True)

    tail = 1.0 if config.ld_alpha is None else config.ld_alpha
    shared = lengths.min(1).values.repeat(2)
    ref_sums = [(r[:s].sum() + tail * r[s:].sum()) for r, s in zip(padded(ref), shared, strict=True)]
    want = trl_token_loss(
        padded(logps),
        lengths.T.flatten(),
        *torch.stack(ref_sums).chunk(2),
        config,
        log_sum_sq=padded(log_sum_p2),
    )
    pairs = pair_logps(batch, logps, ld_alpha=config.ld_alpha, log_sum_p2=log_sum_p2 if config.use_weighting else None)
    torch.testing.assert_close(preference_loss(pairs, config).mean(), want, rtol=1e-6, atol=1e-6)


def test_an_answer_in_two_pairs_is_cut_at_each_partners_length():
    group = Group(0, ids(1), (ids(2, 3, 4), ids(5), ids(6, 7)), Ranking(((0, 1), (2, 0))))
    logps = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], requires_grad=True)
    pairs = pair_logps(pack([group]), logps, ld_alpha=0.5)
    assert pairs.chosen.tolist() == [1 + 0.5 * (2 + 4), 48]
    assert pairs.rejected.tolist() == [8, 1 + 2 + 0.5 * 4]
    (pairs.chosen.sum() + pairs.rejected.sum()).backward()
    assert logps.grad.tolist() == [2, 1.5, 1, 1, 1, 1]


def test_a_pack_goes_to_a_gpu_from_pinned_memory(monkeypatch):
    """A copy of pageable memory would wait for the GPU."""
    batch = pack(random_groups(2))
    pinned, copied = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: copied.append(non_blocking) or self)
    batch.to("cuda")
    assert len(pinned) == len(copied) > 6
    assert all(copied)
    batch.to("cpu")
    assert len(pinned) * 2 == len(copied)
