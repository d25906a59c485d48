"""A bounded part of `make attack`: each attack once, then more of them while a minute lasts."""

import time

import pytest
from runner import attack_until, load_attacks

pytestmark = pytest.mark.slow


def test_a_minute_of_attacks_loses_nothing():
    losses = attack_until(time.monotonic() + 30, 0, names=list(load_attacks()), first=0, count=None)
    assert not losses, "\n".join(losses)
