"""Judges, tiny and random, against one plain forward per question."""

import pytest
import torch
from judging import PROMPT, TEMPLATE, judge_by_model
from oracle import save_tiny_checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from dpo_fast.config import LabelConfig
from dpo_fast.curate.signals.comparisons import JUDGE_QUESTION
from dpo_fast.curate.signals.registry import parse_signals
from dpo_fast.curate.verdict import Question
from dpo_fast.errors import UserError


def plain_preference(model, tokenizer, text):
    """log p(A or " A") - log p(B or " B") of the next token."""
    with torch.no_grad():
        logps = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].log_softmax(-1)

    def letter(name):
        ways = [tokenizer.encode(way) for way in (name, f" {name}")]
        return torch.stack([logps[i] for i in {way[0] for way in ways if len(way) == 1}]).logsumexp(0)

    return (letter("A") - letter("B")).item()


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_judge(tmp_path, template):
    save_tiny_checkpoint(tmp_path, seed=4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = template
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.config.max_position_embeddings = 4096
    # Far enough from the token that is read last that the answers count, too.
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data *= 3
    model.save_pretrained(tmp_path)
    answers = ["Paris", "London", "", "a fox", "Paris", "{first} 7"]
    [verdicts, two] = judge_by_model(
        f"judge:{tmp_path}", [Question({}, PROMPT, answers), Question({}, "x", ["0", "1 2 3"])]
    )

    def prefers_a(prompt, first, second):
        text = JUDGE_QUESTION.format(prompt=prompt, first=first, second=second)
        text = f"<user>{text}<eos><assistant>" if template else f"{text}\n\nBetter answer:"
        return plain_preference(model, tokenizer, text) > 0

    def share(prompt, one, other):
        orders = {prefers_a(prompt, one, other), not prefers_a(prompt, other, one)}
        return 0.5 if one == other or len(orders) == 2 else float(orders.pop())

    for number, verdict in enumerate(verdicts):
        others = [answer for n, answer in enumerate(answers) if n != number]
        assert verdict.score == pytest.approx(sum(share(PROMPT, answers[number], o) for o in others) / len(others))
    assert [v.score for v in two] == [share("x", "0", "1 2 3"), 1 - share("x", "0", "1 2 3")]
    assert len({score for score, _ in verdicts}) > 2
    assert verdicts[0].score == verdicts[4].score


def test_a_judge_that_favours_a_place_says_tie(tmp_path):
    save_tiny_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.config.max_position_embeddings = 4096
    model.save_pretrained(tmp_path)
    assert len(tokenizer.encode("A")) == 1
    [verdicts] = judge_by_model(f"judge:{tmp_path}", [Question({}, "x", ["a", "b", "c"])])
    assert verdicts == [(0.5, None)] * 3


def test_a_judge_needs_two_answers_that_fit(tmp_path):
    save_tiny_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.config.max_position_embeddings = 1000
    model.save_pretrained(tmp_path)
    [alone, none, long] = judge_by_model(
        f"judge:{tmp_path}",
        [Question({}, "", ["a"]), Question({}, "", []), Question({}, "", ["a", "b", "x" * 100_000])],
    )
    assert alone == [(None, "a judge needs two answers to compare")]
    assert none == []
    assert [v.score is None for v in long] == [False, False, True]
    assert "the model reads 1 to 1000" in long[2].reason


def test_a_judge_without_letters_is_refused(tmp_path):
    save_tiny_checkpoint(tmp_path)
    [signal] = parse_signals(LabelConfig(signals=f"judge:{tmp_path}"))
    signal.of_rows.tokenizer.encode = lambda text, **_: [1, 2]
    with pytest.raises(UserError, match="no single token for the letter A"):
        signal.of_rows.judge([Question({}, "", ["a", "b"])])
