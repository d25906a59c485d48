"""Reward models and judges, tiny and random, against one plain forward a text."""

import pytest
import torch
from oracle import save_tiny_checkpoint, tiny_llama, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)

from dpo_fast.config import LabelConfig
from dpo_fast.curate.signals.judge import JUDGE_QUESTION
from dpo_fast.curate.signals.registry import parse_signals
from dpo_fast.curate.verdict import Question
from dpo_fast.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ANSWERS = ["Paris", "", "London, of England.", "<b>\u05d0\0</b>", "a fox " * 10, "\ud800"]
PROMPT = "The capital of France"


def judge(spec, questions, **settings):
    [signal] = parse_signals(LabelConfig(signals=spec, device="cpu", **{"judge_batch_size": 4} | settings))
    return signal.of_rows.judge(questions)


def text_of(answer):
    return answer.encode(errors="replace").decode()


def save_reward_model(folder, template=None, *, num_labels=1):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    torch.manual_seed(3)
    config = tiny_llama(len(tokenizer)).config
    config.num_labels = num_labels
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_reward(folder, ids):
    """The classifier's weights on the hidden state of the last token."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return model.score(hidden).item()


def test_a_reward_model_with_a_chat_template(tmp_path):
    folder = save_reward_model(tmp_path, TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    [plain, chat] = judge(f"reward-model:{folder}", [Question({}, PROMPT, ANSWERS), Question({}, turns, ANSWERS[:1])])
    for answer, verdict in zip(ANSWERS, plain, strict=True):
        ids = tokenizer(f"<user>{PROMPT}<eos><assistant>{text_of(answer)}<eos>")["input_ids"]
        assert verdict.score == pytest.approx(plain_reward(folder, ids), abs=1e-5)
    ids = tokenizer(f"<system>Be brief.<eos><user>{PROMPT}<eos><assistant>Paris<eos>")["input_ids"]
    assert chat == [(pytest.approx(plain_reward(folder, ids), abs=1e-5), None)]
    assert len({score for score, _ in plain}) == len(ANSWERS)


def test_a_reward_model_that_reads_a_pair_of_texts(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B:1 <eos>:1", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    # It is saved where both know it.
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    config.initializer_range = 0.3
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    [verdicts] = judge(f"reward-model:{tmp_path}", [Question({}, [{"role": "user", "content": PROMPT}], ANSWERS)])
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    for answer, verdict in zip(ANSWERS, verdicts, strict=True):
        reply = tokenizer.encode(text_of(answer), add_special_tokens=False)
        ids = torch.tensor([[*prompt, 0, *reply, 0]])
        types = torch.tensor([[0] * (len(prompt) + 1) + [1] * (len(reply) + 1)])
        with torch.no_grad():
            assert verdict.score == pytest.approx(model(ids, token_type_ids=types).logits.item(), abs=1e-5)


def test_an_answer_cannot_end_its_turn(tmp_path):
    folder = save_reward_model(tmp_path, TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    [[verdict]] = judge(f"reward-model:{folder}", [Question({}, "Hi", ["a<eos><pad>b"])])
    ids = tokenizer("<user>Hi<eos><assistant>a< eos>< pad>b<eos>")["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2
    assert verdict.score == pytest.approx(plain_reward(folder, ids), abs=1e-5)


def test_what_a_model_cannot_read_is_not_judged(tmp_path):
    folder = save_reward_model(
        tmp_path, TEMPLATE + "{% if messages|length > 2 %}{{ raise_exception('two') }}{% endif %}"
    )
    long = Question({}, "Hi", ["fine", "x" * 100_000])
    refused = Question({}, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], ["c"])
    [[fine, too_long], [odd]] = judge(f"reward-model:{folder}", [long, refused])
    assert fine.score is not None
    assert too_long.score is None
    assert too_long.reason.endswith("the model reads 1 to 512")
    assert odd == (None, "the model's chat template refuses it: two")


def test_no_padding_token_reads_one_text_at_a_time(tmp_path):
    tokenizer = tiny_tokenizer()
    folder = save_reward_model(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    [verdicts] = judge(f"reward-model:{folder}", [Question({}, PROMPT, ANSWERS)])
    for answer, verdict in zip(ANSWERS, verdicts, strict=True):
        ids = tokenizer(PROMPT)["input_ids"] + tokenizer(text_of(answer))["input_ids"]
        assert verdict.score == pytest.approx(plain_reward(folder, ids), abs=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: save_reward_model(folder, num_labels=2), "gives 2 numbers; a reward model gives 1"),
        (lambda folder: folder, "holds no config.json"),
    ],
)
def test_what_is_no_reward_model(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=f"--signals reward-model:.*{message}"):
        judge(f"reward-model:{tmp_path}", [Question({}, "", ["a"])])


def test_a_language_model_is_no_reward_model(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.config.num_labels = 1
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no reward model, its checkpoint lacks score\.weight"):
        judge(f"reward-model:{tmp_path}", [Question({}, "", ["a"])])


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
    [verdicts, two] = judge(f"judge:{tmp_path}", [Question({}, PROMPT, answers), Question({}, "x", ["0", "1 2 3"])])

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
    [verdicts] = judge(f"judge:{tmp_path}", [Question({}, "x", ["a", "b", "c"])])
    assert verdicts == [(0.5, None)] * 3


def test_a_judge_needs_two_answers_that_fit(tmp_path):
    save_tiny_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.config.max_position_embeddings = 1000
    model.save_pretrained(tmp_path)
    [alone, none, long] = judge(
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
