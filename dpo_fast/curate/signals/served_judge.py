"""`judge:openai:NAME`: a language model on a server says which of two answers is better."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from dpo_fast.config import SignalConfig
from dpo_fast.curate.engines.chat import CHARACTERS_PER_TOKEN, read_replies
from dpo_fast.curate.engines.servers import Servers
from dpo_fast.curate.messages import text_of
from dpo_fast.curate.signals.comparisons import Comparison, fill, question_of, win_shares
from dpo_fast.curate.signals.served import Reply, ServedSignal, defuse
from dpo_fast.curate.verdict import Question, Verdict, shorten


class ServedJudge(ServedSignal):
    """`judge:openai:NAME`: the share of its comparisons that an answer wins, a tie counting half.

    Every pair of answers is compared in both orders, at temperature 0, by the letter in the reply. Judges favour a
    position; if the two orders disagree, or one reply calls it a tie, it is a tie. A reply without a decision is a
    refusal, and its comparison does not count.
    """

    kind = "judge"

    def __init__(self, name: str, config: SignalConfig) -> None:
        super().__init__(name, config)
        self.question = question_of(config)
        self.comparisons = self.identical = self.ties = self.disagreements = self.refused = 0
        self.tokens = [0, 0]

    def bodies(self, question: Question) -> list[dict[str, Any]]:
        """Both orders of every two answers that differ, one after the other."""
        return [
            self._body(question.prompt, *order)
            for first, second in _pairs(question)
            for order in ((first, second), (second, first))
            if first != second
        ]

    def _body(self, prompt: Any, first: str, second: str) -> dict[str, Any]:
        text = fill(self.question, prompt=defuse(text_of(prompt)), first=defuse(first), second=defuse(second))
        return {
            "model": self.name,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0.0,
            "max_tokens": self.config.judge_max_tokens,
        }

    def ask(self, servers: Servers, body: dict[str, Any]) -> Reply:
        """The text of the reply and the tokens that it took."""
        replies = servers.post("/chat/completions", body, read_replies)
        return {"reply": replies.choices[0].text, "usage": [replies.prompt_tokens, replies.answer_tokens]}

    def verdicts(self, question: Question, replies: list[Reply]) -> list[Verdict]:
        """The share of comparisons that each answer wins."""
        for reply in replies:
            for i, tokens in enumerate(reply.get("usage", ())):
                self.tokens[i] += tokens or 0
        found = iter(replies)
        plan: list[Comparison] = []
        preferences: list[float] = []
        for (first, one), (second, other) in combinations(enumerate(question.answers), 2):
            if one == other:
                self.identical += 1
                plan.append(Comparison(first, second))
                continue
            decisions = [_decision(next(found)) for _ in range(2)]
            refused = next((decision for decision in decisions if isinstance(decision, Verdict)), None)
            plan.append(Comparison(first, second, place=len(preferences), refused=refused))
            numbers = [0.0 if isinstance(decision, Verdict) else decision for decision in decisions]
            preferences += numbers
            self._count(refused, *numbers)
        return win_shares(len(question.answers), plan, preferences)

    def _count(self, refused: Verdict | None, first: float, second: float) -> None:
        self.comparisons += 1
        if refused is not None:
            self.refused += 1
        elif first == second != 0:
            self.disagreements += 1
        elif first != -second or first == 0:
            self.ties += 1

    def summary(self) -> str:
        """`90 comparisons in both orders: 12 ties, 30 where the orders disagree, 2 refused; 3 of identical answers`."""
        return (
            f"{self.comparisons:,} comparisons in both orders: {self.ties:,} ties, {self.disagreements:,} where the "
            f"orders disagree (also ties), {self.refused:,} refused; {self.identical:,} of identical answers, not "
            f"asked; {self.tokens[0]:,} prompt tokens, {self.tokens[1]:,} reply tokens"
        )

    def estimate(self, questions: list[Question]) -> str:
        """`180 questions, about 54,000 prompt tokens, at most 2,880 reply tokens`."""
        lengths = [len(body["messages"][0]["content"]) for question in questions for body in self.bodies(question)]
        return (
            f"{len(lengths):,} questions, about {sum(lengths) / CHARACTERS_PER_TOKEN:,.0f} prompt tokens, "
            f"at most {len(lengths) * self.config.judge_max_tokens:,} reply tokens"
        )


def _pairs(question: Question) -> Iterator[tuple[str, str]]:
    return combinations(question.answers, 2)


def _decision(reply: Reply) -> float | Verdict:
    """1 if a reply prefers A, -1 if it prefers B, 0 for a tie; a verdict without a score for anything else."""
    if "refused" in reply:
        return Verdict(None, reply["refused"])
    text = reply["reply"].strip()
    if re.match(r"\W*(it'?s |it is )?(a )?(tie|draw|equal)\b", text, re.IGNORECASE):
        return 0.0
    # The letter first, as it was asked for; otherwise the one letter that is named.
    start = re.match(r"\W*(?:(?:the )?(?:better )?answer(?: is)?\W+)?([AB])\b(?! [a-z])", text, re.IGNORECASE)
    letters = {start[1].upper()} if start else set(re.findall(r"\b[AB]\b", text))
    if len(letters) != 1:
        return Verdict(None, f"the judge does not decide: {shorten(text)!r}")
    return 1.0 if letters == {"A"} else -1.0
