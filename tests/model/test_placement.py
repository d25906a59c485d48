"""Devices, and what else runs on a processor."""

import pytest
import torch

from dpo_fast.errors import UserError
from dpo_fast.model.placement import busy_cpu, pick_device


@pytest.mark.parametrize(("load", "threads", "is_said"), [(0.4, 2, False), (3.0, 2, True), (3.0, 1, False)])
def test_a_busy_machine_is_said(load, threads, is_said, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    note = busy_cpu()
    assert bool(note) is is_said
    if is_said:
        assert note.startswith("this machine is busy (load 3.0 on 2 cores), and PyTorch's 2 threads wait")


@pytest.mark.parametrize("name", ["meta", "mps", "tpu", "cuda:99", ""])
def test_devices_that_are_not_there(name):
    with pytest.raises(UserError, match=rf"^--device {name}: "):
        pick_device(name)
