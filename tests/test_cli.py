"""The command line: what a stranger types, rightly and wrongly."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from oracle import padded_sequence_logps, save_tiny_checkpoint
from transformers import AutoModelForCausalLM

from dpo_fast.cli import main, normalize
from dpo_fast.config import DataConfig, DPOConfig
from dpo_fast.data.load import load_groups
from dpo_fast.model.load import load_tokenizer

ROWS = [
    {"prompt": "The capital of France", "chosen": " is Paris.", "rejected": " is London, of England."},
    {"prompt": "Numbers", "chosen": " such as 0 1 2", "rejected": " fox"},
    {"prompt": "A preference pair holds", "chosen": " a prompt", "rejected": " a prompt"},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_tiny_checkpoint(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return tmp_path


def test_score_writes_the_models_log_probs(folder):
    command = ["score", "--model", "model", "--data", "rows.jsonl", "--out", "scores.jsonl", "--tokens"]
    assert main(command) == 0
    records = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 1]
    groups, _ = load_groups(DataConfig(data="rows.jsonl"), load_tokenizer("model"))
    model = AutoModelForCausalLM.from_pretrained("model").double()
    for answer, side in enumerate(("chosen", "rejected")):
        with torch.no_grad():
            want = padded_sequence_logps(model, groups, answer)
        got = torch.tensor([record[f"{side}_logp"] for record in records], dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        for record, group in zip(records, groups, strict=True):
            assert record[f"{side}_len"] == len(group.answers[answer]) == len(record[f"{side}_token_logps"])
            assert sum(record[f"{side}_token_logps"]) == pytest.approx(record[f"{side}_logp"])
    assert (folder / "cache" / "dpo-fast" / "reference.sqlite").exists()


def test_score_again_reads_the_store_and_gives_the_same(folder, capsys):
    command = ["score", "--model", "model", "--data", "rows.jsonl", "--out"]
    main([*command, "first.jsonl"])
    capsys.readouterr()
    main([*command, "second.jsonl"])
    assert "2 rows, all cached" in capsys.readouterr().out
    assert (folder / "first.jsonl").read_text() == (folder / "second.jsonl").read_text()
    assert "token_logps" not in (folder / "first.jsonl").read_text()


@pytest.mark.slow
def test_train_by_file_and_by_option(folder, capsys):
    (folder / "c.yaml").write_text("model: model\ndata: rows.jsonl\nmax_steps: 2\nbeta: 0.5\nlogging_steps: 1\n")
    assert main(["train", "--config", "c.yaml", "--output-dir", "run", "--beta", "0.2", "--save-steps=0"]) == 0
    settings = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert (settings["beta"], settings["max_steps"]) == (0.2, 2)
    output = capsys.readouterr().out
    assert "dropped 1: both answers are the same [identical_answers; line 3]" in output
    assert "step 2/2" in output
    # A run's own settings are a --config like any other.
    assert main(["train", "--config", "run/config.yaml", "--resume", "auto", "--max-steps", "3"]) == 0


def test_dry_run_is_a_flag(folder):
    assert main(["train", "--dry-run", "--model", "model", "--data", "rows.jsonl", "--output_dir", "run"]) == 0
    assert not (folder / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_has_two_names(folder, name):
    """transformers 5.23 calls it by the second."""
    rows = ["train", "--model", "model", "--data", "rows.jsonl", "--max_steps", "1"]
    assert main([*rows, "--output_dir", "flag", f"--{name.replace('_', '-')}"]) == 0
    (folder / "c.yaml").write_text(f"{name}: true\n")
    assert main([*rows, "--output_dir", "file", "--config", "c.yaml"]) == 0
    for run in ("flag", "file"):
        settings = yaml.safe_load((folder / run / "config.yaml").read_text())
        assert settings["gradient_checkpointing"] is True
        assert settings["activation_checkpointing"] is None
    assert DPOConfig(**{name: True}).gradient_checkpointing


def test_dashes_underscores_and_flags_are_normalized():
    given = ["train", "--max-steps", "3", "--strict", "--dry-run", "--output-dir=a-b", "--bf16", "true", "--no-such"]
    assert normalize(given) == [
        *("train", "--max_steps", "3", "--strict", "true", "--dry_run", "true", "--output_dir=a-b"),
        *("--bf16", "true", "--no-such"),
    ]
    assert normalize(["train", "--bf16", "--beta", "1"]) == ["train", "--bf16", "true", "--beta", "1"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --data rows.jsonl", "no model given: pass --model"),
        ("train --model model", "no data given: pass --data"),
        ("train --model nowhere --data rows.jsonl", "--model nowhere: cannot load"),
        ("train --model ./nowhere --data rows.jsonl", "--model ./nowhere: no such folder"),
        ("train --model model --data missing.jsonl", "--data missing.jsonl: no such file"),
        ("train --model model --data rows.jsonl --strict", "rows.jsonl, line 3: both answers are the same"),
        ("train --model model --data rows.jsonl --loss_type dpo", "--loss_type dpo: unknown; choose one of alphapo"),
        ("train --model model --data rows.jsonl --device cuda", "--device cuda"),
        ("score --model model --data rows.jsonl", "no output given: pass --out"),
        ("score --model model --data rows.jsonl --out s.jsonl --reference_store rows.jsonl", "--reference_store"),
    ],
)
def test_mistakes_give_one_message_and_exit_code_2(folder, capsys, monkeypatch, command, message):
    # A name that is no folder is looked up on the Hub, which takes a minute to give up where there is no network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --betaa 0.1", "unknown options: --betaa (did you mean --beta?)"),
        ("train --beta much", "--beta much: expected float"),
        ("train --max_length abc", "--max_length abc: expected int or null"),
        ("train --loss_typ ipo", "unknown options: --loss_typ (did you mean --loss_type?)"),
        ("trian", "invalid choice: 'trian'"),
    ],
)
def test_mistyped_options_give_one_line(folder, capsys, command, message):
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 2


@pytest.mark.slow
def test_help_lists_commands_and_settings():
    for arguments, words in (([], ["demo", "train", "score"]), (["train"], ["--max_tokens_per_batch", "--beta"])):
        done = subprocess.run(
            [sys.executable, "-m", "dpo_fast.cli", *arguments, "--help"], capture_output=True, text=True, check=True
        )
        assert all(word in done.stdout for word in words)
