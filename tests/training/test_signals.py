"""Signals at any moment of a run: what was begun is finished, what was done is kept, and the exit code says so."""

import dataclasses
import os
import pty
import signal

import pytest
from small_runs import QUIET, assert_same_weights, finish, start_train, wait_for

from dpo_fast.cli import COMMANDS, STOPPED, main
from dpo_fast.config import DPOConfig
from dpo_fast.training.checkpoint import verify_checkpoint
from dpo_fast.training.run import train
from dpo_fast.training.signals import StopSignals, stop_signals

pytestmark = pytest.mark.slow

STEP = "dpo_fast.training.loop:Trainer.train_step"
SAVE = "dpo_fast.files:_seal"
SCORE = "dpo_fast.model.policy:Policy.score"
LOAD = "dpo_fast.model.policy:Policy.load"


@pytest.fixture(scope="module")
def whole(base, rows, tmp_path_factory):
    """Folder of the final model of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    settings = {"output_dir": str(folder / "run"), "reference_store": str(folder / "reference.sqlite")}
    sizes = {"max_length": 64, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 6}
    return train(DPOConfig(model=base, data=rows, logging_steps=1, save_steps=0, **sizes, **settings)).model_dir


def send(process, *numbers):
    for number in numbers:
        os.kill(process.pid, number)


def resumes_to_the_same_bits(config, whole):
    result = train(config(resume="auto"), console=QUIET)
    assert_same_weights(result.model_dir, whole)
    assert [row["step"] for row in result.metrics] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_stops_the_run_with_a_checkpoint_and_exit_code_75(config, whole, tmp_path, number):
    log = tmp_path / "log"
    process = start_train(config(), log, slow=(STEP,), delay=0.05)
    wait_for(process, log, "begins train_step", count=3)
    send(process, number)
    assert finish(process, log) == STOPPED == 75
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert verify_checkpoint(checkpoint) == []
    assert "stopped by a signal after step 3; continue with --resume auto" in log.read_text()
    resumes_to_the_same_bits(config, whole)


def test_a_second_signal_lets_the_checkpoint_be_finished(config, whole, tmp_path):
    log = tmp_path / "log"
    process = start_train(config(), log, slow=(STEP, SAVE), delay=0.1)
    wait_for(process, log, "begins train_step", count=2)
    send(process, signal.SIGTERM)
    wait_for(process, log, "begins _seal")
    send(process, signal.SIGTERM)
    assert finish(process, log) == STOPPED
    assert verify_checkpoint(tmp_path / "run" / "checkpoint-2") == []
    resumes_to_the_same_bits(config, whole)


def test_two_signals_while_the_final_model_is_written_let_it_be_finished(config, whole, tmp_path):
    log = tmp_path / "log"
    process = start_train(config(), log, slow=(SAVE,), delay=0.3)
    wait_for(process, log, "begins _seal")
    send(process, signal.SIGTERM)
    wait_for(process, log, "stopping after this step")
    send(process, signal.SIGINT)
    assert finish(process, log) == 0
    assert_same_weights(tmp_path / "run" / "final", whole)


def test_a_third_signal_ends_a_write_and_nothing_is_half_written(config, whole, tmp_path):
    log = tmp_path / "log"
    process = start_train(config(save_steps=2), log, slow=(SAVE,), delay=0.3)
    wait_for(process, log, "begins _seal", count=2)
    for count in (1, 2):
        send(process, signal.SIGTERM)
        wait_for(process, log, "stopping after this step", count=count)
    send(process, signal.SIGTERM)
    assert finish(process, log) == 130
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-2"]
    assert verify_checkpoint(tmp_path / "run" / "checkpoint-2") == []
    resumes_to_the_same_bits(config, whole)


@pytest.mark.parametrize("slow", [LOAD, SCORE])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_before_the_first_step_stops_at_once(config, whole, tmp_path, slow, number):
    log = tmp_path / "log"
    process = start_train(config(max_tokens_per_batch=4096), log, slow=(slow,), delay=0.2)
    wait_for(process, log, "begins")
    send(process, number)
    assert finish(process, log) == STOPPED
    assert "stopped by a signal before the first step; rerun the same command to continue" in log.read_text()
    assert not (tmp_path / "run").exists()


def test_a_hangup_of_the_terminal_does_not_lose_the_checkpoint(config, whole, tmp_path):
    """The terminal goes away with the signal, so whatever is printed afterwards would fail."""
    log = tmp_path / "log"
    controller, terminal = pty.openpty()
    process = start_train(config(), log, slow=(STEP,), terminal=os.ttyname(terminal))
    wait_for(process, log, "begins train_step", count=2)
    os.close(terminal)
    os.close(controller)  # sends SIGHUP to the session of the terminal
    process.join(60)
    assert process.exitcode == STOPPED
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert verify_checkpoint(checkpoint) == []


def test_a_hangup_is_ignored_under_nohup():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_signals_are_counted():
    stop = StopSignals()
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGINT, None)
    stop = StopSignals()
    stop.defer()
    assert not stop.is_set()
    for _ in range(2):
        stop.receive(signal.SIGTERM, None)
    assert (stop.is_set(), stop.is_forced) == (True, False)
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGTERM, None)
    assert stop.is_forced


def interrupted_import(stop):
    """What Python 3.11 makes of a signal that comes while a class is made."""

    class Interrupted:
        def __set_name__(self, owner, name):
            stop.receive(signal.SIGTERM, None)

    try:
        type("Made", (), {"field": Interrupted()})
    except (RuntimeError, KeyboardInterrupt) as error:
        return error


def test_a_signal_during_an_import_is_behind_whatever_that_raises(monkeypatch, capsys):
    stop = StopSignals()
    assert not stop.explains(RuntimeError())
    error = interrupted_import(stop)
    assert stop.explains(error)
    assert not stop.explains(RuntimeError())
    command = dataclasses.replace(COMMANDS["report"], run=lambda config: raising(error))
    monkeypatch.setitem(COMMANDS, "report", command)
    assert main(["report", "x"]) == 130
    assert capsys.readouterr().err == "dpo-fast report: interrupted\n"


def raising(error):
    raise error


def test_an_interrupt_that_python_drops_still_stops_the_run(capfd):
    """In a finalizer Python prints what is raised, and goes on."""

    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with stop_signals() as stop:
        Finalized()
        with pytest.raises(KeyboardInterrupt):
            stop.defer()
    assert capfd.readouterr().err == ""
