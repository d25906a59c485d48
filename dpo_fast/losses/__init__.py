"""Preference losses, each written once.

pairs       what a loss reads of a pair
formulas    every loss, a pure function of pairs: `LOSSES`
objective   what a run minimises: one loss, a weighted list, or one of your own
from_packs  sums over the answers of a pack, pair by pair
"""

from dpo_fast.losses.formulas import LOSSES

__all__ = ["LOSSES"]
