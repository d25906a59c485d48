"""The search: what fits, the fastest of it, and what must not be changed for it."""

from dataclasses import replace

import pytest

from dpo_fast.planning.choose import Free, Planned, choose, enumerate_settings, ways_out
from dpo_fast.planning.hardware import CARDS, GIB
from dpo_fast.planning.setting import Setting
from dpo_fast.planning.shapes import named_config, shape_of
from dpo_fast.planning.workload import TypicalWorkload

SHAPE = shape_of(named_config("llama-3-8b"), "llama-3-8b")
HALF = Setting(weight_bytes=2, optim="adamw_8bit")
ALL = Free(precision=True, optimizers=("adamw_torch", "adamw_8bit"))


def on(memory_gib, setting=HALF):
    return Planned(SHAPE, setting, replace(CARDS["h100-80"], memory=memory_gib * GIB), TypicalWorkload(8, 1024))


def test_what_fits_as_asked_is_left_alone():
    asked = on(140)
    best, others = choose(asked, ALL)
    assert asked.fits
    assert best is asked
    assert all(other.fits for other in others)


def test_the_fastest_that_gives_the_same_results_is_chosen():
    asked = on(70)
    best, _ = choose(asked, Free())
    same = [planned for planned in enumerate_settings(asked, Free()) if planned.fits]
    assert not asked.fits
    assert best.fits
    assert best.time.total == min(planned.time.total for planned in same)
    kept = {"weight_bytes", "autocast", "optim", "peft", "gpus", "head_budget"}
    assert all(getattr(best.setting, name) == getattr(asked.setting, name) for name in kept)


def test_precision_is_given_up_last():
    asked = on(79.6, Setting(autocast=True))
    refused, _ = choose(asked, Free(optimizers=ALL.optimizers))
    assert refused is asked
    assert not refused.fits
    best, others = choose(asked, ALL)
    assert (best.fits, best.tier) == (True, min(other.tier for other in [best, *others] if other.fits))
    assert choose(on(110, Setting(autocast=True)), ALL)[0].tier == 1


def test_only_optimizers_that_train_has_are_chosen():
    for planned in enumerate_settings(on(70, Setting(autocast=True)), ALL):
        assert planned.setting.optim in ALL.optimizers
        assert planned.missing == ""


def test_what_train_lacks_is_said_and_only_planned_when_asked():
    assert choose(on(80, replace(HALF, gpus=8)), ALL)[0].missing == ""
    shared = on(80, replace(HALF, gpus=8, peft="lora", sharded=True))
    assert shared.missing == "--parallel fsdp with --peft lora"


def test_eight_cards_hold_what_one_does_not():
    shape = shape_of(named_config("llama-3-70b"), "llama-3-70b")
    one = replace(on(140.4), shape=shape)
    eight = replace(one, setting=replace(HALF, gpus=8))
    assert not choose(one, Free())[0].fits
    best, _ = choose(eight, Free())
    assert best.fits
    assert best.setting.sharded


def test_ways_out_are_cheap_and_few():
    found = ways_out(on(79.6, Setting(autocast=True)), Free(optimizers=ALL.optimizers))
    assert 0 < len(found) <= 3
    assert all(planned.fits for planned in found)
    assert [planned.tier for planned in found] == sorted(planned.tier for planned in found)


def test_a_budget_never_falls_below_the_longest_row():
    asked = replace(on(20), workload=TypicalWorkload(8, 2048))
    budgets = {planned.setting.max_tokens for planned in enumerate_settings(asked, Free())}
    assert budgets == {8192, 4096}


@pytest.mark.parametrize(("max_length", "fits"), [(32_768, True), (262_144, False)])
def test_one_long_pair(max_length, fits):
    """A pair whose prompt and answers have 16k tokens each, with everything recomputed and offloaded."""
    setting = replace(HALF, policy="full", offload=True)
    planned = replace(on(140.4, setting), workload=TypicalWorkload(1, max_length))
    assert planned.fits == fits
