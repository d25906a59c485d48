"""`dpo-fast eval`: a trained model beside its reference, on held-out pairs and on answers that both write.

On pairs: how often the implicit reward beta (log p - log ref) of the chosen answer is the higher one, by how much, and
whether sigmoid of the difference is an honest probability. On prompts: both models answer with the same seeds, any
signals judge the answers, and the win rate comes with a bootstrap interval over prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.analysis.intervals import Estimate, bootstrap_interval
from dpo_fast.config import EvalConfig, LabelConfig, SampleConfig, SignalConfig
from dpo_fast.console import say
from dpo_fast.curate.generate import SCORED_TOKENS, UNRANKED
from dpo_fast.curate.label import label_rows
from dpo_fast.curate.rows import Row, read_objects, write_rows
from dpo_fast.curate.sample import RESPONSES, SAMPLES, answer_rows
from dpo_fast.data.formats import template_kwargs
from dpo_fast.data.load import load_groups
from dpo_fast.data.tokenize import Tokenizing
from dpo_fast.errors import UserError
from dpo_fast.files import write_file_atomically
from dpo_fast.model.load import load_tokenizer
from dpo_fast.packs.bins import best_fit_decreasing
from dpo_fast.packs.budget import token_budget
from dpo_fast.packs.layout import Group
from dpo_fast.reference.fill import reference_logps
from dpo_fast.reference.scores import AnswerLogps

SIDES = ("model", "reference")
CALIBRATION_BINS = 10


def evaluate(config: EvalConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Compare `config.model` with `config.reference`.

    Returns:
        `pairs`: see `pair_figures`, where `data` was given; `answers`: see `answer_figures`, where `prompts` was given,
        and `kl`, how far the model is from the reference in nats an answer, where answers were sampled at temperature 1
        from the whole distribution. `out` holds the same.

    Raises:
        UserError: a mistake in the settings or the data.
    """
    console = console or Console()
    out = _check(config)
    figures: dict[str, Any] = {"model": config.model, "reference": config.reference, "beta": config.beta}
    if config.data:
        figures["pairs"] = _on_pairs(config, console)
        console.print(_pairs_table(figures["pairs"]))
    if config.prompts:
        rows = write_and_judge(config, console)
        figures["answers"] = answer_figures(*rows)
        if config.temperature == 1 and config.top_p == 1:
            figures["answers"]["kl"] = _kl(rows[0], config, console)
        console.print(_answers_table(figures["answers"]))
        if out is not None:
            write_rows(out.with_suffix(".answers.jsonl"), _side_by_side(*rows))
    if out is not None:
        write_file_atomically(out, json.dumps(figures, indent=2) + "\n")
        say(console, f"figures: {out}")
    return figures


def _check(config: EvalConfig) -> Path | None:
    """Refuse settings that cannot be meant; the file to write."""
    if not config.reference:
        raise UserError("no reference given: pass --reference with the model that training started from")
    if not (config.data or config.prompts):
        raise UserError("nothing to evaluate on: pass --data with held-out pairs, --prompts with prompts, or both")
    if config.prompts and not config.signals:
        raise UserError("--prompts: nothing judges the answers; name a signal by --signals")
    if config.signals and not config.prompts:
        raise UserError("--signals: there are no answers to judge; pass --prompts with the prompts to answer")
    if config.out is not None and Path(config.out).suffix != ".json":
        raise UserError(f"--out {config.out}: expected a file that ends in .json")
    return None if config.out is None else Path(config.out)


def _on_pairs(config: EvalConfig, console: Console) -> dict[str, Any]:
    """Read the pairs, score them with both models through the store, compare."""
    groups, report = load_groups(config, load_tokenizer(config.model, config.chat_template))
    say(console, report.render())
    packs = best_fit_decreasing([group.num_tokens for group in groups], token_budget(config, groups, pairs=8))
    # The reference first: where training used this very store, its scores are there and it is never loaded.
    reference, _ = reference_logps(config, config.reference, groups, packs=packs, console=console)
    policy, _ = reference_logps(config, config.model, groups, packs=packs, console=console)
    return pair_figures(
        [_pair_sums(answers, group.pairs) for answers, group in zip(policy, groups, strict=True)],
        [_pair_sums(answers, group.pairs) for answers, group in zip(reference, groups, strict=True)],
        config.beta,
    )


def _pair_sums(answers: AnswerLogps, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """(pairs, 2) fp64 log-probs of chosen and rejected answers."""
    sums = np.array([logps.astype(np.float64).sum() for logps in answers])
    return sums[np.array(pairs)]


def pair_figures(policy: Sequence[np.ndarray], reference: Sequence[np.ndarray], beta: float) -> dict[str, Any]:
    """Accuracy, margins and calibration of the implicit reward.

    Args:
        policy: for each row (P_i, 2) log-probs of the chosen and the rejected answer of its pairs, in nats.
        reference: the same under the reference.
        beta: factor of the reward.

    Returns:
        `pairs`: their number. With intervals over rows, each row counted once: `accuracy`, `margin`, `loss`,
        `reward_chosen`, `reward_rejected`, and `policy_prefers_chosen`, `reference_prefers_chosen` by plain log-probs.
        `calibration`: Brier score, expected calibration error, and bins of confidence against accuracy.
    """
    rewards = [beta * (own - ref) for own, ref in zip(policy, reference, strict=True)]
    margins = [chosen_rejected[:, 0] - chosen_rejected[:, 1] for chosen_rejected in rewards]

    def interval(values: Sequence[np.ndarray], *, share: bool = False) -> dict[str, float]:
        return asdict(bootstrap_interval(np.array([row.mean() for row in values]), share=share))

    # A tie is neither right nor wrong: it counts half.
    def wins(difference: np.ndarray) -> np.ndarray:
        return (difference > 0) + 0.5 * (difference == 0)

    return {
        "rows": len(margins),
        "pairs": sum(map(len, margins)),
        "accuracy": interval([wins(margin) for margin in margins], share=True),
        "margin": interval(margins),
        "loss": interval([np.logaddexp(0, -margin) for margin in margins]),
        "reward_chosen": interval([reward[:, 0] for reward in rewards]),
        "reward_rejected": interval([reward[:, 1] for reward in rewards]),
        "policy_prefers_chosen": interval([wins(row[:, 0] - row[:, 1]) for row in policy], share=True),
        "reference_prefers_chosen": interval([wins(row[:, 0] - row[:, 1]) for row in reference], share=True),
        "calibration": calibration(np.concatenate(margins)),
    }


def calibration(margins: np.ndarray) -> dict[str, Any]:
    """Whether sigmoid(margin), the model's probability that the chosen answer is better, is an honest one.

    Args:
        margins: (P,) beta times the difference of log-ratios.

    Returns:
        `brier`: mean of (1 - probability)², 0.25 for one who knows nothing. `ece`: expected calibration error, the mean
        distance of confidence and accuracy over bins of equal count (Guo et al. 2017, arXiv 1706.04599, eq. 3).
        `bins`: of rising confidence max(p, 1 - p), each with `confidence`, `accuracy` and `pairs`.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = (margins > 0) + 0.5 * (margins == 0)
    probability = np.where(margins >= 0, confidence, 1 - confidence)
    order = np.argsort(confidence, kind="stable")
    bins = [
        {"confidence": float(confidence[part].mean()), "accuracy": float(right[part].mean()), "pairs": len(part)}
        for part in np.array_split(order, min(CALIBRATION_BINS, len(order)))
    ]
    distance = sum(one["pairs"] * abs(one["confidence"] - one["accuracy"]) for one in bins)
    return {"brier": float(((1 - probability) ** 2).mean()), "ece": distance / len(margins), "bins": bins}


def write_and_judge(config: EvalConfig, console: Console) -> tuple[list[Row], list[Row]]:
    """The prompts with the model's and with the reference's answers, judged; same prompts, same seeds."""
    assert config.prompts is not None
    rows = read_objects(config.prompts, config.max_rows, console)
    common = {field.name for field in fields(SampleConfig)} & {field.name for field in fields(EvalConfig)}
    shared = {name: getattr(config, name) for name in common - {"model", "data", "out", "apply_chat_template"}}
    written = []
    for name in (config.model, config.reference):
        template = False if config.plain_prompts else None
        sampling = SampleConfig(**shared | {"model": name, "apply_chat_template": template})
        written.append(answer_rows(rows, sampling, console=console))
    return judge(written[0], written[1], config, console)


def judge(model: list[Row], reference: list[Row], config: EvalConfig, console: Console) -> tuple[list[Row], list[Row]]:
    """The rows with `scores` and `signals`. Scores compare answers of one row, so both models' stand in one."""
    shared = {field.name: getattr(config, field.name) for field in fields(SignalConfig)}
    labelling = LabelConfig(**shared, prompt_column=config.prompt_column, device=config.device)
    together = [own | {RESPONSES: own[RESPONSES] + ref[RESPONSES]} for own, ref in zip(model, reference, strict=True)]
    judged = label_rows(together, labelling, console=console)

    def part(row: Row, own: Row, places: slice) -> Row:
        signals = {name: scores[places] for name, scores in row["signals"].items()}
        return own | {"scores": row["scores"][places], "signals": signals}

    return (
        [part(row, own, slice(len(own[RESPONSES]))) for row, own in zip(judged, model, strict=True)],
        [
            part(row, ref, slice(len(own[RESPONSES]), None))
            for row, own, ref in zip(judged, model, reference, strict=True)
        ],
    )


def answer_figures(model: list[Row], reference: list[Row]) -> dict[str, Any]:
    """Win rate and scores over prompts, from two judged lists of the same prompts.

    Returns:
        With intervals over prompts: `win_rate` (answer by answer of the same seed; a tie counts half, an answer that no
        signal could judge loses to one that is judged), `score` and, by name, `signals`, each of `model`, `reference`
        and `rise`; `wins`, `ties` and `losses` in answers; `unjudged` answers of each.
    """
    outcomes = [
        np.array([_outcome(a, b) for a, b in zip(own["scores"], ref["scores"], strict=True)])
        for own, ref in zip(model, reference, strict=True)
    ]
    flat = np.concatenate(outcomes)
    names = list(model[0]["signals"])
    unjudged = [sum(score is None for row in rows for score in row["scores"]) for rows in (model, reference)]
    return {
        "prompts": len(model),
        "answers": len(flat),
        "win_rate": asdict(bootstrap_interval(np.array([row.mean() for row in outcomes]), share=True)),
        **{name: int((flat == value).sum()) for name, value in (("wins", 1), ("ties", 0.5), ("losses", 0))},
        "score": _compared([row["scores"] for row in model], [row["scores"] for row in reference]),
        "signals": {
            name: _compared([row["signals"][name] for row in model], [row["signals"][name] for row in reference])
            for name in names
        },
        "unjudged": dict(zip(SIDES, unjudged, strict=True)),
    }


def _outcome(own: float | None, ref: float | None) -> float:
    """1 for a win, 0 for a loss, a half for a tie."""
    a, b = (-np.inf if score is None else score for score in (own, ref))
    return 0.5 if a == b else float(a > b)


def _compared(model: list[list[float | None]], reference: list[list[float | None]]) -> dict[str, Any] | None:
    """Means over the prompts for which both have a judged answer; None if there is no such prompt."""
    means = np.array([[_mean(own), _mean(ref)] for own, ref in zip(model, reference, strict=True)])
    means = means[~np.isnan(means).any(1)]
    if not len(means):
        return None
    share = all(score in (0, 1, None) for scores in (*model, *reference) for score in scores)
    found = {
        "model": bootstrap_interval(means[:, 0], share=share),
        "reference": bootstrap_interval(means[:, 1], share=share),
        "rise": bootstrap_interval(means[:, 0] - means[:, 1]),
    }
    return {name: asdict(estimate) for name, estimate in found.items()}


def _mean(scores: list[float | None]) -> float:
    judged = [score for score in scores if score is not None]
    return float(np.mean(judged)) if judged else np.nan


def _kl(rows: list[Row], config: EvalConfig, console: Console) -> dict[str, float]:
    """KL(model || reference) in nats an answer, as the mean log-ratio over what the model samples, with an interval."""
    tokenize = Tokenizing(load_tokenizer(config.model, config.chat_template))
    groups = [
        Group(
            number,
            np.array(
                tokenize.prompt_ids(row[config.prompt_column], row.get(config.tools_column), template_kwargs(row)),
                dtype=np.int32,
            ),
            tuple(np.array(how["ids"], dtype=np.int32) for how in row[SAMPLES]),
            UNRANKED,
        )
        for number, row in enumerate(rows)
    ]
    packs = best_fit_decreasing([group.num_tokens for group in groups], SCORED_TOKENS)
    reference, _ = reference_logps(config, config.reference, groups, packs=packs, console=console)
    ratios = [
        np.mean(
            [how["logp"] - logps.astype(np.float64).sum() for how, logps in zip(row[SAMPLES], answers, strict=True)]
        )
        for row, answers in zip(rows, reference, strict=True)
    ]
    return asdict(bootstrap_interval(np.array(ratios)))


def _side_by_side(model: list[Row], reference: list[Row]) -> list[Row]:
    return [
        {
            **{
                name: value
                for name, value in own.items()
                if name not in (RESPONSES, SAMPLES, "scores", "signals", "signal_errors")
            },
            **{
                side: [
                    {"text": text, "score": score, "logp": how["logp"], "finished": how["finished"]}
                    for text, score, how in zip(row[RESPONSES], row["scores"], row[SAMPLES], strict=True)
                ]
                for side, row in zip(SIDES, (own, ref), strict=True)
            },
        }
        for own, ref in zip(model, reference, strict=True)
    ]


def _pairs_table(figures: dict[str, Any]) -> Table:
    table = _table(f"{figures['pairs']} held-out pairs, with 95% intervals", "", "value")
    for name, label in (
        ("accuracy", "accuracy: chosen reward above rejected"),
        ("margin", "margin: chosen reward less rejected"),
        ("reward_chosen", "chosen reward"),
        ("reward_rejected", "rejected reward"),
        ("loss", "loss"),
        ("policy_prefers_chosen", "model finds the chosen answer likelier"),
        ("reference_prefers_chosen", "reference finds the chosen answer likelier"),
    ):
        table.add_row(label, _value(figures[name]))
    found = figures["calibration"]
    table.add_row("calibration error, Brier score", f"{found['ece']:.3f}, {found['brier']:.3f}")
    return table


def _answers_table(figures: dict[str, Any]) -> Table:
    title = f"{figures['answers']} answers of each to {figures['prompts']} prompts, with 95% intervals"
    table = _table(title, "", *SIDES, "rise")
    for name, found in (("score", figures["score"]), *figures["signals"].items()):
        cells = ["not judged"] * 3 if found is None else [_value(found[column]) for column in (*SIDES, "rise")]
        table.add_row(Text(name), *cells)
    counts = f"{figures['wins']} won, {figures['ties']} tied, {figures['losses']} lost"
    table.add_row("win rate", _value(figures["win_rate"]), "", counts)
    if "kl" in figures:
        table.add_row("nats an answer from the reference (KL)", _value(figures["kl"]), "", "")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    return table


def _value(found: dict[str, float]) -> str:
    estimate = Estimate(**found)
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
