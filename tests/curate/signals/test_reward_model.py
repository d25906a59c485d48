"""Reward models, tiny and random, against one plain forward per text."""

import pytest
import torch
from judging import PROMPT, TEMPLATE, judge_by_model
from oracle import tiny_llama, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)

from dpo_fast.curate.verdict import Question
from dpo_fast.errors import UserError

ANSWERS = ["Paris", "", "London, of England.", "<b>\u05d0\0</b>", "a fox " * 10, "\ud800"]


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
    [plain, chat] = judge_by_model(
        f"reward-model:{folder}", [Question({}, PROMPT, ANSWERS), Question({}, turns, ANSWERS[:1])]
    )
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
    [verdicts] = judge_by_model(
        f"reward-model:{tmp_path}", [Question({}, [{"role": "user", "content": PROMPT}], ANSWERS)]
    )
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
    [[verdict]] = judge_by_model(f"reward-model:{folder}", [Question({}, "Hi", ["a<eos><pad>b"])])
    ids = tokenizer("<user>Hi<eos><assistant>a< eos>< pad>b<eos>")["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2
    assert verdict.score == pytest.approx(plain_reward(folder, ids), abs=1e-5)


def test_what_a_model_cannot_read_is_not_judged(tmp_path):
    folder = save_reward_model(
        tmp_path, TEMPLATE + "{% if messages|length > 2 %}{{ raise_exception('two') }}{% endif %}"
    )
    long = Question({}, "Hi", ["fine", "x" * 100_000])
    refused = Question({}, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], ["c"])
    [[fine, too_long], [odd]] = judge_by_model(f"reward-model:{folder}", [long, refused])
    assert fine.score is not None
    assert too_long.score is None
    assert too_long.reason.endswith("the model reads 1 to 512")
    assert odd == (None, "the model's chat template refuses it: two")


def test_no_padding_token_reads_one_text_at_a_time(tmp_path):
    tokenizer = tiny_tokenizer()
    folder = save_reward_model(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    [verdicts] = judge_by_model(f"reward-model:{folder}", [Question({}, PROMPT, ANSWERS)])
    for answer, verdict in zip(ANSWERS, verdicts, strict=True):
        ids = tokenizer(PROMPT)["input_ids"] + tokenizer(text_of(answer))["input_ids"]
        assert verdict.score == pytest.approx(plain_reward(folder, ids), abs=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: save_reward_model(folder, num_labels=2), "has 2 outputs; a reward model has 1"),
        (lambda folder: folder, "holds no config.json"),
    ],
)
def test_what_is_no_reward_model(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=f"--signals reward-model:.*{message}"):
        judge_by_model(f"reward-model:{tmp_path}", [Question({}, "", ["a"])])


def test_a_language_model_is_no_reward_model(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.config.num_labels = 1
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"not a reward model: its checkpoint lacks score\.weight"):
        judge_by_model(f"reward-model:{tmp_path}", [Question({}, "", ["a"])])


def test_a_reward_model_of_nan_judges_nothing(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(save_reward_model(tmp_path))
    model.score.weight.data[0, 3] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"--signals reward-model:.* hold nan or infinity: score\.weight"):
        judge_by_model(f"reward-model:{tmp_path}", [Question({}, "", ["a"])])


def test_a_token_that_the_model_lacks_is_named(tmp_path):
    folder = save_reward_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=f"--signals reward-model:{folder}: a text has token 320, but the model embeds"):
        judge_by_model(f"reward-model:{folder}", [Question({}, PROMPT, ["Paris <call>"])])


def test_a_padding_token_that_the_model_lacks_is_not_used(tmp_path):
    folder = save_reward_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(folder)
    [verdicts] = judge_by_model(f"reward-model:{folder}", [Question({}, PROMPT, ANSWERS[:3])])
    for answer, verdict in zip(ANSWERS, verdicts, strict=False):
        ids = tokenizer(PROMPT)["input_ids"] + tokenizer(text_of(answer))["input_ids"]
        assert verdict.score == pytest.approx(plain_reward(folder, ids), abs=1e-5)
