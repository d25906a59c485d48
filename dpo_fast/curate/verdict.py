"""What a signal says about one answer: a score, or why there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from dpo_fast.errors import WriteError

if TYPE_CHECKING:
    from dpo_fast.curate.rows import Row

MESSAGE_LENGTH = 200


class Unjudged(Exception):
    """A signal has no score for this answer; the message says why."""


class Worst(Exception):
    """An answer that a signal ranks below every scored answer of its row; the message says why.

    No fixed score could express that: an answer without a number must lose to one that is wrong by any amount, yet a
    score of -1e300 would drown every other signal, and every loss that reads score gaps.
    """


TextSignal: TypeAlias = "Callable[[str, Row], float]"


class Verdict(NamedTuple):
    """A score or None, and why it is None or what was wrong with the answer."""

    score: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Question:
    """A row to judge.

    Attributes:
        row: all its columns.
        prompt: a string or messages.
        answers: the text of each answer.
    """

    row: Row
    prompt: Any
    answers: list[str]


def verdict_of(signal: TextSignal, answer: str, row: Row) -> Verdict:
    """Call a signal. Whatever it raises or returns becomes a verdict, unless it ends the process.

    Raises:
        WriteError: this machine has no room for what the signal needs, which says nothing about the answer.
    """
    try:
        score = float(signal(answer, row))
    except WriteError:
        raise
    except Unjudged as error:
        return Verdict(None, shorten(str(error)))
    except Worst as error:
        return Verdict(-math.inf, shorten(str(error)))
    except (Exception, SystemExit) as error:
        return Verdict(None, shorten(describe(error)))
    if not math.isfinite(score):
        return Verdict(None, f"the score is {score}; expected a finite number")
    return Verdict(score)


def rank_worst_last(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """One signal's verdicts on a row, its worst answers scored 1 below the lowest of the others."""
    lowest = min((v.score for v in verdicts if v.score is not None and v.score != -math.inf), default=0.0)
    return [Verdict(lowest - 1, v.reason) if v.score == -math.inf else v for v in verdicts]


def describe(error: BaseException) -> str:
    """`ValueError: message`, or the name alone if making the message fails."""
    name = type(error).__name__
    try:
        return f"{name}: {error}" if str(error) else name
    except Exception:
        return name


def shorten(message: str) -> str:
    """A message as one line of at most `MESSAGE_LENGTH` characters that any file can hold."""
    line = " ".join(message[: 4 * MESSAGE_LENGTH].split()).encode(errors="replace").decode()
    return line if len(line) <= MESSAGE_LENGTH else line[: MESSAGE_LENGTH - 1] + "…"
