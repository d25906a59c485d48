"""People judge answers: two at a time, on a page of this machine or in the terminal."""

from dpo_fast.curate.by_hand.run import run_by_hand

__all__ = ["run_by_hand"]
