"""Comparisons of two answers: the question that judges are asked, and what wins and ties add up to."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dpo_fast.config import SignalConfig
from dpo_fast.curate.verdict import Verdict
from dpo_fast.errors import UserError

JUDGE_QUESTION = """\
Which of two answers to a request is better: more correct, more helpful and better written?

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Reply with the letter of the better answer, A or B, and nothing else."""
_FIELD = re.compile(r"\{(prompt|first|second)\}")


def question_of(config: SignalConfig) -> str:
    """The question with its three fields.

    Raises:
        UserError: it lacks an answer.
    """
    question = JUDGE_QUESTION if config.judge_question is None else config.judge_question
    if missing := {"first", "second"} - set(_FIELD.findall(question)):
        raise UserError(
            f"--judge_question: expected the fields {{prompt}}, {{first}} and {{second}}; it lacks {{{min(missing)}}}"
        )
    return question


def fill(question: str, **words: str) -> str:
    """The question about two answers. Other braces stay, and so do those in answers."""
    return _FIELD.sub(lambda field: words[field[1]], question)


@dataclass(frozen=True)
class Comparison:
    """Two answers of a row.

    Attributes:
        first: index of one answer.
        second: index of the other.
        place: index of its first order among all questions, followed by the second; None for identical answers.
        refused: why it cannot be asked.
    """

    first: int
    second: int
    place: int | None = None
    refused: Verdict | None = None


def win_shares(num_answers: int, plan: list[Comparison], preferences: list[float]) -> list[Verdict]:
    """The share of its comparisons that each answer won, from how much A was preferred each time."""
    won: list[list[float]] = [[] for _ in range(num_answers)]
    refused: dict[int, Verdict] = {}
    for comparison in plan:
        if comparison.refused:
            refused |= dict.fromkeys((comparison.first, comparison.second), comparison.refused)
            continue
        share = 0.5
        if comparison.place is not None:
            one, other = preferences[comparison.place], -preferences[comparison.place + 1]
            share = 1.0 if one > 0 and other > 0 else 0.0 if one < 0 and other < 0 else 0.5
        won[comparison.first].append(share)
        won[comparison.second].append(1 - share)
    alone = Verdict(None, "a judge needs two answers to compare")
    return [
        Verdict(sum(shares) / len(shares)) if shares else refused.get(number, alone)
        for number, shares in enumerate(won)
    ]
