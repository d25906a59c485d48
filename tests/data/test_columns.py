"""Columns under other names, columns that change what is rendered, and columns that nobody reads."""

import pytest
from chat_templates import family_tokenizer
from oracle import tiny_tokenizer
from preference_rows import CHATML, GOOD, LONDON, PARIS, USER, chat_tokenizer, load, texts

from dpo_fast.config import DataConfig
from dpo_fast.data.formats import FORMATS, Draft, data_format, to_preference
from dpo_fast.data.row_report import RowError
from dpo_fast.errors import UserError

ANSWERS = {"chosen": "Lima.", "rejected": "Ghana."}
TURNS = {"chosen": [PARIS], "rejected": [LONDON]}


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"question": "Name a capital."}, "Name a capital."),
        ({"query": "Name a capital."}, "Name a capital."),
        ({"input": "Name a capital."}, "Name a capital."),
        ({"instruction": "Name the capital.", "input": "Peru"}, "Name the capital.\nPeru"),
        ({"instruction": "Name a capital.", "input": ""}, "Name a capital."),
        ({"messages": [USER]}, [USER]),
        ({"conversations": [{"from": "human", "value": "Name a capital."}]}, [USER]),
        ({"prompt": "Name a capital.", "question": "another"}, "Name a capital."),
    ],
)
def test_a_prompt_under_another_name_is_the_prompt(columns, prompt):
    preference = to_preference(columns | ANSWERS, DataConfig(), has_chat_template=True)
    assert preference.prompt == prompt
    assert ("question" in preference.unused) == ("question" in columns and "prompt" in columns)


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        ({"body": "Name a capital."}, {}, r"'body' may hold the prompt.*--prompt_column body"),
        ({"question": "Where?", "instruction": "Answer."}, {}, "'question', 'instruction' may each be the prompt"),
        ({"question": "Where?"}, {"prompt_column": "quesion"}, "field 'quesion' is missing"),
        ({"dialog": [USER]} | TURNS, {}, r"'dialog' may hold the prompt.*--prompt_column dialog"),
    ],
)
def test_text_that_may_be_the_prompt_is_not_left_out_silently(tmp_path, columns, config, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, [ANSWERS | columns], **config)


def test_answers_that_hold_their_prompt_need_no_prompt_column(tmp_path):
    answers = {"chosen": "The capital of Peru is Lima.", "rejected": "The capital of Peru is Ghana."}
    for row, config in [
        (answers | {"source": "a collection", "prompt_id": "x y"}, {}),
        (answers | {"body": "a text"}, {"prompt_column": ""}),
    ]:
        (group,), report = load(tmp_path, [row], **config)
        assert tiny_tokenizer().decode(group.prompt_ids).rstrip() == "The capital of Peru is"
        assert list(report.unused) == [name for name in row if name not in answers]


def test_unused_columns_are_listed_once_with_what_they_resemble(tmp_path):
    rows = [GOOD | {"promt": "The", "sorce": "x", "empty": ""}, GOOD | {"sorce": "y", "tool": ["a"]}]
    _, report = load(tmp_path, rows)
    assert (
        "unused columns: 'promt' (did you mean 'prompt'?), 'sorce', 'tool' (did you mean 'tools'?)" in report.render()
    )
    assert report.to_dict()["unused_columns"] == ["promt", "sorce", "tool"]


@pytest.mark.parametrize("name", ["images", "image", "videos", "audio"])
def test_media_are_refused_until_they_are_supported(tmp_path, name):
    row = {"prompt": "<image> What is this?", "chosen": " A cat.", "rejected": " A dog."}
    groups, report = load(tmp_path, [row | {name: ["cat.png"]}, row | {name: []}])
    assert [group.row for group in groups] == [1]
    assert f"not supported yet [media; line 1]\n    line 1: field '{name}': leave such rows out" in report.render()


def rendered(tokenizer, turns, **options):
    return tokenizer.apply_chat_template(turns, tokenize=False, **options)


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row", [{"prompt": [USER]} | TURNS, {"question": USER["content"], "chosen": "Paris.", "rejected": "London!"}]
)
def test_a_system_column_is_the_system_turn(tmp_path, row, column):
    """orca_dpo_pairs' rows are strings; a system turn makes them a chat."""
    tokenizer = family_tokenizer("chatml")
    (group,), report = load(tmp_path, [row | {column: "Be brief."}], tokenizer)
    want = [{"role": "system", "content": "Be brief."}, USER]
    assert texts(group, tokenizer)[0] == rendered(tokenizer, want, add_generation_prompt=True)
    assert texts(group, tokenizer)[1] == "Paris.<|im_end|>\n"
    assert report.causes == {}
    (empty,), _ = load(tmp_path, [row | {column: ""}], tokenizer)
    assert texts(empty, tokenizer)[0] == rendered(tokenizer, [USER], add_generation_prompt=True)


def test_a_system_column_does_not_repeat_or_contradict_the_conversation(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    row = {"prompt": [system, USER], "system": "Be brief. "} | TURNS
    assert to_preference(row, DataConfig(), has_chat_template=True).prompt == [system, USER]
    with pytest.raises(RowError, match="own system turn differ"):
        to_preference(row | {"system": "Be long."}, DataConfig(), has_chat_template=True)
    with pytest.raises(RowError, match="expected the text of the system turn"):
        to_preference(row | {"system": 5}, DataConfig(), has_chat_template=True)
    plain = {"prompt": "p", "system": "Be brief."} | ANSWERS
    with pytest.raises(RowError, match="plain text has no system turn"):
        to_preference(plain, DataConfig(apply_chat_template=False), has_chat_template=True)
    unread = DataConfig(system_column=None)
    assert to_preference(plain, unread, has_chat_template=True).unused == ("system",)


@pytest.mark.parametrize("as_text", [False, True])
def test_template_arguments_reach_the_template(tmp_path, as_text):
    """Without them Qwen3 writes an empty thought into the scored answer."""
    tokenizer = family_tokenizer("qwen3")
    row = {"prompt": [USER]} | TURNS
    kwargs = '{"enable_thinking": false}' if as_text else {"enable_thinking": False}
    (by_row,), _ = load(tmp_path, [row | {"chat_template_kwargs": kwargs}], tokenizer)
    (by_run,), _ = load(tmp_path, [row], tokenizer, chat_template_kwargs={"enable_thinking": False})
    (by_both,), _ = load(
        tmp_path, [row | {"chat_template_kwargs": kwargs}], tokenizer, chat_template_kwargs={"enable_thinking": True}
    )
    want = rendered(tokenizer, [USER], add_generation_prompt=True, enable_thinking=False)
    for group in (by_row, by_run, by_both):
        assert texts(group, tokenizer) == [want, "Paris.<|im_end|>\n", "London!<|im_end|>\n"]
    (plain,), report = load(tmp_path, [row], tokenizer)
    assert texts(plain, tokenizer)[1] == "<think>\n\n</think>\n\nParis.<|im_end|>\n"
    assert "see --chat_template_kwargs" in report.render()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [("[1]", "expected an object"), ("{", "not valid JSON"), ({"tools": []}, "'tools' cannot be set there")],
)
def test_template_arguments_of_a_wrong_kind_are_named(kwargs, message):
    row = {"prompt": [USER], "chat_template_kwargs": kwargs} | TURNS
    with pytest.raises(RowError, match=message):
        to_preference(row, DataConfig(), has_chat_template=True)


def test_a_chat_needs_a_prompt_of_its_own(tmp_path):
    with pytest.raises(UserError, match="a chat needs a user's turn apart"):
        load(tmp_path, [{"chosen": "The fox", "rejected": "The dog"}], chat_tokenizer(CHATML), apply_chat_template=True)


def test_a_format_is_one_function(tmp_path, monkeypatch):
    """An invented one: a question with a right and a wrong answer, as sharegpt turns."""
    monkeypatch.setattr("dpo_fast.data.formats.FORMATS", dict(FORMATS))

    @data_format
    def quiz(row, config):
        if row.get("quiz") is None:
            return None
        names = ["right", "wrong"]
        return Draft(row.require("quiz"), [row.require(name) for name in names], names)

    tokenizer = chat_tokenizer(CHATML)
    row = {"quiz": "Name a capital.", "right": {"from": "gpt", "value": "Paris."}, "wrong": "London!", "level": 3}
    groups, report = load(tmp_path, [row, {"prompt": [USER]} | TURNS], tokenizer)
    assert texts(groups[0], tokenizer) == texts(groups[1], tokenizer)
    assert list(report.unused) == ["level"]
