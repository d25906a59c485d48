"""Two real processes."""

import json

import pytest
import torch
import torch.multiprocessing as mp
from two_ranks import share_and_sum

from dpo_fast.ranks import Ranks

pytestmark = pytest.mark.slow


def test_two_processes_share_and_sum(tmp_path):
    mp.spawn(share_and_sum, (tmp_path,), nprocs=2)
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert zero == {"writer": True, "share": [0, 2, 4], "total": [3, 30], "own": [1, 10]}
    assert one == {"writer": False, "share": [1, 3], "total": [3, 30], "own": [2, 20]}


def test_one_process_needs_no_group():
    ranks = Ranks.current()
    x = torch.ones(2)
    assert (ranks, ranks.is_writer, list(ranks.share(3))) == (Ranks(0, 1), True, [0, 1, 2])
    assert ranks.sum(x) is x
    ranks.wait()
