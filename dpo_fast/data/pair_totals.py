"""What can be told of the pairs before training: copies, contradictions, near copies, lengths, ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from dpo_fast.packs.layout import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Answers that agree in this share of the longer one's tokens, at their beginning and end, are near-identical.
NEAR_IDENTICAL = 0.9
SHOWN_CHARS = 160


class PairTotals:
    """Counts over all pairs.

    Attributes:
        pairs: number of pairs.
        chosen_longer, rejected_longer: pairs whose chosen, or rejected, answer has more scored tokens.
        ends: how answers end: a special token's text, or "" for none.
    """

    def __init__(self) -> None:
        self.pairs = self.chosen_longer = self.rejected_longer = 0
        self.ends: Counter[str] = Counter()
        self._seen: set[bytes] = set()

    def add(self, group: Group, tokenizer: PreTrainedTokenizerBase, end_tokens: Collection[int]) -> list[str]:
        """Count a group's pairs; returns what is worth noting of them, causes of `row_report.NOTED`."""
        prompt, *answers = [xxhash.xxh3_128_digest(ids.tobytes()) for ids in (group.prompt_ids, *group.answers)]
        lengths = [len(group.targets(number)) for number in range(len(group.answers))]
        noted = []
        for chosen, rejected in group.pairs:
            self.pairs += 1
            self.chosen_longer += lengths[chosen] > lengths[rejected]
            self.rejected_longer += lengths[chosen] < lengths[rejected]
            pair = xxhash.xxh3_128_digest(prompt + answers[chosen] + answers[rejected])
            if pair in self._seen:
                noted.append("duplicate")
            if xxhash.xxh3_128_digest(prompt + answers[rejected] + answers[chosen]) in self._seen:
                noted.append("contradictory")
            if agreement(group.answers[chosen], group.answers[rejected]) >= NEAR_IDENTICAL:
                noted.append("near_identical")
            self._seen.add(pair)
        for answer in group.answers:
            # A template may write a line break after its end of turn.
            end = next((i for i in answer[:-3:-1].tolist() if i in end_tokens), None)
            self.ends["" if end is None else str(tokenizer.convert_ids_to_tokens(end))] += 1
        return list(dict.fromkeys(noted))

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        if self.pairs:
            longer = (
                f"{self.chosen_longer / self.pairs:.0%}, the rejected one in {self.rejected_longer / self.pairs:.0%}"
            )
            yield f"{self.pairs} pairs; the chosen answer is longer in {longer}"
            ends = (f"{end or 'no end token'} ({count})" for end, count in self.ends.most_common())
            yield f"answers end in {', '.join(ends)}"


def agreement(left: np.ndarray, right: np.ndarray) -> float:
    """Share of the longer sequence that two sequences have in common at their beginning and end."""
    shorter, longer = sorted((len(left), len(right)))
    start = _agreeing(left[:shorter] == right[:shorter])
    rest = shorter - start
    end = _agreeing(left[::-1][:rest] == right[::-1][:rest])
    return (start + end) / longer


def _agreeing(equal: np.ndarray) -> int:
    return len(equal) if equal.all() else int(equal.argmin())


def excerpt(group: Group, tokenizer: PreTrainedTokenizerBase) -> str:
    """The end of the prompt and the beginning of the first answer, scored text in double brackets."""

    def text(ids: np.ndarray) -> str:
        return repr(str(tokenizer.decode(ids.tolist(), skip_special_tokens=False)))[1:-1]

    prompt, answer = text(group.prompt_ids), group.answers[0]
    scored = np.zeros(len(answer), dtype=bool)
    scored[group.targets(0)] = True
    shown = f"...{prompt[-SHOWN_CHARS:]}" if len(prompt) > SHOWN_CHARS else prompt
    bounds = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(answer)]
    for first, last in pairwise(bounds):
        part = text(answer[first:last])
        part = f"{part[: SHOWN_CHARS // 2]}...{part[-SHOWN_CHARS // 2 :]}" if len(part) > SHOWN_CHARS else part
        shown += f"⟦{part}⟧" if scored[first] else part
    return shown
