r"""hh-rlhf's conversations: one string of `\n\nHuman:` and `\n\nAssistant:` turns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dpo_fast.data.conversation import Message, common_length
from dpo_fast.data.row_report import RowError

Span = tuple[int, int]
_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ANSWER = "\n\nAssistant:"


def are_transcripts(values: Sequence[Any]) -> bool:
    """Whether all of them are such strings."""
    return all(isinstance(v, str) and v.startswith("\n\nHuman:") and _ANSWER in v for v in values)


def transcript_messages(text: str) -> list[Message]:
    """A transcript as messages."""
    return [{"role": role, "content": content.strip()} for role, content, _ in _turns(text)]


def split_transcripts(texts: Sequence[str]) -> tuple[str, list[str], list[list[Span]]]:
    """Transcripts as plain text.

    Returns:
        The prompt: the turns that all have in common, up to `Assistant:`. The answers. The spans of characters in each
        answer that are the assistant's.

    Raises:
        RowError: they part at another one's turn, or an answer is empty.
    """
    turns = [_turns(text) for text in texts]
    common = min(common_length(turns), *(len(t) - 1 for t in turns))
    if any(t[common][0] != "assistant" for t in turns):
        raise RowError("missing_field", "the transcripts part at a turn that is not the assistant's")
    prompt = "".join(raw for _, _, raw in turns[0][:common]) + _ANSWER
    answers, spans = [], []
    for own in turns:
        answer, targets = "", []
        for role, _, raw in own[common:]:
            start = len(answer) + (len(_ANSWER) if answer else 0)
            answer += raw if answer else raw.removeprefix(_ANSWER)
            if role == "assistant":
                targets.append((start, len(answer)))
        if not own[-1][1].strip():
            raise RowError("empty_answer", "the last turn of a transcript is empty")
        answers.append(answer)
        spans.append(targets)
    return prompt, answers, spans


def _turns(text: str) -> list[tuple[str, str, str]]:
    """(role, content, raw text) of each turn of a transcript."""
    marks = list(_TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        ({"Human": "user", "Assistant": "assistant"}[mark[1]], text[mark.end() : end], text[mark.start() : end])
        for mark, end in zip(marks, ends, strict=True)
    ]
