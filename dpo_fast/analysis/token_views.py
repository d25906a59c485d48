"""What is shown of a row: tokens as text with their log-probs, answers and pairs with what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_fast.packs.layout import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens before the answer that are decoded with its first ones: a tokenizer may drop a space at the very beginning.
CONTEXT_TOKENS = 4
# Below this many nats nothing is shown as a change: two decimals are printed, and rounding moves less.
NOTHING = 5e-3


@dataclass(frozen=True)
class TokenView:
    """A token of an answer: its id, its text, its log-probs in nats, and text after it that is not scored."""

    id: int
    text: str
    logp: float
    ref_logp: float
    context: str = ""

    @property
    def log_ratio(self) -> float:
        """log p - log ref."""
        return self.logp - self.ref_logp


@dataclass(frozen=True)
class AnswerView:
    """An answer.

    Attributes:
        name: `chosen`, `rejected`, or its number.
        unscored: text before the first scored token.
        tokens: the scored ones.
    """

    name: str
    unscored: str
    tokens: list[TokenView]

    @property
    def logp(self) -> float:
        """Under the policy, in nats."""
        return math.fsum(token.logp for token in self.tokens)

    @property
    def ref_logp(self) -> float:
        """Under the reference, in nats."""
        return math.fsum(token.ref_logp for token in self.tokens)

    @property
    def log_ratio(self) -> float:
        """log p - log ref of the whole answer."""
        return self.logp - self.ref_logp

    def most_moved(self, count: int) -> tuple[list[int], list[int]]:
        """Places of the tokens that gained most, and of those that lost most, the largest first."""
        order = sorted(range(len(self.tokens)), key=lambda i: self.tokens[i].log_ratio)
        gained = [i for i in reversed(order) if self.tokens[i].log_ratio > NOTHING]
        lost = [i for i in order if self.tokens[i].log_ratio < -NOTHING]
        return gained[:count], lost[:count]

    def around(self, place: int, width: int = 3) -> tuple[str, str, str]:
        """Text before a token, its own, and text after it."""
        texts = [token.text for token in self.tokens]
        before = "".join(texts[max(place - width, 0) : place])
        return before, texts[place], "".join(texts[place + 1 : place + 1 + width])


@dataclass(frozen=True)
class PairView:
    """A pair: `delta` is the difference of log-ratios in nats, `loss` DPO's -log sigmoid(beta delta)."""

    chosen: AnswerView
    rejected: AnswerView
    beta: float
    delta: float
    loss: float

    @property
    def probability(self) -> float:
        """That the chosen answer is the better one, by the policy's implicit reward: sigmoid(beta delta)."""
        return math.exp(-self.loss)

    @property
    def sentence(self) -> str:
        """Where the pair's margin comes from, in words."""
        raised, sunk = self.chosen.log_ratio, -self.rejected.log_ratio
        if abs(raised) < NOTHING and abs(sunk) < NOTHING:
            return "Nothing has moved: policy and reference give both answers the same probability."
        moves = (
            f"the chosen answer {_rose(raised)} by {abs(raised):.2f} nats, the rejected one {_rose(-sunk)} by "
            f"{abs(sunk):.2f}"
        )
        if self.delta <= 0:
            return f"The pair is lost: {moves}."
        if raised > 0 and sunk > 0:
            share = raised / (raised + sunk)
            return f"Won from both sides: {moves}; {share:.0%} of the margin comes from the chosen answer."
        if raised > 0:
            return f"Won by raising the chosen answer, although the rejected one rose, too: {moves}."
        return f"Won by sinking the rejected answer alone: {moves}. The chosen one is less likely than before."


@dataclass(frozen=True)
class RowView:
    """A row: its number, its prompt as text, its answers and pairs."""

    row: int
    prompt: str
    answers: list[AnswerView]
    pairs: list[PairView]

    @property
    def scale(self) -> float:
        """Log-ratio in nats that is shown at full strength: the 95th percentile of the row's, 0.1 at least."""
        sizes = sorted(abs(token.log_ratio) for answer in self.answers for token in answer.tokens)
        return max(sizes[int(0.95 * (len(sizes) - 1))] if sizes else 0.0, 0.1)


def _rose(amount: float) -> str:
    return "rose" if amount >= 0 else "fell"


def answer_name(group: Group, number: int) -> str:
    """`chosen` or `rejected` in a row of one pair, else the answer's number."""
    if len(group.pairs) == 1 and number in group.pairs[0]:
        return ("chosen", "rejected")[group.pairs[0].index(number)]
    return f"answer {number}"


def token_pieces(ids: Sequence[int], before: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token, so that the pieces joined are the text of all.

    A character that is spread over several tokens belongs to the last of them; the others are empty.

    Args:
        ids: of an answer.
        before: tokens that stand before it.
        tokenizer: of the model.
    """

    def text(start: int, end: int) -> str:
        return str(tokenizer.decode(list(all_ids[start:end]), skip_special_tokens=False))

    context = list(before[-CONTEXT_TOKENS:])
    all_ids = [*context, *ids]
    pieces: list[str] = []
    # Decoding from `start` gives text up to `done` that is out already, and behind it what a new token adds.
    start, done = 0, len(context)
    for end in range(len(context) + 1, len(all_ids) + 1):
        old, new = text(start, done), text(start, end)
        is_whole = len(new) > len(old) and not new.endswith("\ufffd")
        if is_whole or end == len(all_ids):
            pieces.append(new[len(old) :])
            start, done = done, end
        else:
            pieces.append("")
    return pieces


def probability(logp: float) -> str:
    """e^logp for people: `43%`, `0.12%`, `10^-83`."""
    if logp > math.log(0.1):
        return f"{math.exp(logp):.0%}"
    if logp > math.log(1e-5):
        return f"{100 * math.exp(logp):.2g}%"
    return f"10^{logp / math.log(10):.0f}"
