"""The default token budget of a pack: a rule of device, memory and rows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError
from dpo_fast.packs.budget import token_budget
from dpo_fast.packs.layout import Group

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def group(num_tokens):
    ids = np.zeros(num_tokens, dtype=np.int32)
    return Group(0, ids[2:], (ids[:1], ids[:1]))


def budget(*lengths, pairs=8, device=CPU, **settings):
    return token_budget(DPOConfig(**settings), [group(length) for length in lengths], pairs=pairs, device=device)


@pytest.mark.parametrize("pairs", [1, 8, 32])
def test_memory_does_not_grow_with_the_pairs_of_a_step(pairs):
    assert budget(100, 1800, pairs=pairs, max_length=1024) == 2048


def test_few_short_pairs_need_less():
    assert budget(100, pairs=2, max_length=256) == 1024
    assert budget(100, pairs=2, max_length=None) == 200


def test_the_longest_row_fits():
    assert budget(100, 5000, max_length=4096) == 5000


@pytest.mark.parametrize(("gib", "want"), [(16, 2048), (24, 3072), (40, 5120), (64, 8192), (80, 8192), (141, 8192)])
def test_a_small_gpu_gets_less(gib, want, monkeypatch):
    properties = SimpleNamespace(total_memory=gib * 2**30 + 5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert budget(100, pairs=16, max_length=1024, device=GPU) == want


def test_what_is_asked_for_is_given():
    assert budget(5000, max_tokens_per_batch=17) == 17
    with pytest.raises(UserError, match="--max_tokens_per_batch 0: expected a number above 0"):
        budget(10, max_tokens_per_batch=0)
