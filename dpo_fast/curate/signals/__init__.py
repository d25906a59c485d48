"""What judges an answer.

registry  signals by name, and the score of an answer
text      what parses, matches, is near a number
command   a checker of the user's own
models    reward models; judge, a model that compares
"""

from dpo_fast.curate.verdict import Unjudged

__all__ = ["Unjudged"]
