"""Tokens: where the prompt ends, how answers end, what max_length leaves."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import tiny_tokenizer
from preference_rows import CHATML, GOOD, LONDON, PARIS, USER, chat_tokenizer, load, texts
from tokenizers.processors import TemplateProcessing

from dpo_fast.data.conversation import common_prefix
from dpo_fast.errors import UserError

LONG = {"prompt": "0 1 2 3 4 5 6 7 8 9", "chosen": " 1 1 1 1 1 1", "rejected": " 1 1 1 2"}
words = st.lists(
    st.sampled_from(["the", " quick", " Par", "is", "ma", " ", "\n", "é", "0 1", "Paris "]), max_size=6
).map("".join)


def lengths(group):
    return [len(group.prompt_ids), *map(len, group.answers)]


def test_words_are_not_cut_where_characters_part(tmp_path):
    """`Paris ` and `Parma` part at a character within a word; the split must not."""
    tokenizer = tiny_tokenizer()
    (group,), _ = load(tmp_path, [{"chosen": "is Paris of", "rejected": "is Paint of"}], tokenizer)
    for answer, text in zip(group.answers, ("is Paris of", "is Paint of"), strict=True):
        assert [*group.prompt_ids, *answer] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    boundary = common_prefix(*[tokenizer(t)["input_ids"] for t in ("is Paris of", "is Paint of")])
    assert len(group.prompt_ids) == boundary


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=words, chosen=words.filter(str.strip), rejected=words.filter(str.strip), implicit=st.booleans())
def test_prompt_and_answer_are_the_whole_texts_tokens(tmp_path, prompt, chosen, rejected, implicit):
    assume(chosen != rejected)
    assume(not (len(prompt) >= 20 and chosen.startswith(prompt) and rejected.startswith(prompt)))
    tokenizer = tiny_tokenizer()
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if implicit:
        row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    (group,), _ = load(tmp_path, [row], tokenizer)
    for answer, text in zip(group.answers, (chosen, rejected), strict=True):
        assert [*group.prompt_ids, *answer] == [*tokenizer(prompt + text)["input_ids"], tokenizer.eos_token_id]
    if not implicit:
        assert len(group.prompt_ids) <= len(tokenizer(prompt)["input_ids"])


def test_split_is_trls(tmp_path):
    """TRL 1.16 on explicit prompts, for texts and for messages."""
    from trl.data_utils import is_conversational
    from trl.trainer.dpo_trainer import DPOTrainer

    assert is_conversational({"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]})
    tokenizer = chat_tokenizer(CHATML)
    rows = [
        {"prompt": "The capital is", "chosen": " Paris.", "rejected": " London, of England."},
        {"prompt": "The capital is ", "chosen": "Paris.", "rejected": "London."},
    ]
    chats = [{"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]}]
    for part in (rows, chats):
        prepared = DPOTrainer._prepare_dataset(
            SimpleNamespace(_tokenizer=tokenizer),
            datasets.Dataset.from_list(part),
            tokenizer,
            SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start"),
            "train",
        )
        groups, _ = load(tmp_path, part, tokenizer)
        for group, theirs in zip(groups, prepared, strict=True):
            assert group.prompt_ids.tolist() == theirs["prompt_ids"]
            assert group.answers[0].tolist() == theirs["chosen_ids"]
            assert group.answers[1].tolist() == theirs["rejected_ids"]


def test_half_a_character_is_no_text(tmp_path):
    rows = ['{"prompt": "The", "chosen": " fox \\ud83d", "rejected": " dog"}', GOOD]
    groups, report = load(tmp_path, rows)
    assert [group.row for group in groups] == [1]
    assert r"line 1: its text holds half of a character (\ud83d)" in report.render()


@pytest.mark.parametrize("ends", [False, True])
def test_bos_once_and_eos_once(tmp_path, ends):
    """A tokenizer that adds bos (and eos) by itself, on rows that write them out, too."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>" if ends else "<bos> $A", special_tokens=[("<bos>", bos), ("<eos>", eos)]
    )
    rows = [
        {"prompt": "The capital", "chosen": " is Paris.", "rejected": " is London."},
        {"prompt": "<bos>The capital", "chosen": " is Paris.<eos>", "rejected": " is London.<eos>"},
    ]
    groups, _ = load(tmp_path, rows, tokenizer)
    for group in groups:
        for answer in group.answers:
            whole = [*group.prompt_ids, *answer]
            assert whole[0] == bos
            assert whole[-1] == eos
            assert whole.count(bos) == whole.count(eos) == 1


def test_an_end_token_inside_the_prompt_stays_in_the_prompt(tmp_path):
    tokenizer = tiny_tokenizer()
    (group,), _ = load(tmp_path, [{"prompt": "Numbers<eos>", "chosen": "0 1", "rejected": "2 3"}], tokenizer)
    assert texts(group, tokenizer) == ["Numbers<eos>", "0 1<eos>", "2 3<eos>"]


@pytest.mark.parametrize("end", ["<|im_end|>\n", "<|im_end|>", "<eos>", "<eos>\n"])
def test_an_end_that_is_written_out_is_written_once(tmp_path, end):
    """In strings and in messages; the tokenizer's own end token is `<eos>`."""
    tokenizer = chat_tokenizer(CHATML)
    row = {"prompt": "Name a capital.", "chosen": f"Paris.{end}", "rejected": "London!"}
    (plain,), report = load(tmp_path, [row], tokenizer, apply_chat_template=False)
    assert texts(plain, tokenizer)[1:] == [f"Paris.{end}", "London!<eos>"]
    assert report.causes == {}
    (chat,), report = load(tmp_path, [row], tokenizer, apply_chat_template=True)
    assert texts(chat, tokenizer)[1:] == ["Paris.<|im_end|>\n", "London!<|im_end|>\n"]
    assert list(report.causes) == ["end_token_removed"]


def test_a_tokenizer_without_an_end_token_is_reported(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    _, report = load(tmp_path, [{"prompt": "The", "chosen": " fox", "rejected": " dog"}], tokenizer)
    assert "cannot learn to stop" in report.render()


def test_no_prompt_is_counted(tmp_path):
    (group,), report = load(tmp_path, [{"prompt": "", "chosen": "fox", "rejected": "dog"}])
    assert len(group.prompt_ids) == 0
    assert list(report.causes) == ["no_prompt_token"]


def test_keep_start_cuts_answers_and_ends_none_of_them(tmp_path):
    tokenizer = tiny_tokenizer()
    (whole,), _ = load(tmp_path, [LONG], tokenizer, max_length=None)
    prompt, chosen, rejected = lengths(whole)
    (group,), report = load(tmp_path, [LONG], tokenizer, max_length=prompt + chosen - 1)
    assert lengths(group) == [prompt, chosen - 1, rejected]
    assert group.answers[0][-1] != tokenizer.eos_token_id
    assert group.answers[1][-1] == tokenizer.eos_token_id
    assert report.causes == {"truncated": ["line 1"]}


def test_keep_end_cuts_the_prompts_start_for_both_answers_and_keeps_bos(tmp_path):
    tokenizer = chat_tokenizer(CHATML, bos="<bos>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    plain = {"apply_chat_template": False}
    (whole,), _ = load(tmp_path, [LONG], tokenizer, max_length=None, **plain)
    prompt, chosen, rejected = lengths(whole)
    cut = {"max_length": prompt + chosen - 5, "truncation_mode": "keep_end"}
    (group,), report = load(tmp_path, [LONG], tokenizer, **cut, **plain)
    assert lengths(group) == [prompt - 5, chosen, rejected]
    assert group.prompt_ids[0] == tokenizer.bos_token_id
    np.testing.assert_array_equal(group.prompt_ids[1:], whole.prompt_ids[6:])
    assert list(report.causes) == ["prompt_truncated"]


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"max_length": 12, "truncation_mode": "drop"}, "too_long"),
        ({"max_length": 4}, "prompt_fills_max_length"),
    ],
)
def test_rows_that_do_not_fit_are_dropped_and_named(tmp_path, config, cause):
    with pytest.raises(UserError, match=cause):
        load(tmp_path, [LONG], **config)


def test_answers_that_differ_only_beyond_the_limit_are_dropped(tmp_path):
    tokenizer = tiny_tokenizer()
    prompt = len(tokenizer(LONG["prompt"])["input_ids"])
    with pytest.raises(UserError, match="identical_after_truncation"):
        load(tmp_path, [LONG], tokenizer, max_length=prompt + 2)
