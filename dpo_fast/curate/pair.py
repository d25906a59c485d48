"""`dpo-fast pair`: scored answers -> preference rows, some of them held out."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from rich.console import Console

from dpo_fast.config import PairConfig
from dpo_fast.console import say
from dpo_fast.curate.messages import text_of
from dpo_fast.curate.pair_report import LengthBias, PairReport
from dpo_fast.curate.rows import (
    Row,
    Rows,
    as_dataset,
    as_rows,
    check_out,
    hold_output,
    read_objects,
    responses_of,
    write_rows,
)
from dpo_fast.curate.sample import SAMPLES
from dpo_fast.data.columns import SYSTEM
from dpo_fast.data.formats import choose_pairs
from dpo_fast.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def run_pair(config: PairConfig, *, console: Console | None = None) -> Path:
    """Pair the answers of `config.data`; write `config.out` and, for held-out prompts, `config.eval_out`.

    Raises:
        UserError: a mistake in the settings, or no prompt yields a pair.
    """
    console = console or Console()
    out = check_out(config.out, overwrite=config.overwrite)
    if (config.eval_split > 0) != (config.eval_out is not None):
        raise UserError(
            "--eval_split and --eval_out go together: the share of prompts to hold out and the file for them"
        )
    eval_out = None
    if config.eval_out is not None:
        eval_out = check_out(config.eval_out, option="--eval_out", overwrite=config.overwrite)
        if eval_out.resolve() == out.resolve():
            raise UserError(f"--eval_out {eval_out}: is also --out; name another file")
    rows = read_objects(config.data, config.max_rows, console)
    train, held_out, report = pair_rows(rows, config)
    say(console, report.render())
    if not train:
        raise UserError(f"--data {config.data}: yields no pair to train on")
    with hold_output(out):
        if eval_out is not None:
            with hold_output(eval_out, option="--eval_out"):
                write_rows(eval_out, held_out)
        # Last, since training reads it: once it is there, the held-out pairs are those that it lacks.
        write_rows(out, train)
    say(console, f"{len(train)} pairs: {out}")
    if eval_out is not None:
        say(console, f"{len(held_out)} pairs held out: {eval_out}")
    return out


def pair(data: Rows, *, console: Console | None = None, **settings: Any) -> Dataset | DatasetDict:
    """Preference rows from scored answers.

    Args:
        data: a file name, a Hub dataset's name, a list of dicts or a `datasets.Dataset`, with columns `prompt`,
            `responses` and `scores`.
        console: where the report is printed.
        settings: fields of `PairConfig`.

    Returns:
        Rows with `prompt`, `chosen`, `rejected`, `chosen_score`, `rejected_score` and `score_gap`; with `eval_split` a
        `DatasetDict` of `train` and `test`.

    Raises:
        UserError: a mistake in the settings, or no prompt yields a pair.
    """
    from datasets import DatasetDict

    console = console or Console()
    config = PairConfig(**settings)
    train, held_out, report = pair_rows(as_rows(data, console), config)
    say(console, report.render())
    if not train:
        raise UserError("no prompt yields a pair to train on")
    if config.eval_split > 0:
        return DatasetDict({"train": as_dataset(train), "test": as_dataset(held_out)})
    return as_dataset(train)


def pair_rows(rows: Sequence[Row], config: PairConfig) -> tuple[list[Row], list[Row], PairReport]:
    """Preference rows to train on, those of held-out prompts, and what became of every row."""
    report = PairReport()
    pairs: list[Row] = []
    for number, row in enumerate(rows):
        try:
            candidates = _Candidates.of(row, number, config)
        except UserError as error:
            report.unusable.append(str(error))
            continue
        report.prompts += 1
        chosen = candidates.choose(config, report)
        report.paired += bool(chosen)
        pairs += [candidates.preference(number, *pair, config) for pair in chosen]
    report.before = LengthBias.of([_lengths(pair) for pair in pairs])
    if config.balance_length:
        pairs = _balanced(pairs, config.seed)
        report.after = LengthBias.of([_lengths(pair) for pair in pairs])
    held_out = _held_out(pairs, config)
    train = [pair for pair in pairs if _key(pair, config) not in held_out]
    return train, [pair for pair in pairs if _key(pair, config) in held_out], report


@dataclass(frozen=True)
class _Candidates:
    """A row's answers that have a score."""

    row: Row
    responses: list[Any]
    scores: list[float]
    finished: list[bool]

    @classmethod
    def of(cls, row: Row, number: int, config: PairConfig) -> _Candidates:
        if row.get(config.prompt_column) is None:
            raise UserError(
                f"row {number}: field {config.prompt_column!r} is missing; --prompt_column maps another name"
            )
        responses = responses_of(row, config.responses_column, number)
        scores = row.get(config.scores_column)
        if not isinstance(scores, list) or len(scores) != len(responses):
            raise UserError(
                f"row {number}: field {config.scores_column!r}: expected a list of {len(responses)} numbers, one per "
                "answer, as dpo-fast label writes it"
            )
        wrong = [s for s in scores if s is not None and not (isinstance(s, int | float) and math.isfinite(s))]
        if wrong:
            raise UserError(
                f"row {number}: field {config.scores_column!r}: expected numbers or null, found {wrong[0]!r:.40}"
            )
        samples = row.get(SAMPLES) or [{}] * len(responses)
        finished = [(sampled or {}).get("finished") is not False for sampled in samples]
        used = [
            i for i, score in enumerate(scores) if score is not None and (finished[i] or config.truncated != "drop")
        ]
        return cls(row, [responses[i] for i in used], [float(scores[i]) for i in used], [finished[i] for i in used])

    def choose(self, config: PairConfig, report: PairReport) -> list[tuple[int, int]]:
        """(better, worse) indices of answers; counts in the report why there is none."""
        if len(self.scores) < 2:
            report.unjudged += 1
            return []
        # The best pair is found among all pairs, since the best answer may be one that must not be chosen.
        which = "all" if config.pairs == "best_worst" else config.pairs
        found = [
            (a, b)
            for a, b in choose_pairs(self.scores, which, config.min_score_gap)
            if self.responses[a] != self.responses[b]
        ]
        if not found:
            report.tied += 1
            return []
        if config.truncated == "never_chosen":
            found = [(a, b) for a, b in found if self.finished[a]]
            report.cut += not found
        found.sort(key=lambda pair: (-self._gap(pair), self._length_gap(pair) if config.balance_length else 0))
        return found[: 1 if config.pairs == "best_worst" else config.pairs_per_prompt]

    def _gap(self, pair: tuple[int, int]) -> float:
        return self.scores[pair[0]] - self.scores[pair[1]]

    def _length_gap(self, pair: tuple[int, int]) -> int:
        a, b = (len(text_of(self.responses[i])) for i in pair)
        return abs(a - b)

    def preference(self, number: int, better: int, worse: int, config: PairConfig) -> Row:
        """The row that `dpo-fast train` reads; if the prompt is messages, so are the answers."""
        prompt = self.row[config.prompt_column]
        chosen, rejected = (
            [{"role": "assistant", "content": response}]
            if isinstance(response := self.responses[i], str) and not isinstance(prompt, str)
            else response
            for i in (better, worse)
        )
        kept = {name: self.row[name] for name in _template_columns(config) if self.row.get(name) is not None}
        scores = {"chosen_score": self.scores[better], "rejected_score": self.scores[worse]}
        gap = {"score_gap": self._gap((better, worse)), "row": number}
        return {config.prompt_column: prompt, "chosen": chosen, "rejected": rejected} | kept | scores | gap


def _template_columns(config: PairConfig) -> list[str]:
    """The columns besides the prompt that training needs to render the prompt as it was sampled."""
    names = [config.tools_column, config.system_column, config.chat_template_kwargs_column]
    # Other names of the system turn that training reads, if none was chosen.
    names += SYSTEM if config.system_column == PairConfig.system_column else ()
    return [name for name in names if name]


def _lengths(pair: Row) -> tuple[int, int]:
    return len(text_of(pair["chosen"])), len(text_of(pair["rejected"]))


def _balanced(pairs: list[Row], seed: int) -> list[Row]:
    """As many pairs whose chosen answer is longer as shorter; the surplus is dropped at random."""
    sides: dict[int, list[int]] = {1: [], -1: [], 0: []}
    for i, one in enumerate(pairs):
        chosen, rejected = _lengths(one)
        sides[(chosen > rejected) - (chosen < rejected)].append(i)
    number = min(len(sides[1]), len(sides[-1]))
    rng = random.Random(seed)
    kept = {*sides[0], *rng.sample(sides[1], number), *rng.sample(sides[-1], number)}
    return [pair for i, pair in enumerate(pairs) if i in kept]


def _key(pair: Row, config: PairConfig) -> str:
    return json.dumps(pair[config.prompt_column], sort_keys=True)


def _held_out(pairs: list[Row], config: PairConfig) -> set[str]:
    """Prompts to hold out: those with the smallest hashes, so that a prompt's side hardly depends on the others."""
    prompts = sorted(
        {_key(pair, config) for pair in pairs},
        key=lambda prompt: xxhash.xxh3_128_digest(f"{config.seed}/{prompt}".encode()),
    )
    return set(prompts[: round(config.eval_split * len(prompts))])
