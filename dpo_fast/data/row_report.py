"""What became of every row: counted by cause, with the first row numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dpo_fast.data.pair_totals import PairTotals
from dpo_fast.packs.layout import Group

DROPPED = {
    "broken_json": "not valid JSON",
    "wrong_type": "a field of a wrong type",
    "missing_field": "a field is missing",
    "empty_answer": "an answer is empty",
    "identical_answers": "both answers are the same",
    "media": "images, video and sound are not supported yet",
    "no_assistant_turn": "an answer holds no turn of the assistant",
    "nothing_scored": "max_length leaves no scored token of an answer",
    "tied_scores": "no two responses differ in score, by min_score_gap at least",
    "template_error": "the chat template refuses the messages",
    "prompt_fills_max_length": "the prompt alone fills max_length",
    "too_long": "longer than max_length (truncation_mode drop)",
    "identical_after_truncation": "the answers differ only beyond max_length",
}
CHANGED = {
    "truncated": "an answer lost its end to max_length",
    "prompt_truncated": "the prompt lost its start to max_length",
    "boundary_moved": "the prompt's last tokens merge with the answer's first, or are rendered otherwise before it; "
    "the answer begins before them",
    "differs_from_inference": "an answer is scored in another text than inference would have it",
    "reasoning_lost": "the chat template strips an answer's reasoning",
    "tools_lost": "the chat template leaves out the row's tools",
    "prompt_repeated": "the answers begin with the whole prompt; their copy of it was removed",
    "duplicate_keys": "a JSON object names a key twice; its last value was read",
    "end_token_removed": "an answer ends in the template's own end of turn; it is written once",
    "end_token_added": "the chat template gives no end token; the tokenizer's was added",
    "no_end_token": "no end token: the tokenizer has none, so the model cannot learn to stop",
    "no_prompt_token": "no token stands before the answers; their first tokens are not scored",
}
NOTED = {
    "duplicate": "the same pair as an earlier one",
    "contradictory": "the same pair as an earlier one, the other way round",
    "near_identical": "the two answers are nearly the same",
    "plain_text": "strings are read as plain text, although the tokenizer has a chat template; --apply_chat_template "
    "true wraps them as turns, false says that plain text is meant",
}
SHOWN_ROWS = 5


class RowError(Exception):
    """A row that cannot be used."""

    def __init__(self, cause: str, message: str) -> None:
        assert cause in DROPPED
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Finding:
    """A cause that was counted: what became of its rows, their number, the first places, the first row's message."""

    verb: str
    cause: str
    count: int
    sentence: str
    places: str
    message: str


@dataclass
class DataReport:
    """Counts of one source.

    Attributes:
        source: file or data set.
        rows_read: rows seen.
        rows_used: rows that became a group.
        causes: for each cause (`DROPPED`, `CHANGED`, `NOTED`) the places of its rows, such as `line 12`.
        first_message: for each cause its first row's message.
        unused: columns that hold something and were not read, each with the known name that it resembles, or None.
        totals: of the pairs.
        example: the first row that is used, as it is trained on.
        tokens: with each prompt once.
        tokens_unshared: with one copy of the prompt per answer.
        tokens_padded: with every sequence padded to the longest of all.
    """

    source: str
    rows_read: int = 0
    rows_used: int = 0
    causes: dict[str, list[str]] = field(default_factory=dict)
    first_message: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str | None] = field(default_factory=dict)
    totals: PairTotals = field(default_factory=PairTotals)
    example: str = ""
    tokens: int = 0
    tokens_unshared: int = 0
    tokens_padded: int = 0

    def count(self, cause: str, place: str, message: str = "") -> None:
        """One more row of a cause."""
        assert cause in DROPPED or cause in CHANGED or cause in NOTED
        self.causes.setdefault(cause, []).append(place)
        self.first_message.setdefault(cause, message)

    def finish(self, groups: list[Group]) -> None:
        """Add up the tokens of what is used."""
        self.rows_used = len(groups)
        self.tokens = sum(group.num_tokens for group in groups)
        self.tokens_unshared = sum(group.num_unshared_tokens for group in groups)
        longest = max((len(g.prompt_ids) + max(map(len, g.answers)) for g in groups), default=0)
        self.tokens_padded = longest * sum(len(group.answers) for group in groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "source": self.source,
            "rows_read": self.rows_read,
            "rows_used": self.rows_used,
            "dropped": {cause: len(rows) for cause, rows in self.causes.items() if cause in DROPPED},
            "changed": {cause: len(rows) for cause, rows in self.causes.items() if cause in CHANGED},
            "noted": {cause: len(rows) for cause, rows in self.causes.items() if cause in NOTED},
            "unused_columns": list(self.unused),
            "pairs": self.totals.pairs,
            "chosen_longer": self.totals.chosen_longer,
            "rejected_longer": self.totals.rejected_longer,
            "ends": dict(self.totals.ends),
            "tokens": self.tokens,
            "tokens_unshared": self.tokens_unshared,
            "tokens_padded": self.tokens_padded,
        }

    def findings(self) -> Iterator[Finding]:
        """The causes that there are, in the order of their kinds."""
        for verb, sentences in (("dropped", DROPPED), ("changed", CHANGED), ("noted", NOTED)):
            for cause, sentence in sentences.items():
                if cause in self.causes:
                    places, message = self.causes[cause], self.first_message[cause]
                    message = f"{places[0]}: {message}" if message else ""
                    yield Finding(verb, cause, len(places), sentence, self._places(cause), message)

    def remarks(self) -> Iterator[str]:
        """What else is worth a line."""
        if self.unused:
            names = (repr(name) + (f" (did you mean {near!r}?)" if near else "") for name, near in self.unused.items())
            yield f"unused columns: {', '.join(names)}"
        yield from self.totals.lines()

    def render(self) -> str:
        """A few lines for the terminal."""
        lines = [f"{self.source}: {self.rows_read} rows read, {self.rows_used} used"]
        for found in self.findings():
            lines.append(f"  {found.verb} {found.count}: {found.sentence} [{found.cause}; {found.places}]")
            if found.message:
                lines.append(f"    {found.message}")
        lines += [f"  {line}" for line in self.remarks()]
        if self.example:
            lines.append(f"  first row, ⟦scored⟧: {self.example}")
        if self.tokens:
            lines.append(
                f"  {self.tokens} tokens with each prompt once; {self.tokens_unshared} with a copy per answer, "
                f"{self.tokens_padded} padded to the longest"
            )
        return "\n".join(lines)

    def _places(self, cause: str) -> str:
        places = self.causes[cause]
        return ", ".join(places[:SHOWN_ROWS]) + (", ..." if len(places) > SHOWN_ROWS else "")
