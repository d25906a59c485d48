"""What steps compute, against the packs that a run really makes."""

import numpy as np
import pytest

from dpo_fast.config import DPOConfig
from dpo_fast.packs.layout import Group, pack
from dpo_fast.planning.setting import PackLoad
from dpo_fast.planning.workload import RowWorkload, TypicalWorkload
from dpo_fast.training.plan import Plan


def group(row, prompt, *answers):
    return Group(row, np.zeros(prompt, np.int32), tuple(np.zeros(n, np.int32) for n in answers))


GROUPS = [group(i, 10 + i, 4 + 2 * i, 6) for i in range(7)] + [group(7, 0, 5, 9)]


def test_a_pack_is_counted_as_it_is_laid_out():
    batch, load = pack(GROUPS), PackLoad.of(GROUPS)
    assert (load.tokens, load.keys, load.targets) == (batch.num_tokens, len(batch.kv_index), len(batch.targets))
    assert load.pairs == batch.num_pairs
    segments = list(zip(batch.cu_seqlens_q.diff().tolist(), batch.cu_seqlens_k.diff().tolist(), strict=True))
    causal = sum(int(np.tril(np.ones((q, k)), k - q).sum()) for q, k in segments)
    assert load.scores == causal


def test_packs_are_those_of_the_run():
    config = DPOConfig(model="m", max_length=32, per_device_train_batch_size=2, max_tokens_per_batch=70)
    plan = Plan.of(config, GROUPS, [])
    workload = RowWorkload(GROUPS, rows_per_step=plan.rows_per_step, seed=plan.seed)
    made = [[PackLoad.of([GROUPS[i] for i in packed]) for packed in next(plan.sampler(GROUPS)).packs]]
    assert workload.steps(70)[:1] == made
    assert workload.longest == max(g.num_tokens for g in GROUPS)
    largest = max(demand.load.tokens for demand in workload.demands(70))
    assert largest == max(load.tokens for step in workload.steps(70) for load in step)


def test_static_shapes_fill_packs():
    workload = RowWorkload(GROUPS, rows_per_step=2, seed=0, static_shapes=True)
    assert {load.tokens for step in workload.steps(100) for load in step} == {100}


def test_typical_pairs_keep_to_max_length():
    short, free = TypicalWorkload(8, 64), TypicalWorkload(8, None)
    assert short.longest == 96
    step = short.steps(2048)[0]
    assert sum(load.pairs for load in step) == pytest.approx(8)
    assert sum(load.tokens for load in step) < sum(load.tokens for load in free.steps(8192)[0]) / 4
    assert free.demands(8192)[0].load.tokens == 8192
