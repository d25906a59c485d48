"""`dpo-fast plan`: its JSON, its table and its picture."""

import io
import json

import pytest
import torch
from rich.console import Console

from dpo_fast.cli import main
from dpo_fast.config import DPOConfig, PlanConfig
from dpo_fast.errors import UserError
from dpo_fast.packs.budget import full_pack_of
from dpo_fast.planning.command import run_plan
from dpo_fast.planning.measured import OPTIMIZERS as PLANNED
from dpo_fast.training.optimizers import OPTIMIZERS


def planned(**settings):
    out = io.StringIO()
    report = run_plan(PlanConfig(**settings), optimizers=tuple(OPTIMIZERS), console=Console(file=out, width=80))
    return report, out.getvalue()


def test_json_has_the_promised_fields(capsys):
    command = "plan --model llama-3-8b --gpu h200-141 --dtype bfloat16 --optim adamw_8bit --json"
    assert main(command.split()) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is True
    assert sum(report["parts_gib"].values()) == pytest.approx(report["peak_gib"] + report["parts_gib"]["reserve"])
    assert report["pairs_per_second"] == pytest.approx(8 / report["step_seconds"])
    assert report["settings"]["max_tokens_per_batch"] == 8 * 2 * DPOConfig.max_length // 2 == full_pack_of(140 * 2**30)
    assert report["train_lacks"] == ""


def test_no_weight_is_loaded(monkeypatch):
    """A 405B is planned on the meta device."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **options))
    report, text = planned(model="llama-3.1-405b", gpu="h100-80", gpus=8)
    assert not report["fits"]
    assert "Does not fit" in text
    assert "neither a cheaper setting nor a larger card" in text


def test_what_would_fit_is_said():
    _, text = planned(model="llama-3-8b", gpu="4090-24", dtype="bfloat16", optim="adamw_8bit")
    assert "would fit: --gpu h100-80" in text
    given = {"checkpointing_policy": "none", "max_tokens_per_batch": 8192}
    _, text = planned(model="llama-3-8b", gpu="h100-80", dtype="bfloat16", optim="adamw_8bit", **given)
    assert "would fit: --checkpointing_policy selective" in text


def test_an_adapters_base_is_never_held_in_fp32():
    report, _ = planned(model="llama-3-70b", gpu="h100-80", gpus=8, peft="qlora", max_length=2048)
    assert report["fits"]
    assert report["parts_gib"]["weights"] < 70.6e9 * 0.6 / 2**30


def test_every_optimizer_of_train_can_be_planned():
    assert set(OPTIMIZERS) <= set(PLANNED)


def test_the_table_fits_80_columns_and_marks_what_train_lacks(tmp_path):
    out = tmp_path / "plan.png"
    # In bf16 these weights fit on no card of the eight, so they would have to be shared.
    report, text = planned(model="llama-3-70b", gpu="h100-80", gpus=8, peft="lora", out=str(out))
    assert max(map(len, text.splitlines())) <= 80
    assert "`dpo-fast train` does not do --parallel fsdp with --peft lora" in " ".join(text.split())
    assert report["train_lacks"] == "--parallel fsdp with --peft lora"
    assert out.read_bytes().startswith(b"\x89PNG")


def test_settings_that_were_given_are_kept():
    report, _ = planned(model="llama-3-8b", gpu="h100-80", dtype="float32", optim="adamw_8bit")
    assert report["settings"]["dtype"] == "float32"
    assert report["settings"]["optim"] == "adamw_8bit"
    given = {"checkpointing_policy": "none", "max_tokens_per_batch": 4096}
    report, _ = planned(model="llama-3-8b", gpu="h100-80", dtype="bfloat16", optim="adamw_8bit", **given)
    assert {name: report["settings"][name] for name in given} == given


def test_hours_of_ones_own_rows(base, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "a", "chosen": " b{i}", "rejected": " c"}}\n' for i in range(10)))
    report, text = planned(model=base, data=str(data), gpu="cpu", per_device_train_batch_size=4, num_train_epochs=2)
    assert report["steps"] == 6
    assert report["hours"] == pytest.approx(6 * report["step_seconds"] / 3600)
    assert "hours for 6 steps" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu": "h300"}, "--gpu h300: unknown; choose one of cpu, b200-180"),
        ({"gpus": 0}, "--gpus 0: expected a number in"),
        ({"model": ""}, "no model given"),
        ({"optim": "sgd"}, "--optim sgd: cannot be planned"),
        ({"out": "plan.txt"}, "--out plan.txt: expected a .png"),
        ({"activation_offloading": True, "checkpointing_policy": "none"}, "needs --checkpointing_policy full"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        planned(**{"model": "llama-3-8b", "gpu": "h100-80"} | settings)
