"""`train` keeps to its plan: prints it, refuses what cannot fit, compares, and explains an out-of-memory error."""

import io

import pytest
import torch
from rich.console import Console

from dpo_fast.errors import TrainingError, UserError
from dpo_fast.model.load import load_config
from dpo_fast.planning import hardware
from dpo_fast.training.loop import Trainer
from dpo_fast.training.run import train

ROWS = '{"prompt": "Paris is", "chosen": " the capital", "rejected": " of England."}\n' * 3


@pytest.fixture
def run(make_config, tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROWS)

    def run(**changes):
        out = io.StringIO()
        config = make_config(data=str(tmp_path / "rows.jsonl"), device="cpu", **{"max_steps": 1} | changes)
        train(config, console=Console(file=out, width=200))
        return out.getvalue()

    return run


def memory_of(gib, monkeypatch):
    monkeypatch.setattr(hardware, "host_memory", lambda: gib * 2**30)


def test_the_plan_is_printed_and_compared(run):
    text = run()
    assert "planned: 0.00" in text
    assert "activations" in text
    assert "step 1 peaked at" in text
    assert "(off by " in text


def test_what_cannot_fit_is_refused_before_the_model_is_loaded(run, monkeypatch):
    from dpo_fast.model.policy import Policy

    memory_of(1e-4, monkeypatch)
    monkeypatch.setattr(Policy, "load", None)
    with pytest.raises(UserError, match=r"(?s)this run does not fit.*weights.*does not fit in.*What fits instead:"):
        run()


def test_a_run_that_does_not_fit_recomputes(run, monkeypatch):
    """The reserve counts, so all that fits nearly is made smaller, with the same results."""
    seen = []
    forward = Trainer.train_step

    def step(trainer):
        seen.append(any(getattr(module, "gradient_checkpointing", False) for module in trainer.policy.model.modules()))
        return forward(trainer)

    monkeypatch.setattr(Trainer, "train_step", step)
    memory_of(0.8006, monkeypatch)
    text = run()
    assert "; to fit: --checkpointing_policy" in text
    assert seen == [True]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_ends_with_the_plan(run, monkeypatch, error):
    real = Trainer.train_step

    def step(trainer):
        if trainer.step == 1:
            raise error
        return real(trainer)

    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(TrainingError, match=r"(?s)out of memory.*activations.*checkpoint-1 is complete") as caught:
        run(max_steps=2, save_steps=1)
    assert "What fits instead" in str(caught.value)


def test_other_errors_are_left_alone(run, monkeypatch):
    def step(trainer):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(RuntimeError, match="shapes do not match") as caught:
        run()
    assert type(caught.value) is RuntimeError


@pytest.mark.parametrize("trusts", [False, True])
def test_the_plan_reads_a_models_configuration_as_the_run_does(run, trusts, monkeypatch):
    """A model with code of its own would be refused by its plan otherwise."""
    seen = []

    def spy(settings):
        seen.append(settings.trust_remote_code)
        return load_config(settings.model)

    monkeypatch.setattr("dpo_fast.training.as_planned.config_of", spy)
    run(trust_remote_code=trusts, dry_run=True)
    assert seen == [trusts]
