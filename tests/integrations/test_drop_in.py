"""The blocks of docs/drop_in.md as they stand there, against ten steps of TRL 1.16."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from oracle import tiny_llama, tiny_tokenizer
from trl import DPOConfig
from trl import DPOTrainer as TRLTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl_runs import IGNORED, ROWS, assert_same_run, make_trainer

from dpo_fast.integrations import patch

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "drop_in.md").read_text()
LOOP, TRL, PATCH = re.findall(r"```python\n(.*?)```", PAGE, re.S)
pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(line) for line in IGNORED)]


class Recording(TRLTrainer):
    """TRL's trainer, with every batch it trained on."""

    def _compute_loss(self, model, inputs, return_outputs):
        if not hasattr(self, "batches"):
            self.batches = []
        self.batches.append(inputs)
        return super()._compute_loss(model, inputs, return_outputs)


def test_each_block_is_short():
    for block in (LOOP, TRL, PATCH):
        assert len([line for line in block.splitlines() if line]) < 10


def test_the_training_loop(tmp_path):
    plain = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.0}
    theirs = make_trainer(Recording, tmp_path, extra={"ref_model": tiny_llama(320)}, **plain)
    theirs.train()
    model, reference = tiny_llama(320), tiny_llama(320)
    batches, losses = [], []
    for batch in theirs.batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with torch.no_grad():
            batches.append((inputs, labels, reference.model(**inputs).last_hidden_state[:, :-1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    optimizer.register_step_pre_hook(lambda *args: losses.append(names["loss"].item()))
    names = {
        **{"batches": batches, "model": model, "optimizer": optimizer},
        "ref_head_weight": reference.lm_head.weight.detach(),
    }
    exec(LOOP, names)
    assert len(losses) == 10
    assert losses == pytest.approx([line["loss"] for line in theirs.records.logs[:-1]], abs=1e-5)
    for got, want in zip(model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_the_trainer(tmp_path, monkeypatch):
    theirs = make_trainer(TRLTrainer, tmp_path, extra={"ref_model": tiny_llama(320)}, seed=42, max_length=1024)
    theirs.train()
    # What the page leaves out: this machine's CPU, and silence.
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    quiet |= {"gradient_checkpointing": False, "logging_steps": 1}
    monkeypatch.setattr("trl.DPOConfig", lambda folder, **options: DPOConfig(tmp_path / folder, **options | quiet))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer = tiny_tokenizer()
    names = {"model": tiny_llama(320), "rows": Dataset.from_list(ROWS[:18]), "tokenizer": tokenizer}
    exec(TRL, names)
    logged = [line["loss"] for line in names["trainer"].state.log_history if "loss" in line]
    assert logged == pytest.approx([line["loss"] for line in theirs.records.logs[:-1]], abs=1e-5)
    for got, want in zip(names["model"].parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def counted(monkeypatch, name):
    """A list that grows with every call of a function that the patches use."""
    calls, original = [], getattr(patch, name)

    def wrapper(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(patch, name, wrapper)
    return calls


def test_the_patched_trainer(tmp_path, monkeypatch):
    reference = {"ref_model": tiny_llama(320)}
    theirs = make_trainer(TRLTrainer, tmp_path, extra=reference)
    theirs.train()
    calls = counted(monkeypatch, "linear_logprob_with_stats")
    names = {"trainer": make_trainer(TRLTrainer, tmp_path, extra={"ref_model": tiny_llama(320)})}
    exec(PATCH, names)
    assert len(calls) == 20
    assert_same_run(names["trainer"], theirs)


@pytest.mark.filterwarnings("ignore:.*ORPO.*", "ignore:.*experimental.*", "ignore:.*deprecated.*")
def test_a_patched_trainer_of_logits(tmp_path, monkeypatch):
    """ORPO in TRL takes both `selective_log_softmax` and a cross-entropy."""

    def run():
        settings = {"output_dir": tmp_path, "max_steps": 10, "per_device_train_batch_size": 2, "use_cpu": True}
        settings |= {"bf16": False, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-3, "max_length": 24}
        settings |= {"disable_tqdm": True, "gradient_checkpointing": False, "logging_steps": 1}
        trainer = ORPOTrainer(
            model=tiny_llama(320),
            args=ORPOConfig(**settings),
            train_dataset=Dataset.from_list(ROWS[:18]),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        return trainer

    theirs = run()
    calls = counted(monkeypatch, "logprob")
    with patch.patched():
        ours = run()
    assert len(calls) == 10
    for got, want in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
