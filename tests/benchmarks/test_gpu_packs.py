"""The benchmark of packs on a GPU, as far as a CPU can run it: its two layouts compute the same."""

import sys
from pathlib import Path

import pytest
import torch
from oracle import tiny_llama

from dpo_fast.model.attention import use_packed_attention
from dpo_fast.model.policy import Policy

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu_packs

pytestmark = pytest.mark.slow


def tiny_policy(**sizes):
    model = tiny_llama()
    use_packed_attention(model)
    return Policy(model, device=torch.device("cpu"), memory_budget=2**30)


def test_runs_with_a_fixed_order_are_compared(monkeypatch):
    monkeypatch.setattr(gpu_packs, "make_policy", tiny_policy)
    monkeypatch.setattr(gpu_packs, "interleaved", lambda functions, rounds: [f() for f in functions.values()] and {})
    out = gpu_packs.time_determinism({}, prompt=8, answer=4, pairs=2)
    assert (out["same bits in a fixed order"], out["failed"]) == (True, [])


def test_packs_without_sharing_score_the_same_tokens(monkeypatch):
    policy = tiny_policy()
    found = []

    def interleaved(functions, rounds):
        found.append([function().item() for function in functions.values()])
        return {"shared": 1.0, "unshared": 2.0}

    monkeypatch.setattr(gpu_packs, "make_policy", lambda: policy)
    monkeypatch.setattr(gpu_packs, "interleaved", interleaved)
    out = gpu_packs.time_sharing({}, [(512, 512), (2048, 512), (4096, 64)], pairs=1)
    assert len(found) == 3
    for shared, unshared in found:
        assert shared == pytest.approx(unshared, rel=1e-5)
    assert out["512/512"]["fewer tokens"] == 2048 / 1536
    assert out["4096/64"]["faster"] == 2
    assert not out["failed"]


def test_every_way_is_checked():
    from dpo_fast.kernels.attention_backends import BACKENDS

    assert gpu_packs.CAN.keys() == BACKENDS.keys()
