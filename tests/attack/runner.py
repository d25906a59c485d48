"""Attack until the time is over: kills, flipped bits and whatever else the modules `*_attacks.py` hold.

    make attack SEED=1 MINUTES=20
    python tests/attack/runner.py --seed 1 --minutes 20
    python tests/attack/runner.py --only NAME --seed 1 --first 17 --count 1    # repeats one attack of a run

An attack's random choices depend on the seed and its number only, so each line that reports a loss can be repeated.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))
from attacks import ATTACKS

# As the command does: transformers draws bars otherwise.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

HERE = Path(__file__).resolve().parent


def load_attacks() -> dict[str, object]:
    """All attacks by name, from the modules next to this one."""
    for module in sorted(HERE.glob("*_attacks.py")):
        importlib.import_module(module.stem)
    return dict(sorted(ATTACKS.items()))


def perform(name: str, seed: int, number: int) -> str | None:
    """Perform one attack in a folder of its own; what was lost, or None."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            ATTACKS[name](random.Random(f"{name} {seed} {number}"), Path(folder))
        except Exception:
            return traceback.format_exc()
    return None


def attack_until(deadline: float, seed: int, *, names: list[str], first: int, count: int | None) -> list[str]:
    """Perform all attacks in turn until the deadline (monotonic seconds), each at least once; the losses."""
    done, losses, number = Counter(), [], first
    while (time.monotonic() < deadline or number == first) and (count is None or number < first + count):
        for name in names:
            done[name] += 1
            if (loss := perform(name, seed, number)) is not None:
                losses.append(f"{name}, repeat with --only {name} --seed {seed} --first {number} --count 1\n{loss}")
                print(f"LOST: {losses[-1]}", flush=True)
        number += 1
    print(", ".join(f"{name} {times}" for name, times in done.items()), f"-> {len(losses)} lost", flush=True)
    return losses


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--only", action="append", help="name of an attack; may be repeated")
    parser.add_argument("--first", type=int, default=0, help="number of the first attack")
    parser.add_argument("--count", type=int, help="attacks of each name; default: until the time is over")
    options = parser.parse_args()
    names = options.only or list(load_attacks())
    load_attacks()
    deadline = time.monotonic() + 60 * options.minutes
    return bool(attack_until(deadline, options.seed, names=names, first=options.first, count=options.count))


if __name__ == "__main__":
    sys.exit(main())
