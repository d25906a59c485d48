"""Bits that change in a checkpoint's files after they were written."""

from __future__ import annotations

import random
from pathlib import Path

from attacks import attack, flip_a_bit

from dpo_fast.files import MANIFEST
from dpo_fast.training.checkpoint import save_checkpoint, verify_checkpoint


@attack
def flipped_bit_in_a_checkpoint(rng: random.Random, folder: Path) -> None:
    """Whatever file of a checkpoint the bit lies in, its manifest included."""

    def write(checkpoint: Path) -> None:
        for number in range(3):
            (checkpoint / f"part-{number}").write_bytes(rng.randbytes(rng.randint(1, 5000)))

    checkpoint = save_checkpoint(folder, 1, write, keep=None)
    file = checkpoint / rng.choice(["part-0", "part-1", "part-2", MANIFEST])
    flip_a_bit(file, rng)
    # Not every bit of the manifest matters: a digit of its step may change, and the other files are whole.
    assert verify_checkpoint(checkpoint) or file.name == MANIFEST, f"a bit of {file.name} changed, and nobody noticed"
