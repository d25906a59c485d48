"""Resuming with other settings: what may change counts from the next step on, what may not is refused by name."""

import io
import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from oracle import save_tiny_checkpoint
from rich.console import Console
from small_runs import QUIET, assert_same_weights, weights

from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError
from dpo_fast.packs.layout import Group, Ranking
from dpo_fast.training.loop import Trainer
from dpo_fast.training.resume import RULES, Rule, rows_fingerprint
from dpo_fast.training.run import train

pytestmark = pytest.mark.slow


def test_every_setting_has_a_rule():
    assert RULES.keys() == {field.name for field in fields(DPOConfig)}


@pytest.fixture(scope="module")
def trained(base, rows, tmp_path_factory):
    """Settings of a run of six steps with a checkpoint after the third."""
    folder = tmp_path_factory.mktemp("trained")
    copied = Path(shutil.copy(rows, folder / "rows.jsonl"))
    settings = {
        **{"model": base, "data": str(copied), "output_dir": str(folder / "run"), "max_length": 64, "save_steps": 3},
        **{"reference_store": str(folder / "reference.sqlite"), "per_device_train_batch_size": 4, "max_steps": 6},
        **{"logging_steps": 1, "learning_rate": 1e-3, "eval_split": 0.1},
    }
    train(DPOConfig(**settings), console=QUIET)
    return DPOConfig(**settings)


@pytest.fixture
def resume(trained, tmp_path):
    """Resumes the third step of the run in a folder of its own with changed settings."""

    def resume(*, console=QUIET, **changes):
        checkpoint = Path(trained.output_dir) / "checkpoint-3"
        own = {"output_dir": str(tmp_path / "run"), "resume": str(checkpoint)}
        return train(replace(trained, **own | changes), console=console)

    return resume


def recorded(tmp_path):
    return yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())


REFUSED = {
    "pairs": "all",
    "min_score_gap": 0.5,
    "train_on": "all",
    "keep_reasoning": True,
    "max_length": 32,
    "truncation_mode": "keep_end",
    "eval_split": 0.2,
    "dtype": "bfloat16",
    "bf16": True,
    "sync_ref_model": True,
    "loss_type": "bco",
    "max_tokens_per_batch": 50,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "seed": 7,
}


# Tried in test_adapters.py.
OF_ADAPTERS = {"peft", "use_peft", "load_in_4bit", "sft_adapter"}


def test_all_fixed_settings_are_tried():
    fixed = {name for name, rule in RULES.items() if rule is Rule.FIXED}
    assert REFUSED.keys() == {name for name in fixed - OF_ADAPTERS if not name.startswith("lora_")}


@pytest.mark.filterwarnings("ignore:--dtype bfloat16 trains")
@pytest.mark.parametrize("name", REFUSED)
def test_what_may_not_change_is_refused_with_both_values(resume, trained, tmp_path, name):
    old = asdict(trained)[name]
    with pytest.raises(UserError) as error:
        resume(**{name: REFUSED[name]})
    shown = "null" if old is None else old
    assert f"--{name} {REFUSED[name]}, was {shown}: may not change in a run" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_settings_that_mean_the_same_are_no_change(resume, trained):
    result = resume(optim="adamw_torch_fused", loss_type=["sigmoid"], loss_weights=[1.0])
    assert_same_weights(result.model_dir, Path(trained.output_dir) / "final")


def test_a_new_rate_is_used_said_and_recorded(resume, trained, tmp_path):
    console = Console(file=io.StringIO(), width=500)
    result = resume(learning_rate=4e-4, logging_steps=2, console=console)
    said = console.file.getvalue()
    assert "changed settings, used from here on: --learning_rate 0.0004, was 0.001; --logging_steps 2, was 1" in said
    assert recorded(tmp_path)["learning_rate"] == 4e-4
    # Linear from the peak to 0 over six steps: the rate of step s is peak (6 - (s - 1)) / 6.
    rates = {row["step"]: row["learning_rate"] for row in result.metrics if "loss" in row}
    assert rates == pytest.approx({4: 4e-4 * 3 / 6, 6: 4e-4 * 1 / 6})


def test_without_a_rate_nothing_moves(resume, trained):
    result = resume(learning_rate=0.0)
    assert_same_weights(result.model_dir, Path(trained.output_dir) / "checkpoint-3")


def test_a_new_weight_decay_is_used(resume, trained, tmp_path):
    """AdamW subtracts rate x decay x weight besides, which is all that differs after one step from the same weights."""
    start = weights(Path(trained.output_dir) / "checkpoint-3")
    plain = weights(resume(max_steps=4).model_dir)
    decayed = weights(resume(max_steps=4, weight_decay=0.5, output_dir=str(tmp_path / "decayed")).model_dir)
    rate = 1e-3 * 1 / 4
    for name, weight in start.items():
        expected = rate * 0.5 * weight if weight.ndim >= 2 else torch.zeros_like(weight)
        torch.testing.assert_close(plain[name] - decayed[name], expected, rtol=1e-3, atol=1e-7)


@pytest.fixture
def used(monkeypatch):
    """The optimizer's settings at each step."""
    seen, step = [], Trainer.train_step

    def noting(self):
        seen.append({name: self.optimizer.param_groups[0][name] for name in ("lr", "betas", "eps")})
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", noting)
    return seen


def test_a_longer_schedule_is_right_from_its_first_step(trained, tmp_path, used):
    """Two steps of warm-up, then linear to 0 at the tenth: step 7 has half the peak, not the old schedule's 0."""
    settings = {"output_dir": str(tmp_path / "run"), "warmup_steps": 2}
    train(replace(trained, **settings, save_steps=6), console=QUIET)
    result = train(replace(trained, **settings, save_steps=6, resume="auto", max_steps=10), console=QUIET)
    rates = [row["learning_rate"] for row in result.metrics if "loss" in row and row["step"] > 6]
    assert rates == [settings["lr"] for settings in used[6:]]
    assert rates == pytest.approx([1e-3 * (10 - done) / 8 for done in (6, 7, 8, 9)])
    assert rates[0] == pytest.approx(5e-4)


def test_the_optimizers_other_settings_are_used(resume, used):
    resume(adam_beta1=0.5, adam_beta2=0.9, adam_epsilon=1e-4)
    assert [(settings["betas"], settings["eps"]) for settings in used] == [((0.5, 0.9), 1e-4)] * 3


def test_a_run_that_is_past_its_new_end_is_refused(resume):
    with pytest.raises(UserError, match=r"has 3 steps, but the run ends after 2 \(--max_steps 2"):
        resume(max_steps=2)


def test_the_fingerprint_of_rows_sees_changes_that_leave_all_lengths():
    prompt, one, two = (np.array(ids, dtype=np.int32) for ids in ([5, 6], [7, 8], [9, 10]))
    group = Group(0, prompt, (one, two), Ranking(scores=(1.0, 0.0)), (np.array([True, False]), None))
    other = Group(1, prompt, (one, two))
    changed = [
        replace(group, prompt_ids=np.array([5, 7], np.int32)),
        replace(group, answers=(two, one)),
        replace(group, answers=(one, np.array([9, 11], np.int32))),
        replace(group, scored=(np.array([False, True]), None)),
        replace(group, scored=(None, np.array([True, False]))),
        *(replace(group, ranking=replace(group.ranking, **change)) for change in RANKINGS),
    ]
    fingerprints = {rows_fingerprint([first, other]) for first in [group, *changed]} | {
        rows_fingerprint([other, group])
    }
    assert len(fingerprints) == len(changed) + 2
    assert (
        rows_fingerprint([replace(group, row=3), other]) in fingerprints
    )  # where a row stood in its file is no matter


RANKINGS = ({"pairs": ((1, 0),)}, {"scores": (2.0, 0.0)}, {"gold": 1}, {"weight": 0.5})


def changed_rows(trained, change):
    rows = [json.loads(line) for line in Path(trained.data).read_text().splitlines()]
    change(rows)
    return "".join(json.dumps(row) + "\n" for row in rows)


def swap_labels(rows):
    rows[2]["chosen"], rows[2]["rejected"] = rows[2]["rejected"], rows[2]["chosen"]


def other_text(rows):
    rows[3]["prompt"] = rows[3]["prompt"][::-1]


ROW_CHANGES = {
    "swapped labels": swap_labels,
    "all labels swapped": lambda rows: [row.update(chosen=row["rejected"], rejected=row["chosen"]) for row in rows],
    "other text": other_text,
    "another order": lambda rows: rows.reverse(),
    "a row less": lambda rows: rows.pop(),
}


@pytest.mark.parametrize("change", ROW_CHANGES)
@pytest.mark.parametrize("is_in_place", [True, False])
def test_other_rows_are_refused(resume, trained, tmp_path, change, is_in_place):
    text, original = changed_rows(trained, ROW_CHANGES[change]), Path(trained.data).read_text()
    path = Path(trained.data) if is_in_place else tmp_path / "other.jsonl"
    path.write_text(text)
    try:
        with pytest.raises(UserError, match=r"the rows that are (trained on|held out) are not those") as error:
            resume(data=str(path))
    finally:
        Path(trained.data).write_text(original)
    cause = "no setting did" if is_in_place else f"--data {path}, was {trained.data}"
    assert cause in str(error.value)


def test_the_same_rows_may_lie_elsewhere(resume, trained, tmp_path):
    moved = shutil.copy(trained.data, tmp_path / "moved.jsonl")
    result = resume(data=str(moved))
    assert_same_weights(result.model_dir, Path(trained.output_dir) / "final")
    assert recorded(tmp_path)["data"] == str(moved)


def test_weights_of_rows_count(make_config, rows, tmp_path):
    lines = [json.loads(line) | {"weight": 1.0 + i % 2} for i, line in enumerate(Path(rows).read_text().splitlines())]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = make_config(data=str(path), weight_column="weight", max_steps=4, save_steps=2)
    train(config, console=QUIET)
    lines[0]["weight"] = 3.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="the rows that are trained on"):
        train(replace(config, resume="auto"), console=QUIET)


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_another_reference_is_refused_and_the_same_one_may_lie_elsewhere(resume, trained, tmp_path, name):
    moved, other = str(tmp_path / "moved"), str(save_tiny_checkpoint(tmp_path / "other", seed=1))
    shutil.copytree(trained.model, moved)
    result = resume(**{name: moved})
    assert_same_weights(result.model_dir, Path(trained.output_dir) / "final")
    assert recorded(tmp_path)[name] == moved
    old = trained.model if name == "model" else "null"
    with pytest.raises(UserError, match=f"--{name} {other}, was {old}: not the reference that the run began with"):
        resume(**{name: other}, output_dir=str(tmp_path / "run2"))


def test_without_a_reference_the_model_may_not_change(make_config, rows, tmp_path):
    config = make_config(data=rows, loss_type="simpo", beta=2.0, max_steps=4, save_steps=2)
    train(config, console=QUIET)
    shutil.copytree(config.model, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"--model .*elsewhere, was .*: may not change"):
        train(replace(config, model=str(tmp_path / "elsewhere"), resume="auto"), console=QUIET)
