"""Figures between two reports, on packs of known size."""

import numpy as np
import pytest
import torch

from dpo_fast.losses.pairs import PairLogps
from dpo_fast.packs.layout import Group, pack
from dpo_fast.training.metrics import PAIR_METRICS, PairAverage, Window, pair_metrics


def batch_of(num_tokens):
    """One pair of `num_tokens` tokens in all."""
    prompt, answer = np.arange(num_tokens - 2, dtype=np.int32), np.zeros(1, dtype=np.int32)
    return pack([Group(0, prompt, (answer, answer + 1))])


def test_ties_stand_apart_from_accuracies():
    """Margins +1, 0, 0, -1: one pair in four is right, as TRL counts, and two are ties."""
    zero, length = torch.zeros(4), torch.arange(1, 5)
    chosen = torch.tensor([1.0, 0.0, 0.0, -1.0])
    average = PairAverage()
    average.add(pair_metrics(PairLogps(chosen, zero, zero, zero, length, length + 2), zero, beta=0.5))
    figures = average.read()
    assert (figures["rewards/accuracies"], figures["rewards/ties"]) == (0.25, 0.5)
    assert (figures["lengths/chosen"], figures["lengths/rejected"], figures["lengths/gap_std"]) == (2.5, 4.5, 0)


def test_fill_is_tokens_over_room():
    window = Window(max_tokens=10)
    for num_tokens in (10, 5, 20):  # full, half full, and a group above the budget: a full pack of its own
        window.add(batch_of(num_tokens), torch.zeros(len(PAIR_METRICS), 1))
    assert window.read()["pack_fill"] == pytest.approx(35 / 40)
