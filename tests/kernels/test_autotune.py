"""Choices by timing, without a GPU: the timer is replaced, all else is real."""

import json
import logging

import pytest
import torch

from dpo_fast.kernels import autotune
from dpo_fast.kernels.autotune import Trial

CPU = torch.device("cpu")


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Ways are timed by what they return; the names of what was timed; a cache folder of its own."""
    calls = []

    def milliseconds(ways, device):
        calls.extend(ways)
        return {name: way() for name, way in ways.items()}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_used", {})
    monkeypatch.setattr(autotune, "_can_time", lambda device: True)
    monkeypatch.setattr(autotune, "_machine", lambda device: "some GPU")
    monkeypatch.setattr(autotune, "_milliseconds", milliseconds)
    return calls


def another_process(monkeypatch):
    monkeypatch.setattr(autotune, "_used", {})


def choose(key, ways, wrong=()):
    def is_right(name):
        ways[name]()
        return name not in wrong

    return autotune.choose(key, list(ways), CPU, lambda: Trial(ways, is_right))


def on_disk():
    return json.loads((autotune.cache_dir() / "autotune.json").read_text())


def fail():
    raise RuntimeError("out of resources: shared memory")


def test_the_fastest_is_chosen_once_and_kept_on_disk(timed, monkeypatch):
    ways = {"a": lambda: 3.0, "b": lambda: 1.0, "c": lambda: 2.0}
    assert [choose("D 1024", ways) for _ in range(3)] == ["b"] * 3
    assert timed == ["a", "b", "c"]
    another_process(monkeypatch)
    assert autotune.choose("D 1024", list(ways), CPU, fail) == "b"
    assert len(timed) == 3
    record = {"choice": "b", "milliseconds": {"a": 3.0, "b": 1.0, "c": 2.0}}
    assert on_disk() == autotune.choices() == {"some GPU, D 1024": record}


def test_keys_are_chosen_apart_and_all_kept(timed):
    assert choose("D 1024", {"a": lambda: 1.0, "b": lambda: 2.0}) == "a"
    assert choose("D 2048", {"a": lambda: 2.0, "b": lambda: 1.0}) == "b"
    assert len(on_disk()) == 2


def test_a_way_that_fails_is_left_out(timed):
    assert choose("k", {"a": fail, "b": lambda: 9.0}) == "b"
    assert on_disk()["some GPU, k"]["left out"] == {"a": "RuntimeError: out of resources: shared memory"}


def test_a_wrong_result_never_wins_and_is_told(timed, caplog):
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        assert choose("k", {"a": lambda: 2.0, "fast": lambda: 1.0}, wrong=["fast"]) == "a"
    assert timed == ["a"]
    assert "leaves fast out" in caplog.text
    assert autotune.choices()["some GPU, k"]["left out"] == {"fast": "wrong result"}


def test_without_a_right_way_nothing_is_computed(timed):
    with pytest.raises(RuntimeError, match=r'(?s)no kernel gives the right result.*shared memory.*backend="torch"'):
        choose("k", {"a": fail, "b": lambda: 1.0}, wrong=["b"])
    assert not (autotune.cache_dir() / "autotune.json").exists()


def test_a_way_without_memory_is_not_left_out_for_good(timed):
    def exhaust():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        choose("k", {"a": exhaust, "b": lambda: 1.0})
    assert not (autotune.cache_dir() / "autotune.json").exists()


def test_inputs_that_tell_nothing_take_the_default_and_leave_the_choice_open(timed):
    assert autotune.choose("k", ["a", "b"], CPU, lambda: None) == "a"
    assert autotune.choices() == {}
    assert choose("k", {"a": lambda: 2.0, "b": lambda: 1.0}) == "b"


def test_a_choice_that_another_process_made_meanwhile_holds(timed):
    def slow():
        autotune._keep("some GPU, k", {"choice": "a"}, ["a", "b"])
        autotune._keep("some GPU, other", {"choice": "x"}, ["x"])
        return 1.0

    assert choose("k", {"a": lambda: 2.0, "b": slow}) == "a"
    assert {key: record["choice"] for key, record in on_disk().items()} == {"some GPU, k": "a", "some GPU, other": "x"}


def test_a_choice_that_is_no_more_is_made_anew(timed, monkeypatch):
    choose("k", {"a": lambda: 2.0, "old": lambda: 1.0})
    another_process(monkeypatch)
    assert choose("k", {"a": lambda: 2.0, "new": lambda: 1.0}) == "new"


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "[" * 100_000, '{"some GPU, k": "a"}', '{"some GPU, k": {"choice": [5]}}']
)
def test_a_damaged_file_costs_timings_alone(timed, content):
    autotune.cache_dir().mkdir()
    (autotune.cache_dir() / "autotune.json").write_text(content)
    assert choose("k", {"a": lambda: 2.0, "b": lambda: 1.0}) == "b"


def test_a_cache_that_cannot_be_written_costs_timings_alone(timed, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose("k", {"a": lambda: 2.0, "b": lambda: 1.0}) == "b"


def test_without_a_gpu_it_is_the_default(timed, monkeypatch):
    ways = {"a": lambda: 2.0, "b": lambda: 1.0}
    monkeypatch.undo()
    assert choose("k", ways) == "a"
    assert not timed


def test_a_change_of_the_kernels_changes_the_key(monkeypatch, tmp_path):
    source = tmp_path / "head.py"
    source.write_text("a")
    monkeypatch.setattr(autotune, "__file__", str(tmp_path / "autotune.py"))
    before = autotune._source_hash()
    source.write_text("b")
    assert autotune._source_hash() != before


def test_a_run_keeps_its_choices(timed, tmp_path):
    from dpo_fast.training.reporter import CHOICES_FILE, KernelChoices, read_choices

    kept = KernelChoices(tmp_path)
    kept.write()
    assert not (tmp_path / CHOICES_FILE).exists()
    choose("k", {"a": lambda: 2.0, "b": lambda: 1.0})
    kept.write()
    assert json.loads((tmp_path / CHOICES_FILE).read_text()) == autotune.choices()
    assert read_choices(tmp_path) == autotune.choices()
    (tmp_path / CHOICES_FILE).unlink()
    assert read_choices(tmp_path) == {}
    kept.write()
    assert not (tmp_path / CHOICES_FILE).exists(), "written again without a change"


@pytest.mark.parametrize(("autotune_it", "taken"), [(True, "fast"), (False, "default")])
def test_the_head_chooses_only_if_it_is_told_to(timed, monkeypatch, autotune_it, taken):
    from dpo_fast.kernels import linear_logprob_gpu as gpu
    from dpo_fast.kernels.head import Head

    called = []
    variants = {name: lambda *_, name=name: called.append(name) for name in ("default", "fast")}
    monkeypatch.setattr(gpu, "_variants", lambda *_, **__: variants)
    monkeypatch.setattr(gpu, "_block_rows", lambda *_, **__: 4)
    monkeypatch.setattr(gpu, "_empty_exponentials", lambda *_: None)
    trial = Trial({"default": lambda: 2.0, "fast": lambda: 1.0}, lambda _: True)
    monkeypatch.setattr(gpu, "make_trial", lambda *_, **__: trial)
    head = Head(torch.zeros(8, 16), None, None, 1.0, torch.float32, autotune=autotune_it)
    gpu._exponentials(head, torch.zeros(4, 16), *[torch.zeros(4)] * 3, None, None)
    assert called == [taken]
