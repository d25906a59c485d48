"""What values a setting may have, declared where the setting is.

    max_rows: int | None = number(None, least=1)

`Settings` checks every field when an object is made, for the command line and for Python callers alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from dpo_fast.errors import UserError

# A count beyond this is a slip, and would overflow somewhere below.
LARGEST_INT = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """Bounds of a number; `above` and `below` leave the bound itself out."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and (not isinstance(value, int) or abs(value) <= max(LARGEST_INT, self.most or 0))
        )

    def __str__(self) -> str:
        low = self.above if self.least is None else self.least
        high = self.below if self.most is None else self.most
        if low is None and high is None:
            return "expected a finite number"
        if high is None:
            return f"expected a number above {low:g}" if self.least is None else f"expected a number, {low:g} or above"
        left, right = "(" if self.least is None else "[", ")" if self.most is None else "]"
        return f"expected a number in {left}{'-inf' if low is None else f'{low:g}'}, {high:.10g}{right}"


ANY = Range()


def number(default: Any, **bounds: float) -> Any:
    """A field that holds a number, a list of numbers, or null where that is the default; bounds as in `Range`."""
    return field(default=default, metadata={"range": Range(**bounds)})


@dataclass
class Settings:
    """The base of all settings."""

    def __post_init__(self) -> None:
        """As `check`."""
        self.check()

    def check(self) -> None:
        """Refuse values that no command can use.

        Raises:
            UserError: it names the option, the value and what was expected.
        """
        for declared in fields(self):
            if fault := _fault(declared, getattr(self, declared.name)):
                value = getattr(self, declared.name)
                raise UserError(f"--{declared.name} {value}: {fault}{', or null' * _may_be_null(declared)}")


def _fault(declared: Field[Any], value: Any) -> str:
    """What is wrong with a field's value; empty if nothing is."""
    if isinstance(value, str):
        if "\0" in value:
            return "expected text without a zero byte"
        # An empty name of a column means none.
        may_be_empty = declared.default in ("", MISSING) or declared.name.endswith("_column")
        return "" if value or may_be_empty else "expected a value, found none"
    expected: Range = declared.metadata.get("range", ANY)
    outside = [number for number in _numbers(value) if number not in expected]
    if any(isinstance(number, int) and number > LARGEST_INT for number in outside) and expected.most is None:
        return f"expected a number of at most {LARGEST_INT}"
    return str(expected) if outside else ""


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _may_be_null(declared: Field[Any]) -> bool:
    return "None" in str(declared.type)
