"""What the demo measures: shares with intervals, log-probs under both models, and how far training moved the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_fast.demo_task import Answer, Fields, answer_logps, is_right, parses, prompt_text
from dpo_fast.intervals import bootstrap_interval, wilson_interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Written:
    """A model's answers to the held-out prompts: P prompts with S samples each, and the greedy answer of each."""

    sampled: list[list[Answer]]
    greedy: list[Answer]


def parse_shares(written: Written) -> np.ndarray:
    """(P,) share of each prompt's samples that parse."""
    return np.array([np.mean([parses(answer.text) for answer in answers]) for answers in written.sampled])


def right_shares(written: Written, held_out: Sequence[Fields]) -> np.ndarray:
    """(P,) share of each prompt's samples that hold exactly the fields asked for."""
    pairs = zip(written.sampled, held_out, strict=True)
    return np.array([np.mean([is_right(answer.text, fields) for answer in answers]) for answers, fields in pairs])


def rates(written: Written, held_out: Sequence[Fields]) -> dict[str, Any]:
    """What is counted in one model's answers, each as an `Estimate`'s fields."""
    num_greedy = sum(parses(answer.text) for answer in written.greedy)
    estimates = {
        "sampled_parse": bootstrap_interval(parse_shares(written)),
        "greedy_parse": wilson_interval(num_greedy, len(written.greedy)),
        "sampled_right": bootstrap_interval(right_shares(written, held_out)),
    }
    return {name: asdict(estimate) for name, estimate in estimates.items()}


def compare(
    base: PreTrainedModel,
    trained: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[Fields],
    before: Written,
    after: Written,
) -> dict[str, Any]:
    """Before against after.

    Returns:
        `before` and `after`: `rates`; `rise`: of the share of samples that parse; `logps`: mean log-prob of the base
        model's own samples, parsing and broken, under both models, in nats an answer and nats a token; `kl_to_base`:
        KL(trained || base) in nats an answer, as the mean log-ratio over what the trained model samples.
    """
    num_samples = len(before.sampled[0])
    prompts = [prompt_text(fields) for fields in held_out for _ in range(num_samples)]
    of_base = [answer for answers in before.sampled for answer in answers]
    of_trained = [answer for answers in after.sampled for answer in answers]
    log_ratios = answer_logps(trained, tokenizer, prompts, of_trained) - answer_logps(
        base, tokenizer, prompts, of_trained
    )
    return {
        "before": rates(before, held_out),
        "after": rates(after, held_out),
        "rise": asdict(bootstrap_interval(parse_shares(after) - parse_shares(before))),
        "logps": {
            "before": mean_logps(answer_logps(base, tokenizer, prompts, of_base), of_base),
            "after": mean_logps(answer_logps(trained, tokenizer, prompts, of_base), of_base),
        },
        "kl_to_base": asdict(bootstrap_interval(log_ratios.reshape(-1, num_samples).mean(1))),
    }


def mean_logps(sums: np.ndarray, answers: Sequence[Answer]) -> dict[str, float]:
    """Means of (B,) summed log-probs over parsing and over broken answers; NaN where there are none of a kind."""
    parsing = np.array([parses(answer.text) for answer in answers])
    per_token = sums / np.array([len(answer.ids) for answer in answers])
    means = {}
    for kind, chosen in (("parsing", parsing), ("broken", ~parsing)):
        means[kind] = float(sums[chosen].mean()) if chosen.any() else math.nan
        means[f"{kind}_per_token"] = float(per_token[chosen].mean()) if chosen.any() else math.nan
    return means
