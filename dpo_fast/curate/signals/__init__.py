"""What judges an answer: each module declares its signals where it defines them.

declare       `@text_signal` and `@row_signal`, and what a signal declares
registry      every module of this folder, imported; `--signals` -> signals
text          what compiles, matches, is near a number
json_text     what parses as JSON, what a schema allows
function      a Python function of yours
command       a program of yours
field         scores that the row already holds
models        what signals that ask a model share
reward_model  a sequence classifier
judge         a language model that compares two answers

A new signal is a new module here, and nothing else: help, error messages and the check of docs/signals.md follow. The
processes that judge import all of these modules, so none may import PyTorch before a model is needed.
"""

from dpo_fast.curate.verdict import Unjudged, Worst

__all__ = ["Unjudged", "Worst"]
