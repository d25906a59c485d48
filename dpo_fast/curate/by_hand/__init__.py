"""People judge answers: two at a time, on a page served to this machine or in the terminal.

items        rows -> what a person sees of them
comparisons  which answers are compared, in which order and on which side
session      the judgements of one person, kept on disk
server       the page; terminal, the same without a browser
run          the command
"""

from dpo_fast.curate.by_hand.run import run_by_hand

__all__ = ["run_by_hand"]
