"""Seconds of a step, against what an H200 took."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from h200_steps import FITTED_TO, SETTING, STEPS

from dpo_fast.planning.hardware import CARDS
from dpo_fast.planning.measured import OPTIMIZERS
from dpo_fast.planning.roofline import step_time
from dpo_fast.planning.setting import PackLoad, Setting
from dpo_fast.planning.shapes import named_config, shape_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H200 = CARDS["h200-141"]
LLAMA = shape_of(named_config("llama-3-8b"), "llama-3-8b")


@pytest.mark.parametrize("step", STEPS)
def test_steps_on_an_h200(step):
    packs, milliseconds = STEPS[step]
    assert 1e3 * step_time(LLAMA, SETTING, H200, packs).total == pytest.approx(milliseconds, rel=0.25)


def test_what_the_fitted_step_went_to():
    profile = json.loads((RESULTS / "h200-step-2026-11-26.json").read_text())["parts"]["8b dpo-fast 8"]["profile"]
    planned = step_time(LLAMA, SETTING, H200, STEPS[FITTED_TO][0])
    for name in ("products", "attention", "elementwise", "optimizer"):
        assert 1e3 * getattr(planned, name) == pytest.approx(profile["classes"][name]["ms"], rel=0.1), name
    assert 1e3 * planned.launches == pytest.approx(profile["idle ms"], rel=0.1)


@pytest.mark.parametrize("lengths", ["512/512", "2048/512", "4096/64"])
def test_another_model_that_nothing_was_fitted_to(lengths):
    """Forward and backward of eight layers of Qwen2.5-7B over two pairs, without an optimizer."""
    measured = json.loads((RESULTS / "h200-check-2026-11-26.json").read_text())["parts"]["sharing"][lengths]["ms"]
    prompt, answer = map(int, lengths.split("/"))
    shape = shape_of(named_config("qwen2.5-7b"), "qwen2.5-7b")
    parameters = shape.linear_parameters * 8 // shape.layers
    # The benchmark's vocabulary is small: its head and clipping are left out.
    eight = replace(
        shape, layers=8, linear_parameters=parameters, active_parameters=parameters, num_parameters=1, vocab=1024
    )
    load = PackLoad.typical(2 * (prompt + 2 * answer), prompt, answer)
    planned = 1e3 * step_time(eight, Setting(weight_bytes=2), H200, [load]).total
    assert planned == pytest.approx(measured["shared"], rel=0.25)


def test_optimizers_are_as_measured():
    found = json.loads((RESULTS / "h200-optimizer-2026-11-26.json").read_text())["parts"]["time"]
    milliseconds, held = found["ms per 1e9 parameters"], found["bytes per parameter with gradient"]
    ours, torch, bitsandbytes = (OPTIMIZERS[name] for name in ("adamw_8bit_fused", "adamw_torch", "adamw_8bit"))
    for name, ms, state, weight in (
        ("ours bf16+8", ours.ms_bf16, ours.state_bytes_bf16, 2),
        ("ours fp32", ours.ms_fp32, ours.state_bytes_fp32, 4),
        ("torch fused bf16", torch.ms_bf16, torch.state_bytes_bf16, 2),
        ("torch fused fp32", torch.ms_fp32, torch.state_bytes_fp32, 4),
        ("bitsandbytes AdamW8bit bf16", bitsandbytes.ms_bf16, bitsandbytes.state_bytes_bf16, 2),
    ):
        assert ms == pytest.approx(milliseconds[name], rel=0.01), name
        assert state + 2 * weight == pytest.approx(held[name], rel=0.01), name


def test_what_costs_time():
    load = [STEPS[4][0][0]]

    def seconds(**changes):
        return step_time(LLAMA, replace(SETTING, **changes), H200, load)

    assert seconds(policy="full").products == pytest.approx(seconds().products * (8 / 6), rel=0.03)
    assert seconds(policy="selective").products == seconds().products
    assert seconds().total < seconds(policy="selective").total < seconds(policy="full").total
    assert seconds(policy="full").total < seconds(policy="full", offload=True).total
    assert seconds(gpus=8, sharded=True).optimizer == pytest.approx(seconds().optimizer / 8)


def test_tiles_are_computed_whole():
    assert PackLoad.typical(3 * 128, 128, 128).tiles == 1 + 2 * 2
    assert PackLoad.typical(3 * 129, 129, 129).tiles == 3 + 2 * (3 + 3)
