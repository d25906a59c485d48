"""Signs that a run goes wrong while its loss falls: they warn and stop nothing.

A diagnostic is a pure function of the reports so far (the rows of `metrics.jsonl`) and of the run's settings. It says
what was seen, what that means and what to do, or None. It reads figures that the report has brought to the host, so it
never waits for a device. docs/warnings.md has the reasons for the numbers below, and how often they warn of a healthy
run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_fast.config import DPOConfig
from dpo_fast.losses.facts import facts_of
from dpo_fast.losses.objective import any_loss, loss_names, needs_reference
from dpo_fast.packs.layout import Group
from dpo_fast.reference.scores import AnswerLogps

Row = Mapping[str, Any]

# Nothing is said of fewer different pairs than these, and nothing that a mean this many standard errors off could be.
MIN_PAIRS = 64
STANDARD_ERRORS = 4.0
# A warning that is absent from so many reports in a row has gone, and is given again when it comes back.
GONE_AFTER = 5
# Both rewards fall: the chosen answer, and each of its tokens, lost at least these nats.
FALLEN = 1.0
FALLEN_A_TOKEN = 0.05
# The chosen log-prob collapses.
COLLAPSED = 3.0
COLLAPSED_A_TOKEN = 0.5
# Margins follow length: over the last pairs the correlation is surely above one and the share of the mean margin that
# equally long answers would have surely below the other.
LENGTH_PAIRS = 256
LENGTH_CORRELATION = 0.6
LENGTH_REST = 0.5
# Separated at step 0: of a policy that is not the reference, accuracy and mean beta Δ of the first pairs; of the
# reference, by how much an answer and each of its tokens are likelier.
SEPARATED_ACCURACY = 0.9
SEPARATED_MARGIN = 2.0
SEPARATED = math.log(100)
SEPARATED_A_TOKEN = 1.0


class Reports:
    """Several reports as one: figures over all their pairs."""

    def __init__(self, rows: Sequence[Row], num_distinct: int) -> None:
        """Take rows with `num_pairs`; a pair that comes again in another epoch adds nothing to what is known."""
        counts = np.array([row["num_pairs"] for row in rows], dtype=np.float64)
        self.num_pairs = min(int(counts.sum()), num_distinct)
        self._rows = rows
        self._shares = counts / counts.sum()

    def mean(self, name: str) -> float:
        """Of a figure of the reports, over pairs."""
        return float(self._shares @ self._column(name))

    def reward(self, side: str) -> tuple[float, float]:
        """Mean and standard error of `rewards/SIDE` over pairs, beta included; `side` may be `margins`."""
        mean, variance = self._moments(self._column(f"rewards/{side}"), self._column(f"rewards/{side}_std"))
        return mean, math.sqrt(variance / self.num_pairs)

    def margin_by_length(self) -> tuple[float, float, float, float] | None:
        """Least squares of the margin on how much longer the chosen answer is.

        Returns:
            Correlation; slope; intercept, the margin of equally long answers, and its standard error. None where one of
            the two does not vary.
        """
        margin, margin_std = self._column("rewards/margins"), self._column("rewards/margins_std")
        gap, gap_std = (
            self._column("lengths/chosen") - self._column("lengths/rejected"),
            self._column("lengths/gap_std"),
        )
        products = self._column("lengths/margins_correlation") * margin_std * gap_std + margin * gap
        (mean_margin, var_margin), (mean_gap, var_gap) = self._moments(margin, margin_std), self._moments(gap, gap_std)
        if not (var_margin > 0 and var_gap > 0):
            return None
        covariance = float(self._shares @ products) - mean_margin * mean_gap
        correlation = covariance / math.sqrt(var_margin * var_gap)
        slope = covariance / var_gap
        rest = max(0.0, var_margin * (1 - correlation**2)) / (self.num_pairs - 2)
        error = math.sqrt(rest * (1 + mean_gap**2 / var_gap))
        return correlation, slope, mean_margin - slope * mean_gap, error

    def _column(self, name: str) -> np.ndarray:
        return np.array([row[name] for row in self._rows], dtype=np.float64)

    def _moments(self, means: np.ndarray, stds: np.ndarray) -> tuple[float, float]:
        """Mean and variance over all pairs, of each report's."""
        mean = float(self._shares @ means)
        return mean, float(self._shares @ (stds**2 + (means - mean) ** 2))


def first_pairs(rows: Sequence[Row], num_pairs: int) -> Sequence[Row]:
    """The shortest beginning of the rows that holds so many pairs; all of them if they hold fewer."""
    return rows[: _how_many(rows, num_pairs)]


def last_pairs(rows: Sequence[Row], num_pairs: int) -> Sequence[Row]:
    """The shortest end of the rows that holds so many pairs; all of them if they hold fewer."""
    return rows[len(rows) - _how_many(reversed(rows), num_pairs) :]


def _how_many(rows: Iterable[Row], num_pairs: int) -> int:
    seen = taken = 0
    for row in rows:
        if seen >= num_pairs:
            break
        seen += row["num_pairs"]
        taken += 1
    return taken


def _starts_at_reference(config: DPOConfig) -> bool:
    return needs_reference(config) and config.ref_model in (None, config.model)


Diagnostic = Callable[[Sequence[Row], DPOConfig, int], str | None]


class _Fall:
    """How many nats both answers lost since the start of a run, over the last pairs."""

    def __init__(self, recent: Reports, start: Reports | None, beta: float) -> None:
        self.num_pairs = recent.num_pairs
        self._recent, self._start, self._beta = recent, start, beta

    @staticmethod
    def of(rows: Sequence[Row], config: DPOConfig, num_distinct: int) -> _Fall | None:
        """None where too few pairs were seen, or where the reference has moved away from the start."""
        latest, start = last_pairs(rows, MIN_PAIRS), None
        if not _starts_at_reference(config):
            # Rewards are not 0 at the start, so the first pairs say what they are.
            first = first_pairs(rows, MIN_PAIRS)
            if config.sync_ref_model or len(first) + len(latest) > len(rows):
                return None
            start = Reports(first, num_distinct)
        recent = Reports(latest, num_distinct)
        return None if recent.num_pairs < MIN_PAIRS else _Fall(recent, start, config.beta)

    def nats(self, side: str) -> float:
        """Of the whole answer."""
        return ((self._start.reward(side)[0] if self._start else 0.0) - self._recent.reward(side)[0]) / self._beta

    def nats_a_token(self, side: str) -> float:
        """Of each token."""
        before, now = (
            reports.reward(side)[0] / max(reports.mean(f"lengths/{side}"), 1.0) if reports else 0.0
            for reports in (self._start, self._recent)
        )
        return (before - now) / self._beta

    def is_sure(self, side: str) -> bool:
        """Whether it is more than chance."""
        errors = [reports.reward(side)[1] for reports in (self._start, self._recent) if reports]
        return self.nats(side) * self._beta > STANDARD_ERRORS * math.hypot(*errors)


def both_rewards_fall(rows: Sequence[Row], config: DPOConfig, num_distinct: int) -> str | None:
    """Chosen and rejected answers are less likely than at the start, chosen ones by more than trifles."""
    # `apo_down` is made to lower both.
    fall = None if "apo_down" in loss_names(config) else _Fall.of(rows, config, num_distinct)
    if fall is None or not (fall.is_sure("chosen") and fall.is_sure("rejected")):
        return None
    chosen, each = fall.nats("chosen"), fall.nats_a_token("chosen")
    if chosen < FALLEN or each < FALLEN_A_TOKEN:
        return None
    return (
        f"both rewards fall: over the last {fall.num_pairs} pairs the chosen answers are {chosen:.1f} nats less likely "
        f"than at the start ({each:.2f} a token), the rejected ones {fall.nats('rejected'):.1f}. What both lose goes "
        "to answers that nobody compared. Lower --learning_rate, or hold the chosen answers up with "
        f"{_hold_up(config)}"
    )


def chosen_collapses(rows: Sequence[Row], config: DPOConfig, num_distinct: int) -> str | None:
    """The chosen answers themselves have become unlikely, whatever the margin."""
    fall = _Fall.of(rows, config, num_distinct)
    if fall is None or not fall.is_sure("chosen"):
        return None
    chosen, each = fall.nats("chosen"), fall.nats_a_token("chosen")
    if chosen < COLLAPSED or each < COLLAPSED_A_TOKEN:
        return None
    return (
        f"the chosen log-prob collapses: over the last {fall.num_pairs} pairs a token of the chosen answers is "
        f"{math.exp(min(each, 99.0)):.1f} times less likely than at the start ({each:.2f} nats a token, {chosen:.1f} "
        "an answer), so the model unlearns the answers that it should give. Stop, look at what it writes, and train "
        f"again with a lower --learning_rate and {_hold_up(config)}"
    )


def _hold_up(config: DPOConfig) -> str:
    """The options that keep the chosen answers likely, apart from those that are set already."""
    names = loss_names(config)
    if any_loss(config, lambda facts: facts.reads_chosen_alone):
        return "a larger weight of sft in --loss_weights"
    weights = "" if config.loss_weights is None else f" --loss_weights '{[*config.loss_weights, 1.0]}'"
    option = f"--loss_type '[{', '.join([*names, 'sft'])}]'{weights}"
    return f"{option} or --loss_type dpop" if names == ["sigmoid"] else option


def margins_follow_length(rows: Sequence[Row], config: DPOConfig, num_distinct: int) -> str | None:
    """The margin of a pair is a matter of which answer is longer."""
    compared = [facts for name in loss_names(config) if not (facts := facts_of(name)).reads_chosen_alone]
    # Without a reference margins contain the lengths from the start: nothing was learned of them.
    if not needs_reference(config) or all(facts.is_length_normalised for facts in compared):
        return None
    # No more than one pass: over several, margins differ by how long they were trained, too.
    recent = Reports(last_pairs(rows, min(LENGTH_PAIRS, num_distinct)), num_distinct)
    mean, error = recent.reward("margins")
    fit = recent.margin_by_length() if recent.num_pairs >= MIN_PAIRS else None
    if fit is None or mean < config.beta or mean < STANDARD_ERRORS * error:
        return None
    correlation, slope, intercept, intercept_error = fit
    # Fisher's z of a correlation has a standard error of 1 / sqrt(n - 3).
    z = math.atanh(min(abs(correlation), 1 - 1e-12)) - STANDARD_ERRORS / math.sqrt(recent.num_pairs - 3)
    if math.tanh(z) < LENGTH_CORRELATION or intercept + STANDARD_ERRORS * intercept_error > LENGTH_REST * mean:
        return None
    ways = ["balance the pairs with dpo-fast pair --balance_length true"]
    ways += ["average over tokens with --loss_type sigmoid_norm and a larger --beta"]
    ways += [] if config.ld_alpha is not None else ["count the longer answer's excess less with --ld_alpha 0.5"]
    return (
        f"margins follow length: over the last {recent.num_pairs} pairs a margin grows with how much "
        f"{'longer' if slope > 0 else 'shorter'} the chosen answer is (correlation {correlation:+.2f}), and equally "
        f"long answers would have {max(0.0, intercept) / mean:.0%} of the mean margin. The model learns length more "
        f"than quality: {', or '.join(ways)}"
    )


def separated_at_first(rows: Sequence[Row], config: DPOConfig, num_distinct: int) -> str | None:
    """Against another model as reference, the first pairs are told apart already; said once, when they are complete."""
    first = first_pairs(rows, MIN_PAIRS)
    if _starts_at_reference(config) or not needs_reference(config) or len(first) < len(rows):
        return None
    start = Reports(first, num_distinct)
    accuracy, margin = start.mean("rewards/accuracies"), start.reward("margins")[0]
    if start.num_pairs < MIN_PAIRS or accuracy < SEPARATED_ACCURACY or margin < SEPARATED_MARGIN:
        return None
    return (
        f"most pairs are separated already: on the first {start.num_pairs} pairs the model has an accuracy of "
        f"{accuracy:.0%} against the reference and a mean margin of {margin:.1f} after beta, where the loss is flat. "
        "There is little to learn: use the model itself as reference (no --ref_model), or harder pairs, such as "
        "answers sampled from this model"
    )


DIAGNOSTICS: tuple[Diagnostic, ...] = (both_rewards_fall, chosen_collapses, margins_follow_length, separated_at_first)


def separated_by_reference(groups: Sequence[Group], references: Sequence[AnswerLogps]) -> str | None:
    """Before training: the model that it starts from finds the chosen answers far likelier already.

    Args:
        groups: that are trained on.
        references: for each group its answers' log-probs under the reference, (A_i,) fp32 nats; none for a group that
            the run does not reach.
    """
    sums, lengths = [], []
    for group, answers in zip(groups, references, strict=True):
        of_answers = [(float(logps.sum(dtype=np.float64)), max(len(logps), 1)) for logps in answers]
        for chosen, rejected in group.pairs if answers else ():
            sums.append((of_answers[chosen][0], of_answers[rejected][0]))
            lengths.append((of_answers[chosen][1], of_answers[rejected][1]))
    if len(sums) < MIN_PAIRS:
        return None
    total, mean = np.array(sums), np.array(sums) / np.array(lengths)
    gaps, gaps_a_token = total[:, 0] - total[:, 1], mean[:, 0] - mean[:, 1]
    share = float(((gaps >= SEPARATED) & (gaps_a_token >= SEPARATED_A_TOKEN)).mean())
    if share <= 0.5:
        return None
    return (
        f"most pairs are separated already: before step 1 the model finds the chosen answer of {share:.0%} of "
        f"{len(sums)} pairs over 100 times likelier than the rejected one, and e times likelier token by token (mean "
        f"difference {gaps_a_token.mean():.1f} nats a token). It would not write these rejected answers, so there is "
        "little to learn from them: use harder pairs, such as answers sampled from this model (dpo-fast sample, label, "
        "pair)"
    )


class WarningSigns:
    """The signs of one run, each told once, and again if it had gone and came back."""

    def __init__(self, config: DPOConfig, num_pairs: int, at_start: Sequence[str] = ()) -> None:
        """Take the number of different pairs that are trained on, and what was found before the first step."""
        self._config = config
        self._num_pairs = num_pairs
        self._at_start = list(at_start)
        self._rows: list[Row] = []
        self._absent: dict[Diagnostic, int] = {}

    @classmethod
    def of_run(
        cls, config: DPOConfig, groups: Sequence[Group], references: Sequence[AnswerLogps] | None, *, resumed: bool
    ) -> WarningSigns:
        """Those of a run on these groups; cached scores of the model that it starts from tell before the first step."""
        text = None
        if not resumed and _starts_at_reference(config) and references is not None:
            text = separated_by_reference(groups, references)
        return cls(config, sum(len(group.pairs) for group in groups), [] if text is None else [text])

    def observe(self, row: Row) -> list[str]:
        """What is new with this report, a row of `metrics.jsonl`; a row of an evaluation says nothing.

        A resumed run shows the rows of its earlier part first, so that it warns as if it had not been stopped.
        """
        if "num_pairs" not in row:
            return []
        self._rows.append(row)
        new, self._at_start = self._at_start, []
        for sign in DIAGNOSTICS:
            text = sign(self._rows, self._config, self._num_pairs)
            if text is None:
                self._absent[sign] = self._absent.get(sign, GONE_AFTER) + 1
                continue
            if self._absent.get(sign, GONE_AFTER) >= GONE_AFTER:
                new.append(text)
            self._absent[sign] = 0
        return new
