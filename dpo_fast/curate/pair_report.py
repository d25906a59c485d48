"""What became of the prompts that were paired, and how much longer chosen answers are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LengthBias:
    """How much longer chosen answers are, in characters.

    Attributes:
        pairs: counted.
        longer, shorter: pairs whose chosen answer is longer, or shorter.
        chosen, rejected: mean lengths.
        ratio: geometric mean of chosen over rejected length; an empty answer counts as one character.
    """

    pairs: int
    longer: int
    shorter: int
    chosen: float
    rejected: float
    ratio: float

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, int]]) -> LengthBias | None:
        """Of (chosen, rejected) lengths; None if there are none."""
        if not lengths:
            return None
        chosen, rejected = (sum(side) / len(lengths) for side in zip(*lengths, strict=True))
        logs = [math.log(max(a, 1) / max(b, 1)) for a, b in lengths]
        longer, shorter = sum(a > b for a, b in lengths), sum(a < b for a, b in lengths)
        return cls(len(lengths), longer, shorter, chosen, rejected, math.exp(sum(logs) / len(logs)))

    def render(self) -> str:
        """One line, with advice if length predicts preference."""
        line = (
            f"{self.pairs} pairs: the chosen answer is longer in {self.longer}, shorter in {self.shorter}; mean length "
            f"{self.chosen:.0f} vs {self.rejected:.0f} characters ({self.ratio:.2f}x)"
        )
        decided = self.longer + self.shorter
        # Two standard errors of a fair coin.
        if decided >= 20 and abs(self.longer / decided - 0.5) > max(0.1, decided**-0.5):
            line += "; length alone partly predicts the choice: see --balance_length"
        return line


@dataclass
class PairReport:
    """What became of the prompts.

    Attributes:
        prompts: rows with a prompt, answers and scores.
        paired: prompts that gave at least one pair.
        tied: prompts whose answers all have the same score, or differ by less than `min_score_gap`.
        unjudged: prompts with fewer than two different scored answers.
        cut: prompts whose better answers were all cut at `max_new_tokens`.
        unusable: why each of the other rows cannot be used.
        before: length bias of all pairs.
        after: length bias of the pairs that `balance_length` kept, if it was set.
    """

    prompts: int = 0
    paired: int = 0
    tied: int = 0
    unjudged: int = 0
    cut: int = 0
    unusable: list[str] = field(default_factory=list)
    before: LengthBias | None = None
    after: LengthBias | None = None

    def render(self) -> str:
        """A few lines for the terminal."""
        lines = [f"{self.prompts} prompts, {self.paired} with pairs"]
        for number, reason in (
            (self.tied, "all answers have the same score, or differ by less than --min_score_gap"),
            (self.unjudged, "fewer than two different answers have a score"),
            (self.cut, "every better answer was cut at max_new_tokens (--truncated keep takes them)"),
        ):
            if number:
                lines.append(f"  dropped {number}: {reason}")
        if self.unusable:
            lines.append(f"  dropped {len(self.unusable)}: {self.unusable[0]}")
        for when, bias in (("", self.before), ("balanced: ", self.after)):
            if bias is not None:
                lines.append(f"  {when}{bias.render()}")
        return "\n".join(lines)
