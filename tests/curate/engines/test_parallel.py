"""Work in flight: bounded, in the order of arrival, nothing that arrived is lost."""

import threading
import time
from collections import deque

import pytest

from dpo_fast.curate.engines.parallel import in_parallel


def test_a_job_is_in_flight_until_its_result_is_taken():
    """Then a kill at any moment repeats at most `limit` jobs."""
    started, most = [], 0
    taken = 0
    for batch in in_parallel(range(50), lambda job: started.append(job) or job, 4):
        # The threads have nothing left to start before the next list is asked for.
        most = max(most, len(started) - taken)
        assert len(started) - taken <= 4
        taken += len(batch)
    assert most == 4
    assert sorted(started) == list(range(50))


def test_results_come_in_the_order_of_arrival():
    may_end = threading.Event()
    order = []
    for batch in in_parallel(["slow", "quick"], lambda job: job == "quick" or may_end.wait(10), 2):
        order += [job for job, _ in batch]
        may_end.set()
    assert order == ["quick", "slow"]


def test_jobs_that_are_added_come_before_the_others():
    again = deque()
    done = []
    for batch in in_parallel([1, 2, 3], lambda job: job, 1, again):
        ((job, _),) = batch
        if job == 1:
            again.append(10)
        done.append(job)
    assert done == [1, 10, 2, 3]


def test_results_that_arrived_with_a_failure_come_first():
    ended = threading.Semaphore(0)

    def work(job):
        try:
            if job == "bad":
                raise ValueError("no such thing")
            return job
        finally:
            ended.release()

    results = in_parallel(["first", "bad", "good"], work, 1)
    assert next(results) == [("first", "first")]
    with pytest.raises(ValueError, match="no such thing"):
        next(results)

    held = threading.Event()
    results = in_parallel(["first", "bad", "good"], lambda job: (job == "first" or held.wait(10)) and work(job), 3)
    assert next(results) == [("first", "first")]
    held.set()
    for _ in range(4):
        assert ended.acquire(timeout=10)
    time.sleep(0.1)  # from the end of the work to its arrival
    assert next(results) == [("good", "good")]
    with pytest.raises(ValueError, match="no such thing"):
        next(results)
