"""Totals over the pairs, counted by hand."""

import numpy as np
import pytest
from preference_rows import load

from dpo_fast.data.pair_totals import agreement


def test_copies_contradictions_and_lengths_are_counted(tmp_path):
    row = {"prompt": "The", "chosen": " fox", "rejected": " dog"}
    long = "the quick brown fox jumps over the lazy dog and the fox and the dog and the fox"
    rows = [
        row,
        row | {"note": 1},
        {"prompt": "The", "chosen": " dog", "rejected": " fox"},
        row | {"prompt": "A"},
        {"prompt": "Say ", "chosen": long, "rejected": long + "!"},
        {"prompt": "Say ", "responses": [" fox", " lazy dog", " fox"], "scores": [3, 2, 1]},
    ]
    _, report = load(tmp_path, rows, pairs="all")
    assert {cause: report.causes.get(cause) for cause in ("duplicate", "contradictory", "near_identical")} == {
        "duplicate": ["line 2"],
        "contradictory": ["line 3", "line 6"],
        "near_identical": ["line 5"],
    }
    counts = report.to_dict()
    # Of the last row: fox > lazy dog, lazy dog > fox; fox > fox is no pair.
    assert counts["pairs"] == 7
    assert counts["rejected_longer"] - counts["chosen_longer"] == 1
    assert counts["ends"] == {"<eos>": 13}
    assert "7 pairs; the chosen answer is longer in" in report.render()


@pytest.mark.parametrize(
    ("left", "right", "share"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [1, 9, 3, 4], 0.75),
        ([1, 2, 3, 4], [1, 2, 3, 4, 5], 0.8),
        ([1, 1, 1], [1, 1, 1, 1], 0.75),
        ([5], [6, 7], 0.0),
    ],
)
def test_agreement_at_both_ends(left, right, share):
    for a, b in ((left, right), (right, left)):
        assert agreement(np.array(a), np.array(b)) == pytest.approx(share)
