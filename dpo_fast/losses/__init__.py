"""Preference losses, each written once.

pairs       what a loss reads of a pair
facts       what a loss needs and reads; `LOSSES`, by name
formulas    every loss, a pure function of pairs
objective   what a run minimises: one loss, a weighted list, or one of your own
from_packs  sums over the answers of a pack, pair by pair
"""

import dpo_fast.losses.formulas  # noqa: F401  its functions enter themselves
from dpo_fast.losses.facts import LOSSES

__all__ = ["LOSSES"]
