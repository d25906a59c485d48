"""Whole conversations, answers of several turns, tool calls."""

import numpy as np
import pytest
from chat_templates import family_tokenizer
from oracle import tiny_tokenizer
from preference_rows import CHATML, LONDON, PARIS, USER, chat_tokenizer, load, texts

from dpo_fast.config import DataConfig
from dpo_fast.data.formats import to_preference
from dpo_fast.data.row_report import RowError
from dpo_fast.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
MORE = {"role": "user", "content": "Another?"}
ROME = {"role": "assistant", "content": "Rome."}


def scored_text(group, tokenizer, number):
    return tokenizer.decode(group.answers[number][group.targets(number)])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # The whole conversation beside a prompt of messages, with and without its system turn.
        ({"prompt": [USER], "chosen": [USER, PARIS], "rejected": [USER, LONDON]}, ([USER], [PARIS], [LONDON])),
        (
            {"prompt": [SYSTEM, USER], "chosen": [USER, PARIS], "rejected": [SYSTEM, USER, LONDON]},
            ([SYSTEM, USER], [PARIS], [LONDON]),
        ),
        ({"prompt": [USER], "chosen": [USER, PARIS], "rejected": "London!"}, ([USER], [PARIS], [LONDON])),
        (
            {"prompt": [USER, PARIS, MORE], "chosen": [USER, PARIS, MORE, ROME], "rejected": [LONDON]},
            ([USER, PARIS, MORE], [ROME], [LONDON]),
        ),
        # `messages` as the prompt, and as one of the conversations.
        ({"messages": [USER], "chosen": [PARIS], "rejected": [LONDON]}, ([USER], [PARIS], [LONDON])),
        (
            {"messages": [USER, PARIS], "chosen": [USER, PARIS], "rejected": [USER, LONDON]},
            ([USER], [PARIS], [LONDON]),
        ),
        # Turns that both answers begin with are context.
        (
            {"prompt": [USER], "chosen": [PARIS, MORE, ROME], "rejected": [PARIS, MORE, LONDON]},
            ([USER, PARIS, MORE], [ROME], [LONDON]),
        ),
        (
            {"prompt": [USER], "chosen": [PARIS, MORE, ROME], "rejected": [LONDON]},
            ([USER], [PARIS, MORE, ROME], [LONDON]),
        ),
    ],
)
def test_what_all_answers_begin_with_is_the_prompt(row, expected):
    preference = to_preference(row, DataConfig(), has_chat_template=True)
    assert (preference.prompt, *preference.answers) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [USER, PARIS, MORE], "chosen": [USER, LONDON, MORE, ROME], "rejected": [ROME]}, "departs from the"),
        ({"prompt": "The moon?", "chosen": [USER, PARIS], "rejected": [USER, LONDON]}, "--prompt_column ''"),
        (
            {"prompt": [USER], "chosen": [SYSTEM, USER, PARIS], "rejected": [USER, LONDON]},
            "no first message in common",
        ),
    ],
)
def test_conversations_that_contradict_their_prompt_are_refused(row, message):
    with pytest.raises(RowError, match=message):
        to_preference(row, DataConfig(), has_chat_template=True)


SEVERAL = {"prompt": [USER], "chosen": [PARIS, MORE, ROME], "rejected": [LONDON, MORE, PARIS]}


@pytest.mark.parametrize(
    ("train_on", "chosen"),
    [
        ("assistant", "Paris.<|im_end|>\nRome.<|im_end|>\n"),
        ("last_turn", "Rome.<|im_end|>\n"),
        (
            "all",
            "Paris.<|im_end|>\n<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\nRome.<|im_end|>\n",
        ),
    ],
)
def test_only_the_assistants_turns_are_scored(tmp_path, train_on, chosen):
    tokenizer = chat_tokenizer(CHATML)
    (group,), report = load(tmp_path, [SEVERAL], tokenizer, train_on=train_on)
    assert scored_text(group, tokenizer, 0) == chosen
    assert texts(group, tokenizer)[0] == "<|im_start|>user\nName a capital.<|im_end|>\n<|im_start|>assistant\n"
    assert report.causes == {}
    if train_on != "all":
        assert [mask.dtype for mask in group.scored] == [np.dtype(bool)] * 2


def test_one_turn_has_no_mask_whatever_is_trained_on(tmp_path):
    """So the keys of the reference store are those of rows before there were masks."""
    row = {"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]}
    for train_on in ("assistant", "last_turn", "all"):
        (group,), _ = load(tmp_path, [row], chat_tokenizer(CHATML), train_on=train_on)
        assert group.scored == ()


def test_answers_that_part_at_the_users_turn(tmp_path):
    """No generation prompt stands where the user speaks; an assistant's turn alone is no answer beside it."""
    tokenizer = chat_tokenizer(CHATML)
    other = {"role": "user", "content": "One more?"}
    row = {"prompt": [USER], "chosen": [PARIS, MORE, ROME], "rejected": [PARIS, other, ROME]}
    (group,), report = load(tmp_path, [row], tokenizer)
    assert [scored_text(group, tokenizer, number) for number in (0, 1)] == ["Rome.<|im_end|>\n"] * 2
    assert report.causes == {}
    with pytest.raises(UserError, match="no turn of the assistant"):
        load(tmp_path, [{"prompt": [USER, PARIS], "chosen": [MORE], "rejected": [other]}], tokenizer)


def test_max_length_that_leaves_no_scored_token_drops_the_row(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    (group,), _ = load(tmp_path, [SEVERAL], tokenizer, train_on="last_turn")
    first = len(group.prompt_ids) + int(group.targets(0)[0])
    (cut,), report = load(tmp_path, [SEVERAL], tokenizer, train_on="last_turn", max_length=first + 4)
    assert scored_text(cut, tokenizer, 0) == tokenizer.decode(group.answers[0][group.targets(0)][:4])
    assert "truncated" in report.causes
    with pytest.raises(UserError, match="nothing_scored"):
        load(tmp_path, [SEVERAL], tokenizer, train_on="last_turn", max_length=first)


def test_plain_transcripts_score_the_assistants_turns_alone(tmp_path):
    row = {
        "chosen": "\n\nHuman: Hi.\n\nAssistant: Hey.\n\nHuman: More.\n\nAssistant: Yes.",
        "rejected": "\n\nHuman: Hi.\n\nAssistant: No.\n\nHuman: Why?\n\nAssistant: Ah.",
    }
    (group,), report = load(tmp_path, [row])
    tokenizer = tiny_tokenizer()
    assert texts(group, tokenizer)[0] == "\n\nHuman: Hi.\n\nAssistant:"
    assert scored_text(group, tokenizer, 0) == " Hey. Yes.<eos>"
    assert scored_text(group, tokenizer, 1) == " No. Ah.<eos>"
    assert report.causes == {}


def call(arguments, **function):
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": arguments} | function}],
    }


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_tool_call_arguments_are_an_object_for_the_template(tmp_path, arguments):
    """OpenAI's are JSON text, which `tojson` would encode once more."""
    tokenizer = family_tokenizer("chatml")
    row = {"prompt": [USER], "chosen": [call(arguments)], "rejected": [LONDON]}
    (group,), _ = load(tmp_path, [row], tokenizer)
    want = tokenizer.apply_chat_template([USER, call({"city": "Rome"})], tokenize=False)
    assert "".join(texts(group, tokenizer)[:2]) == want
    assert '"arguments": {"city": "Rome"}' in want


def test_tool_calls_that_cannot_be_rendered_are_refused(tmp_path):
    row = {"prompt": [USER], "chosen": [call("{city")], "rejected": [LONDON]}
    with pytest.raises(UserError, match=r"a tool call's arguments: expected JSON, found '\{city'"):
        load(tmp_path, [row], family_tokenizer("chatml"))
    with pytest.raises(UserError, match=r"leaves out the tool calls \(weather\)"):
        load(tmp_path, [row | {"chosen": [call({})]}], family_tokenizer("gemma"))


def test_a_template_that_wants_arguments_as_text_gets_them(tmp_path):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% for c in m.tool_calls or () %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = chat_tokenizer(template)
    (group,), _ = load(
        tmp_path, [{"prompt": [USER], "chosen": [call({"city": "Rome"})], "rejected": [LONDON]}], tokenizer
    )
    assert texts(group, tokenizer)[1] == 'weather {"city": "Rome"}<|im_end|>\n'


def test_sharegpt_function_calls_are_tool_calls(tmp_path):
    tokenizer = family_tokenizer("chatml")
    turns = [
        {"from": "human", "value": "Name a capital."},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "22 degrees"},
    ]
    row = {"conversations": turns, "chosen": {"from": "gpt", "value": "Paris."}, "rejected": "London!"}
    (group,), _ = load(tmp_path, [row], tokenizer)
    want = [USER, call({"city": "Rome"}), {"role": "tool", "content": "22 degrees"}]
    assert texts(group, tokenizer)[0] == tokenizer.apply_chat_template(want, tokenize=False, add_generation_prompt=True)
