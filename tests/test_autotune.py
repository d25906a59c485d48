"""Choices by timing, without a GPU: the timer is replaced, all else is real."""

import json

import pytest
import torch

from dpo_fast.kernels import autotune

CPU = torch.device("cpu")


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Ways are timed by what they return; the list of what was timed; a cache folder of its own."""
    calls = []

    def milliseconds(way, device):
        calls.append(way)
        return way()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setattr(autotune, "_can_time", lambda device: True)
    monkeypatch.setattr(autotune, "_machine", lambda device: "some GPU")
    monkeypatch.setattr(autotune, "_milliseconds", milliseconds)
    return calls


def fail():
    raise RuntimeError("out of resources: shared memory")


def test_the_fastest_is_chosen_once_and_kept_on_disk(timed, monkeypatch):
    ways = {"a": lambda: 3.0, "b": lambda: 1.0, "c": lambda: 2.0}
    assert [autotune.choose("N 1024", "a", ways, CPU) for _ in range(3)] == ["b"] * 3
    assert len(timed) == 3
    monkeypatch.setattr(autotune, "_chosen", {})  # another process
    assert autotune.choose("N 1024", "a", ways, CPU) == "b"
    assert len(timed) == 3
    assert json.loads((autotune.cache_dir() / "autotune.json").read_text()) == {"some GPU, N 1024": "b"}


def test_keys_are_chosen_apart_and_all_kept(timed):
    assert autotune.choose("N 1024", "a", {"a": lambda: 1.0, "b": lambda: 2.0}, CPU) == "a"
    assert autotune.choose("N 2048", "a", {"a": lambda: 2.0, "b": lambda: 1.0}, CPU) == "b"
    assert len(json.loads((autotune.cache_dir() / "autotune.json").read_text())) == 2


def test_a_way_that_fails_is_left_out(timed):
    assert autotune.choose("k", "a", {"a": fail, "b": lambda: 9.0}, CPU) == "b"
    assert autotune.choose("l", "a", {"a": fail, "b": fail}, CPU) == "a"


def test_a_choice_that_is_no_more_is_made_anew(timed):
    autotune.choose("k", "a", {"a": lambda: 2.0, "old": lambda: 1.0}, CPU)
    assert autotune.choose("k", "a", {"a": lambda: 2.0, "new": lambda: 1.0}, CPU) == "new"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"some GPU, k": 7}'])
def test_a_damaged_file_costs_timings_alone(timed, content):
    autotune.cache_dir().mkdir()
    (autotune.cache_dir() / "autotune.json").write_text(content)
    assert autotune.choose("k", "a", {"a": lambda: 2.0, "b": lambda: 1.0}, CPU) == "b"


def test_a_cache_that_cannot_be_written_costs_timings_alone(timed, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert autotune.choose("k", "a", {"a": lambda: 2.0, "b": lambda: 1.0}, CPU) == "b"


def test_off_and_without_a_gpu_it_is_the_default(timed, monkeypatch):
    ways = {"a": lambda: 2.0, "b": lambda: 1.0}
    monkeypatch.setattr(autotune, "enabled", False)
    assert autotune.choose("k", "a", ways, CPU) == "a"
    monkeypatch.undo()
    assert autotune.choose("k", "a", ways, CPU) == "a"
    assert not timed
