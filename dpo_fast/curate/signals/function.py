"""`python:module:function`: a function of the user's judges one answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from dpo_fast.config import SignalConfig
from dpo_fast.curate.identity import function_identity
from dpo_fast.curate.signals.declare import Limits, bad_spec, text_signal
from dpo_fast.curate.verdict import TextSignal, Unjudged
from dpo_fast.user_code import load_function

if TYPE_CHECKING:
    from dpo_fast.curate.rows import Row


@text_signal("python:module:function", limits=Limits(memory=False), is_slow=True, identity=function_identity)
def own_function(argument: str, config: SignalConfig) -> TextSignal:
    """`python:module:function`: the number or boolean that `function(answer, row)` returns."""
    if not argument.partition(":")[2]:
        raise bad_spec(f"python:{argument}", "python:module:function")
    return partial(_call, load_function(argument, f"--signals python:{argument}"))


def _call(function: Callable[[str, Row], Any], answer: str, row: Row) -> float:
    score = function(answer, row)
    try:
        return float(score)
    except (TypeError, ValueError):
        raise Unjudged(f"the function returned {type(score).__name__}; expected a number or a boolean") from None
