"""Figures between two reports, on packs of known size."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_fast.errors import WriteError
from dpo_fast.losses.pairs import PairLogps
from dpo_fast.packs.layout import Group, pack
from dpo_fast.training.metrics import (
    PAIR_METRICS,
    ROW_FIGURES,
    MetricsFile,
    PairAverage,
    Window,
    pair_metrics,
    read_metrics,
)
from dpo_fast.training.reporter import KernelChoices
from dpo_fast.training.run_folder import CHOICES_FILE


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


def row_of(step, prefix=""):
    row = {prefix + name: 0.5 for name in ROW_FIGURES}
    return row | {prefix + "num_pairs": 4, "step": step, "epoch": step / 4}


def write_rows(path, steps):
    with MetricsFile(path, keep_up_to_step=0) as metrics:
        for step in steps:
            metrics.write(row_of(step))


def test_rows_of_later_steps_are_dropped_and_the_file_is_appended_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [1, 2, 3])
    with MetricsFile(path, keep_up_to_step=2) as metrics:
        assert [row["step"] for row in metrics.kept] == [1, 2]
        metrics.write(row_of(3, "eval_"))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_death_while_the_file_is_rewritten_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [1, 2, 3])
    before = path.read_bytes()

    def die(self, target):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(SystemExit):
            MetricsFile(path, keep_up_to_step=2)
    assert path.read_bytes() == before


DAMAGE = {
    "a flipped bit in a name": lambda line: line.replace(b"loss", b"losr", 1),
    "a flipped bit in a brace": lambda line: b"\xfb" + line[1:],
    "not UTF-8": lambda line: line.replace(b"epoch", b"ep\xffch"),
    "cut": lambda line: line[:40],
    "a list": lambda line: b"[" + line + b"]",
    "deeply nested": lambda line: b"[" * 100_000,
    "a number as text": lambda line: line.replace(b"0.5", b'"a"', 1),
    "no step": lambda line: line.replace(b'"step"', b'"stop"'),
    "a step that is a fraction": lambda line: line.replace(b'"step": 2', b'"step": 2.5'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_set_aside_and_the_others_are_kept(tmp_path, caplog, damage):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [1, 2, 3])
    lines = path.read_bytes().splitlines()
    lines[1] = DAMAGE[damage](lines[1])
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    assert "1 damaged lines are left out" in caplog.text
    with MetricsFile(path, keep_up_to_step=3) as metrics:
        assert (metrics.num_damaged, [row["step"] for row in metrics.kept]) == (1, [1, 3])
        metrics.write(row_of(4))
    assert [row["step"] for row in read_metrics(path)] == [1, 3, 4]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == lines[1] + b"\n"


def test_a_last_line_cut_by_a_crash_does_not_spoil_the_next_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [1, 2])
    path.write_bytes(path.read_bytes()[:-20])
    with MetricsFile(path, keep_up_to_step=2) as metrics:
        metrics.write(row_of(2))
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # whole but for its end
    with MetricsFile(path, keep_up_to_step=2) as metrics:
        metrics.write(row_of(3))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_row_that_did_not_fit_leaves_whole_lines(tmp_path):
    """The file may hold two rows and a part of the third."""
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [1])
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsFile(path, keep_up_to_step=1) as metrics:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 5 // 2, hard))
        try:
            metrics.write(row_of(2))
            with pytest.raises(WriteError, match=r"metrics\.jsonl cannot be written: .*bytes needed"):
                metrics.write(row_of(3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        metrics.write(row_of(3))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_damaged_list_of_kernels_is_set_aside(tmp_path):
    path = tmp_path / CHOICES_FILE
    for damage in (b"{", b"[]", b"\xff", b"[" * 100_000):
        path.write_bytes(damage)
        KernelChoices(tmp_path)
        assert not path.exists()
        assert path.with_name("autotune.json.damaged").read_bytes() == damage
