"""`dpo-fast eval`: a trained model compared with its reference, on held-out pairs and on answers that both write.

On pairs: how often the implicit reward beta (log p - log ref) prefers the chosen answer, by how much, and whether the
sigmoid of the difference is calibrated. On prompts: both models answer with the same seeds, signals judge the answers,
and the win rate has a bootstrap interval over prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dpo_fast.analysis.answer_figures import SIDES, answer_figures
from dpo_fast.analysis.eval_tables import answers_table, pairs_table
from dpo_fast.analysis.intervals import bootstrap_interval
from dpo_fast.analysis.pair_figures import pair_figures
from dpo_fast.config import EvalConfig, LabelConfig, SampleConfig, SignalConfig
from dpo_fast.console import say
from dpo_fast.curate.generate import UNRANKED
from dpo_fast.curate.label import label_rows
from dpo_fast.curate.rows import Row, hold_output, read_objects, write_rows
from dpo_fast.curate.sample import RESPONSES, SAMPLES, answer_rows, prompt_ids
from dpo_fast.curate.stopping import exit_on_signals
from dpo_fast.data.load import load_groups
from dpo_fast.data.tokenize import PairTokenizer
from dpo_fast.errors import UserError
from dpo_fast.files import write_file_atomically
from dpo_fast.model.load import tokenizer_of
from dpo_fast.model.placement import pick_device
from dpo_fast.model.source import find
from dpo_fast.packs.layout import Group
from dpo_fast.reference.fill import reference_logps
from dpo_fast.reference.scores import AnswerLogps


@exit_on_signals(resumable=False)
def evaluate(config: EvalConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Compare `config.model` with `config.reference`.

    Returns:
        `pairs` (see `pair_figures`) if `data` is given; `answers` (see `answer_figures`) if `prompts` is given, with
        `kl`, the divergence from the reference in nats per answer, if answers are sampled at temperature 1 from the
        whole distribution, by models on this machine. `out` holds the same.

    Raises:
        UserError: a mistake in the settings or the data.
    """
    console = console or Console()
    out = _check(config)
    with hold_output(out) if out is not None else nullcontext():
        return _evaluate(config, out, console)


def _evaluate(config: EvalConfig, out: Path | None, console: Console) -> dict[str, Any]:
    figures: dict[str, Any] = {"model": config.model, "reference": config.reference, "beta": config.beta}
    prompts = read_objects(config.prompts, config.max_rows, console) if config.prompts else []
    if config.data:
        figures["pairs"] = _on_pairs(config, console)
        console.print(pairs_table(figures["pairs"]))
    if config.prompts:
        rows = write_and_judge(prompts, config, console)
        figures["answers"] = answer_figures(*rows)
        if config.temperature == 1 and config.top_p == 1 and config.backend != "openai":
            figures["answers"]["kl"] = _kl(rows[0], config, console)
        console.print(answers_table(figures["answers"]))
        if out is not None:
            write_rows(out.with_suffix(".answers.jsonl"), _side_by_side(*rows))
    if out is not None:
        write_file_atomically(out, json.dumps(figures, indent=2) + "\n")
        say(console, f"figures: {out}")
    return figures


def _check(config: EvalConfig) -> Path | None:
    """Reject settings that cannot work; returns the file to write."""
    if not config.reference:
        raise UserError("no reference given: pass --reference with the model that training started from")
    if not (config.data or config.prompts):
        raise UserError("nothing to evaluate on: pass --data with held-out pairs, --prompts with prompts, or both")
    if config.prompts and not config.signals:
        raise UserError("--prompts: nothing judges the answers; name a signal with --signals")
    if config.signals and not config.prompts:
        raise UserError("--signals: there are no answers to judge; pass --prompts with the prompts to answer")
    if config.backend != "openai" or config.data:
        find(config.model, config.adapter_base)
        find(config.reference, option="--reference")
        pick_device(config.device)
    if config.out is not None and Path(config.out).suffix != ".json":
        raise UserError(f"--out {config.out}: expected a file that ends in .json")
    return None if config.out is None else Path(config.out)


def _on_pairs(config: EvalConfig, console: Console) -> dict[str, Any]:
    """Read the pairs, score them with both models through the store, compare."""
    groups, report = load_groups(config, tokenizer_of(config))
    say(console, report.render())
    # The reference first: if training used this store, its scores are cached and the model is never loaded.
    reference, _ = reference_logps(config, config.reference, groups, console=console)
    policy, _ = reference_logps(config, config.model, groups, console=console)
    return pair_figures(
        [_pair_sums(answers, group.pairs) for answers, group in zip(policy, groups, strict=True)],
        [_pair_sums(answers, group.pairs) for answers, group in zip(reference, groups, strict=True)],
        config.beta,
    )


def _pair_sums(answers: AnswerLogps, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """(pairs, 2) fp64 log-probs of chosen and rejected answers."""
    sums = np.array([logps.astype(np.float64).sum() for logps in answers])
    return sums[np.array(pairs)]


def write_and_judge(rows: list[Row], config: EvalConfig, console: Console) -> tuple[list[Row], list[Row]]:
    """Prompts with the model's and with the reference's answers, judged; both use the same seeds."""
    common = {field.name for field in fields(SampleConfig)} & {field.name for field in fields(EvalConfig)}
    shared = {name: getattr(config, name) for name in common - {"model", "data", "out", "apply_chat_template"}}
    written = []
    urls = [config.base_url, config.base_url if config.reference_base_url is None else config.reference_base_url]
    for name, base_url in zip((config.model, config.reference), urls, strict=True):
        template = False if config.plain_prompts else None
        sampling = SampleConfig(**shared | {"model": name, "base_url": base_url, "apply_chat_template": template})
        written.append(answer_rows(rows, sampling, console=console))
    return judge(*_answered_by_both(written[0], written[1], config.num_samples, console), config, console)


def _answered_by_both(
    model: list[Row], reference: list[Row], num_samples: int, console: Console
) -> tuple[list[Row], list[Row]]:
    """The prompts of which a server refused no answer."""
    whole = [
        (own, ref)
        for own, ref in zip(model, reference, strict=True)
        if len(own[RESPONSES]) == len(ref[RESPONSES]) == num_samples
    ]
    if not whole:
        raise UserError("no prompt was answered by both models: a server refused some answer to each")
    if lost := len(model) - len(whole):
        say(console, f"{lost} prompts are left out: a server refused some of their answers")
    return [own for own, _ in whole], [ref for _, ref in whole]


def judge(model: list[Row], reference: list[Row], config: EvalConfig, console: Console) -> tuple[list[Row], list[Row]]:
    """The rows with `scores` and `signals`. Scores are comparable within a row, so both models' answers share one."""
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


def _kl(rows: list[Row], config: EvalConfig, console: Console) -> dict[str, float]:
    """KL(model || reference) in nats per answer: the mean log-ratio of the model's samples, with an interval."""
    tokenize = PairTokenizer(tokenizer_of(config))
    groups = [
        Group(
            number,
            np.array(prompt_ids(row, row[config.prompt_column], tokenize, config), dtype=np.int32),
            tuple(np.array(how["ids"], dtype=np.int32) for how in row[SAMPLES]),
            UNRANKED,
        )
        for number, row in enumerate(rows)
    ]
    reference, _ = reference_logps(config, config.reference, groups, console=console)
    ratios = [
        np.mean(
            [how["logp"] - logps.astype(np.float64).sum() for how, logps in zip(row[SAMPLES], answers, strict=True)]
        )
        for row, answers in zip(rows, reference, strict=True)
    ]
    return asdict(bootstrap_interval(np.array(ratios)))


def _side_by_side(model: list[Row], reference: list[Row]) -> list[Row]:
    """For each prompt, the answers of both models in one row."""
    replaced = (RESPONSES, SAMPLES, "scores", "signals", "signal_errors")
    return [
        {name: value for name, value in own.items() if name not in replaced}
        | {side: _answers(row) for side, row in zip(SIDES, (own, ref), strict=True)}
        for own, ref in zip(model, reference, strict=True)
    ]


def _answers(row: Row) -> list[Row]:
    return [
        {"text": text, "score": score, "logp": how["logp"], "finished": how["finished"]}
        for text, score, how in zip(row[RESPONSES], row["scores"], row[SAMPLES], strict=True)
    ]
