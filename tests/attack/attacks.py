"""Attacks: one random way of losing somebody's work, by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

Attack = Callable[[random.Random, Path], None]
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    """Register an attack: it gets a seeded generator and an empty folder, and raises AssertionError on a loss."""
    assert function.__name__ not in ATTACKS, f"two attacks are named {function.__name__}"
    ATTACKS[function.__name__] = function
    return function


def flip_a_bit(file: Path, rng: random.Random) -> None:
    """Change one bit of a file that is not empty."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
