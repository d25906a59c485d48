"""Figures between two reports, on packs of known size."""

import numpy as np
import pytest
import torch

from dpo_fast.packs.layout import Group, pack
from dpo_fast.training.metrics import PAIR_METRICS, Window


def batch_of(num_tokens):
    """One pair of `num_tokens` tokens in all."""
    prompt, answer = np.arange(num_tokens - 2, dtype=np.int32), np.zeros(1, dtype=np.int32)
    return pack([Group(0, prompt, (answer, answer + 1))])


def test_fill_is_tokens_over_room():
    window = Window(max_tokens=10)
    for num_tokens in (10, 5, 20):  # full, half full, and a group above the budget: a full pack of its own
        window.add(batch_of(num_tokens), torch.zeros(len(PAIR_METRICS), 1))
    assert window.read()["pack_fill"] == pytest.approx(35 / 40)
