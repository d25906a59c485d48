"""Signals called as `dpo-fast label` calls them."""

from dpo_fast.config import LabelConfig, SignalConfig
from dpo_fast.curate.signals.registry import parse_signals
from dpo_fast.curate.verdict import Question, verdict_of
from dpo_fast.curate.workers.pool import judge_texts

HUGE = 10_000_000
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPT = "The capital of France"


def judge(specs, answers, row=None, **settings):
    """For each signal, the verdict on each answer."""
    config = SignalConfig(signals=specs, **{"num_workers": 1} | settings)
    [(_, verdicts)] = judge_texts({0: Question(row or {}, "", list(answers))}, parse_signals(config), config)
    return verdicts


def scores(spec, answers, row=None, **settings):
    [verdicts] = judge([spec], answers, row, **settings)
    return [verdict.score for verdict in verdicts]


def judge_here(spec, answer, row=None):
    """In this process, for answers that are harmless."""
    [signal] = parse_signals(SignalConfig(signals=spec))
    return verdict_of(signal.of_text, answer, row or {})


def judge_by_model(spec, questions, **settings):
    """For each row, the verdict on each answer."""
    [signal] = parse_signals(LabelConfig(signals=spec, device="cpu", **{"judge_batch_size": 4} | settings))
    return signal.of_rows.judge(questions)
