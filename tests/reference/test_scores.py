"""The reference store: content addressed, never stale, never zeros, safe against kill -9."""

import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from oracle import HELPERS, as_policy, padded_sequence_logps, random_groups, save_tiny_checkpoint, tiny_llama

from dpo_fast.config import ModelConfig
from dpo_fast.errors import UserError
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import Group
from dpo_fast.reference.fingerprint import model_fingerprint
from dpo_fast.reference.scores import Reference, score_groups
from dpo_fast.reference.store import ReferenceStore

pytestmark = pytest.mark.slow


@pytest.fixture
def store(tmp_path):
    with ReferenceStore(tmp_path / "reference.sqlite") as store:
        yield store


def one_pack(groups):
    return [list(range(len(groups)))]


def test_stored_scores_are_the_models(store):
    groups = random_groups(5)
    model = tiny_llama()
    reference = Reference(store, "model")
    assert reference.missing(groups) == [0, 1, 2, 3, 4]
    reference.fill(groups, as_policy(model).score, packs=[[0, 3], [1], [2, 4]])
    assert reference.missing(groups) == []
    exact = tiny_llama(dtype=torch.float64)
    with torch.no_grad():
        want = torch.stack([padded_sequence_logps(exact, groups, a) for a in (0, 1)], 1)
    got = [[float(a.sum()) for a in answers] for answers in reference.lookup(groups)]
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want, rtol=0, atol=1e-4)


def test_only_what_is_missing_is_scored(store):
    groups = random_groups(6)
    policy = as_policy(tiny_llama())
    reference = Reference(store, "model")
    reference.fill(groups, policy.score, packs=[[0, 1]])
    seen = []

    def score(batch):
        seen.append(batch.pair_rows)
        return policy.score(batch)

    reference.fill(groups, score, packs=[[0, 1], [2, 3], [4, 5]])
    assert seen == [(2, 3), (4, 5)]
    assert Reference(store, "another model").missing(groups) == list(range(6))


def test_a_missing_row_is_an_error_not_zeros(store):
    groups = random_groups(2)
    with pytest.raises(UserError, match="no reference scores for row 0 and 1 more"):
        Reference(store, "model").lookup(groups)


def test_one_token_more_in_prompt_or_answer_is_another_key(store):
    """The boundary counts, too: the same tokens split elsewhere are another row."""
    a, b, c = (np.array(x, dtype=np.int32) for x in ([5, 6], [7, 8], [9]))
    policy = as_policy(tiny_llama())
    reference = Reference(store, "model")
    reference.fill([Group(0, a, (b, c))], policy.score, packs=[[0]])
    moved = Group(0, np.array([5, 6, 7], dtype=np.int32), (np.array([8], dtype=np.int32), c))
    longer = Group(0, a, (np.array([7, 8, 9], dtype=np.int32), c))
    swapped = Group(9, a, (c, b))
    assert reference.missing([moved, longer, swapped]) == [0, 1]


def test_the_mask_of_scored_tokens_is_part_of_the_key(store):
    group = Group(0, np.array([5, 6], np.int32), (np.array([7, 8, 9], np.int32), np.array([10, 11], np.int32)))
    masks = [(np.array(first), None) for first in ([True, False, True], [False, True, True])]
    groups = [group, *(replace(group, scored=mask) for mask in masks)]
    reference = Reference(store, "model")
    keys = {reference._key(group, 0) for group in groups}
    assert len(keys) == 3
    assert len({reference._key(group, 1) for group in groups}) == 1
    reference.fill(groups, as_policy(tiny_llama()).score, packs=one_pack(groups))
    whole, *parts = reference.lookup(groups)
    np.testing.assert_allclose(parts[0][0], whole[0][[0, 2]], atol=1e-5)
    np.testing.assert_allclose(parts[1][0], whole[0][[1, 2]], atol=1e-5)


def test_a_row_of_the_wrong_length_is_missing(store):
    group = random_groups(1)[0]
    reference = Reference(store, "model")
    reference.fill([group], as_policy(tiny_llama()).score, packs=[[0]])
    store.put({reference._key(group, 0): np.zeros(len(group.answers[0]) + 1, np.float32)})
    assert reference.missing([group]) == [0]


def test_scores_that_are_not_finite_are_refused(store):
    groups = random_groups(2)
    with pytest.raises(UserError, match=r"row 0, answer 0: the reference.s log-prob of scored token 0 is nan"):
        Reference(store, "model").fill(groups, lambda b: torch.full((len(b.targets),), torch.nan), packs=[[0, 1]])
    assert Reference(store, "model").missing(groups) == [0, 1]


def test_verify_finds_a_changed_score(store):
    groups = random_groups(3)
    policy = as_policy(tiny_llama())
    reference = Reference(store, "model")
    reference.fill(groups, policy.score, packs=one_pack(groups))
    reference.verify(groups, policy.score, tolerance=1e-4)
    with pytest.raises(UserError, match=r"scores of row \d are not the model's: answer 0, scored token 0"):
        reference.verify(groups, lambda batch: policy.score(batch) + 0.05, tolerance=1e-3)


def test_fingerprint_sees_everything_that_moves_a_log_prob():
    def fingerprint(numerics="fp32", change=None, **config):
        model = tiny_llama()
        for name, value in config.items():
            setattr(model.config, name, value)
        if change:
            change(model)
        return model_fingerprint(model, numerics=numerics)

    def flip_one_bit(model):
        flat = model.model.layers[1].mlp.down_proj.weight.data.view(-1).view(torch.int32)
        flat[7] ^= 1

    def adapt(model):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)

    base = fingerprint()
    assert fingerprint() == base
    assert fingerprint(_name_or_path="elsewhere", use_cache=False) == base
    different = [
        fingerprint(numerics="bf16"),
        fingerprint(change=flip_one_bit),
        fingerprint(change=lambda model: model.to(torch.bfloat16)),
        fingerprint(change=adapt),
        fingerprint(rms_norm_eps=1e-5),
        fingerprint(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        fingerprint(num_attention_heads=8),
    ]
    assert len({base, *different}) == 8


def test_fingerprint_does_not_depend_on_the_folder(tmp_path):
    one = Policy.load(ModelConfig(model=str(save_tiny_checkpoint(tmp_path / "one"))))
    two = Policy.load(ModelConfig(model=str(save_tiny_checkpoint(tmp_path / "two"))))
    other = Policy.load(ModelConfig(model=str(save_tiny_checkpoint(tmp_path / "other", seed=1))))
    prints = [model_fingerprint(p.model, numerics=p.numerics) for p in (one, two, other)]
    assert prints[0] == prints[1] != prints[2]


KILLED = """
import sys, time
from pathlib import Path
from oracle import HELPERS, as_policy, random_groups, tiny_llama
from dpo_fast.reference.scores import Reference
from dpo_fast.reference.store import ReferenceStore

policy = as_policy(tiny_llama())
def score(batch):
    time.sleep(0.02)
    return policy.score(batch)
groups = random_groups(200)
with ReferenceStore(Path(sys.argv[1])) as store:
    Reference(store, "model").fill(
        groups, score, packs=[[i] for i in range(200)], progress=lambda n: print(n, flush=True)
    )
"""


def test_sigkill_while_scoring_loses_nothing_that_was_committed(tmp_path):
    path = tmp_path / "reference.sqlite"
    command = [sys.executable, "-c", KILLED, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HELPERS)
    for _ in range(5):
        process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    committed = 5 + len(rest.split())
    assert committed < 200
    groups = random_groups(200)
    policy = as_policy(tiny_llama())
    with ReferenceStore(path) as store:
        reference = Reference(store, "model")
        missing = reference.missing(groups)
        assert missing == list(range(200 - len(missing), 200))
        assert 200 - len(missing) >= committed
        reference.verify(groups, policy.score, tolerance=1e-5, sample=20)
        reference.fill(groups, policy.score, packs=[[i] for i in range(200)])
        got = reference.lookup(groups)
    for group, answers in zip(groups[::20], got[::20], strict=True):
        (want,) = score_groups([group], policy.score)
        for a, b in zip(answers, want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_two_processes_may_fill_one_store(tmp_path):
    path = tmp_path / "reference.sqlite"
    command = [sys.executable, "-c", KILLED.replace("0.02", "0"), str(path)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=HELPERS) for _ in range(2)]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    with ReferenceStore(path) as store:
        assert Reference(store, "model").missing(random_groups(200)) == []


def test_a_file_that_is_no_store_is_refused(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a database at all, " * 100)
    with pytest.raises(UserError, match="--reference_store"):
        ReferenceStore(text)
    foreign = tmp_path / "foreign.sqlite"
    with closing(sqlite3.connect(foreign)) as connection, connection:
        connection.execute("create table other (x)")
    with pytest.raises(UserError, match="not a reference store of this version"):
        ReferenceStore(foreign)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        ReferenceStore(tmp_path / "file" / "reference.sqlite")


def test_a_store_of_another_version_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "old.sqlite"
    ReferenceStore(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("pragma user_version = 1")
    with pytest.raises(UserError, match="schema 1, expected 3: remove it"):
        ReferenceStore(path)
    assert path.exists()


def test_a_value_that_is_there_stays_and_one_of_another_length_is_replaced(store):
    key = b"k" * 16
    for logps in ([-1.0, -2.0], [-3.0, -4.0], [-5.0]):
        store.put({key: np.array(logps, dtype=np.float32)})
        assert store.get([key])[key].tolist() == ([-5.0] if len(logps) == 1 else [-1.0, -2.0])


@pytest.mark.parametrize("damage", [b"", b"abc", np.full(1, 7, "<f4").tobytes()])
def test_damaged_values_count_as_missing(store, damage):
    groups = random_groups(2)
    reference = Reference(store, "model")
    policy = as_policy(tiny_llama())
    reference.fill(groups, policy.score, packs=one_pack(groups))
    with closing(sqlite3.connect(store.path)) as connection, connection:
        connection.execute("update answers set logps = ?", (damage,))
    assert reference.missing(groups) == [0, 1]
    reference.fill(groups, policy.score, packs=one_pack(groups))
    assert reference.missing(groups) == []
