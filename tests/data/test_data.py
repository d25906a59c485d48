"""Rows of every form, tokens, boundaries, ends, truncation, and an account of every row."""

import gzip
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from dpo_fast.config import DataConfig
from dpo_fast.data.formats import choose_pairs, to_preference
from dpo_fast.data.load import load_groups
from dpo_fast.data.row_report import RowError
from dpo_fast.data.tokenize import common_prefix
from dpo_fast.errors import UserError
from dpo_fast.packs.layout import pack

CHATML = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
BARE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
THINKING = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: <think>' }}{% endif %}"
)
USER = {"role": "user", "content": "Name a capital."}
PARIS = {"role": "assistant", "content": "Paris."}
LONDON = {"role": "assistant", "content": "London!"}


def chat_tokenizer(template, *, bos=None):
    tokenizer = tiny_tokenizer()
    special = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special, **({"bos_token": bos} if bos else {})})
    tokenizer.chat_template = template
    return tokenizer


def write(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def load(tmp_path, rows, tokenizer=None, **config):
    return load_groups(DataConfig(data=write(tmp_path, rows), **config), tokenizer or tiny_tokenizer())


def texts(group, tokenizer):
    return [tokenizer.decode(ids) for ids in (group.prompt_ids, *group.answers)]


# Forms


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, ("p", "a", "b")),
        ({"chosen": "pa", "rejected": "pb"}, (None, "pa", "pb")),
        ({"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]}, ([USER], [PARIS], [LONDON])),
        ({"chosen": [USER, PARIS], "rejected": [USER, LONDON]}, ([USER], [PARIS], [LONDON])),
        (
            {"prompt": "Name a capital.", "chosen": [USER, PARIS], "rejected": [USER, LONDON]},
            ([USER], [PARIS], [LONDON]),
        ),
        ({"prompt": "Name a capital.", "chosen": [PARIS], "rejected": [LONDON]}, ([USER], [PARIS], [LONDON])),
        ({"prompt": [USER], "chosen": "Paris.", "rejected": LONDON}, ([USER], [PARIS], [LONDON])),
        ({"prompt": "p", "responses": ["x", "y", "z"], "scores": [1, 3.5, -2]}, ("p", "y", "z")),
        (
            {
                "conversations": [{"from": "human", "value": "Name a capital."}],
                "chosen": {"from": "gpt", "value": "Paris."},
                "rejected": {"from": "gpt", "value": "London!"},
            },
            ([USER], [PARIS], [LONDON]),
        ),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "text", "text": "Name a capital."}]}],
                "chosen": [PARIS],
                "rejected": [LONDON],
            },
            ([USER], [PARIS], [LONDON]),
        ),
        (
            {
                "chosen": "\n\nHuman: Name a capital.\n\nAssistant: Paris.",
                "rejected": "\n\nHuman: Name a capital.\n\nAssistant: London!",
            },
            ([USER], [PARIS], [LONDON]),
        ),
    ],
)
def test_forms(row, expected):
    preference = to_preference(row, DataConfig(), has_chat_template=True)
    assert (preference.prompt, *preference.answers) == expected


def test_transcripts_stay_text_without_a_chat_template():
    row = {
        "chosen": "\n\nHuman: Hi.\n\nAssistant: Hey.\n\nHuman: More.\n\nAssistant: Yes.",
        "rejected": "\n\nHuman: Hi.\n\nAssistant: Hey.\n\nHuman: More.\n\nAssistant: Yesterday.",
    }
    preference = to_preference(row, DataConfig(), has_chat_template=False)
    assert preference.prompt == "\n\nHuman: Hi.\n\nAssistant: Hey.\n\nHuman: More.\n\nAssistant:"
    assert preference.answers == (" Yes.", " Yesterday.")


def test_columns_are_mapped():
    row = {"question": "p", "good": "a", "bad": "b"}
    config = DataConfig(prompt_column="question", chosen_column="good", rejected_column="bad")
    preference = to_preference(row, config, has_chat_template=False)
    assert (preference.prompt, *preference.answers) == ("p", "a", "b")


@pytest.mark.parametrize(
    ("row", "cause", "message"),
    [
        ([1, 2], "wrong_type", "found list"),
        ({"prompt": "p", "chosen": "a"}, "missing_field", "'rejected' is missing; the row has 'prompt', 'chosen'"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "wrong_type", "'chosen': expected a string or messages"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "wrong_type", "'prompt'"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "empty_answer", "'chosen' is an empty string"),
        (
            {"prompt": [USER], "chosen": [{"role": "assistant", "content": ""}], "rejected": [PARIS]},
            "empty_answer",
            "'chosen'",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "identical_answers", ""),
        ({"chosen": [USER, PARIS], "rejected": [USER, PARIS]}, "identical_answers", ""),
        ({"chosen": [PARIS], "rejected": [LONDON]}, "missing_field", "no first message in common"),
        ({"prompt": [USER], "chosen": [{"text": "x"}], "rejected": [PARIS]}, "wrong_type", "'role' and 'content'"),
        (
            {"prompt": [USER], "chosen": [{"role": "assistant", "content": 4}], "rejected": [PARIS]},
            "wrong_type",
            "content",
        ),
        ({"prompt": "p", "responses": ["x"], "scores": [1, 2]}, "wrong_type", "same length"),
        ({"prompt": "p", "responses": ["x", "y"], "scores": [1, None]}, "wrong_type", "finite numbers"),
        ({"prompt": "p", "responses": ["x", "y"], "scores": [2, 2]}, "tied_scores", ""),
        ({"prompt": "p", "responses": ["x", "y"]}, "missing_field", "'scores' is missing"),
        (
            {"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON], "tools": "{"},
            "wrong_type",
            "'tools': not valid JSON",
        ),
        *(
            (
                {"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON], "tools": tools},
                "wrong_type",
                "'tools': expected a list of tools",
            )
            for tools in ([1, 2], {"name": "atlas"}, 7, '{"name": "atlas"}')
        ),
    ],
)
def test_rows_that_cannot_be_used_say_why(row, cause, message):
    with pytest.raises(RowError) as caught:
        to_preference(row, DataConfig(), has_chat_template=True)
    assert caught.value.cause == cause
    assert message in str(caught.value)


# Tokens


def test_words_are_not_cut_where_characters_part(tmp_path):
    """`Paris ` and `Parma` part at a character within a word; the split must not."""
    tokenizer = tiny_tokenizer()
    (group,), _ = load(tmp_path, [{"chosen": "is Paris of", "rejected": "is Paint of"}], tokenizer)
    for answer, text in zip(group.answers, ("is Paris of", "is Paint of"), strict=True):
        assert [*group.prompt_ids, *answer] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    boundary = common_prefix(*[tokenizer(t)["input_ids"] for t in ("is Paris of", "is Paint of")])
    assert len(group.prompt_ids) == boundary


words = st.lists(
    st.sampled_from(["the", " quick", " Par", "is", "ma", " ", "\n", "é", "0 1", "Paris "]), max_size=6
).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=words, chosen=words.filter(bool), rejected=words.filter(bool), implicit=st.booleans())
def test_prompt_and_answer_are_the_whole_texts_tokens(tmp_path, prompt, chosen, rejected, implicit):
    tokenizer = tiny_tokenizer()
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if implicit:
        row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    if chosen == rejected:
        return
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


@pytest.mark.parametrize(
    ("template", "bos", "prompt", "chosen"),
    [
        (CHATML, None, "<|im_start|>user\nName a capital.<|im_end|>\n<|im_start|>assistant\n", "Paris.<|im_end|>\n"),
        (LLAMA_2, "<bos>", "<bos>[INST] Name a capital. [/INST]", " Paris. <eos>"),
        (
            GEMMA,
            "<bos>",
            "<bos><start_of_turn>user\nName a capital.<end_of_turn>\n<start_of_turn>model\n",
            "Paris.<end_of_turn>\n",
        ),
    ],
)
def test_chat_templates(tmp_path, template, bos, prompt, chosen):
    tokenizer = chat_tokenizer(template, bos=bos)
    (group,), report = load(tmp_path, [{"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]}], tokenizer)
    assert texts(group, tokenizer)[:2] == [prompt, chosen]
    assert report.causes == {}


def test_a_template_without_an_end_gets_the_tokenizers(tmp_path):
    tokenizer = chat_tokenizer(BARE)
    (group,), report = load(tmp_path, [{"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]}], tokenizer)
    assert [answer[-1] for answer in group.answers] == [tokenizer.eos_token_id] * 2
    assert list(report.causes) == ["end_token_added"]


def test_a_generation_prompt_that_the_whole_does_not_have_is_left_out_and_counted(tmp_path):
    tokenizer = chat_tokenizer(THINKING)
    (group,), report = load(tmp_path, [{"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]}], tokenizer)
    assert texts(group, tokenizer)[0].startswith("user: Name a capital.<|im_end|>assistant: ".rstrip())
    assert "<think>" not in "".join(texts(group, tokenizer))
    assert list(report.causes) == ["boundary_moved"]


def test_tools_reach_the_template(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    row = {"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON], "tools": '[{"name": "atlas"}]'}
    (group,), _ = load(tmp_path, [row], tokenizer)
    assert 'TOOLS [{"name": "atlas"}]' in texts(group, tokenizer)[0]


def test_a_template_that_refuses_a_row_drops_it(tmp_path):
    rows = [
        {"prompt": [{"role": "system", "content": "Be brief."}, USER], "chosen": [PARIS], "rejected": [LONDON]},
        {"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]},
    ]
    groups, report = load(tmp_path, rows, chat_tokenizer(GEMMA, bos="<bos>"))
    assert [group.row for group in groups] == [1]
    assert "System role not supported" in report.render()


def test_a_template_that_fails_on_a_row_drops_it(tmp_path):
    """`tool_calls` of a wrong shape give a Python error inside the template, not one of Jinja's."""
    calls = "{% for m in messages %}{{ m['content'] + (m.tool_calls[0] + '' if m.tool_calls else '') }}{% endfor %}"
    rows = [
        {"prompt": [USER], "chosen": [{**PARIS, "tool_calls": [5]}], "rejected": [LONDON]},
        {"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]},
    ]
    groups, report = load(tmp_path, rows, chat_tokenizer(calls))
    assert [group.row for group in groups] == [1]
    assert report.causes["template_error"] == ["line 1"]
    assert "unsupported operand" in report.render()


def test_half_a_character_is_no_text(tmp_path):
    rows = ['{"prompt": "The", "chosen": " fox \\ud83d", "rejected": " dog"}', GOOD]
    groups, report = load(tmp_path, rows)
    assert [group.row for group in groups] == [1]
    assert r"line 1: its text holds half of a character (\ud83d)" in report.render()


def test_messages_need_a_template(tmp_path):
    with pytest.raises(UserError, match="--chat_template FILE"):
        load(tmp_path, [{"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON]}])


def test_plain_text_is_wrapped_on_request(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    row = {"prompt": "Name a capital.", "chosen": "Paris.", "rejected": "London!"}
    (plain,), _ = load(tmp_path, [row], tokenizer)
    (wrapped,), _ = load(tmp_path, [row], tokenizer, apply_chat_template=True)
    assert texts(plain, tokenizer) == ["Name a capital.", "Paris.<eos>", "London!<eos>"]
    assert texts(wrapped, tokenizer)[1] == "Paris.<|im_end|>\n"


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


def test_a_tokenizer_without_an_end_token_is_reported(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    _, report = load(tmp_path, [{"prompt": "The", "chosen": " fox", "rejected": " dog"}], tokenizer)
    assert "cannot learn to stop" in report.render()


def test_no_prompt_is_counted(tmp_path):
    (group,), report = load(tmp_path, [{"prompt": "", "chosen": "fox", "rejected": "dog"}])
    assert len(group.prompt_ids) == 0
    assert list(report.causes) == ["no_prompt_token"]


# Truncation

LONG = {"prompt": "0 1 2 3 4 5 6 7 8 9", "chosen": " 1 1 1 1 1 1", "rejected": " 1 1 1 2"}


def lengths(group):
    return [len(group.prompt_ids), *map(len, group.answers)]


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
    (whole,), _ = load(tmp_path, [LONG], tokenizer, max_length=None)
    prompt, chosen, rejected = lengths(whole)
    (group,), report = load(tmp_path, [LONG], tokenizer, max_length=prompt + chosen - 5, truncation_mode="keep_end")
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


# Sources and the report

GOOD = {"prompt": "The", "chosen": " fox", "rejected": " dog"}


def test_one_bad_row_does_not_end_a_run_and_every_row_is_accounted_for(tmp_path):
    rows = [
        GOOD,
        '{"prompt": "p", ',
        {**GOOD, "chosen": ""},
        {**GOOD, "rejected": " fox"},
        "",
        {"prompt": "p"},
        {**GOOD, "chosen": 7},
        GOOD,
    ]
    groups, report = load(tmp_path, rows)
    assert [group.row for group in groups] == [0, 6]
    assert report.to_dict()["dropped"] == {
        "broken_json": 1,
        "empty_answer": 1,
        "identical_answers": 1,
        "missing_field": 1,
        "wrong_type": 1,
    }
    assert report.rows_read == 7 == report.rows_used + sum(report.to_dict()["dropped"].values())
    text = report.render()
    assert "line 2: Expecting property name" in text
    assert "line 6: field 'chosen' is missing" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\xe9"}', "line 2: not UTF-8 text at byte 13"),
        (b"[" * 100_000, "line 2: maximum recursion depth"),
        (b'{"prompt": ' + b"1" * 5000 + b"}", "line 2: Exceeds the limit"),
        (b"\x00", "line 2: Expecting value"),
    ],
    ids=["latin-1", "deep", "digits", "nul"],
)
def test_a_line_that_cannot_be_read_is_one_row_lost(tmp_path, line, message):
    good = json.dumps(GOOD).encode()
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([good, line, good]))
    groups, report = load_groups(DataConfig(data=str(tmp_path / "rows.jsonl")), tiny_tokenizer())
    assert [group.row for group in groups] == [0, 2]
    assert report.to_dict()["dropped"] == {"broken_json": 1}
    assert message in report.render()
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: not valid JSON"):
        load_groups(DataConfig(data=str(tmp_path / "rows.jsonl"), strict=True), tiny_tokenizer())


@pytest.mark.parametrize("name", ["rows.jsonl", "lines.json", "list.json"])
def test_byte_order_marks_and_odd_line_separators_lose_nothing(tmp_path, name):
    """Windows writes the one; U+2028 may stand in a JSON string, and Python's splitlines would cut there."""
    rows = [{**GOOD, "chosen": " fox\u2028 Paris\x85"}, GOOD]
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = f"[{','.join(texts)}]" if name == "list.json" else "\r\n".join(texts)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    groups, report = load_groups(DataConfig(data=str(tmp_path / name), strict=True), tiny_tokenizer())
    assert len(groups) == 2
    assert report.causes == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ', r"rows\.jsonl, line 2: not valid JSON: Expecting value at column 11"),
        ({**GOOD, "chosen": ""}, r"line 2: an answer is empty: field 'chosen'"),
        ({**GOOD, "rejected": " fox"}, "line 2: both answers are the same"),
    ],
)
def test_strict_stops_at_the_first_bad_row(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, [GOOD, row], strict=True)


def test_every_kind_of_file_gives_the_same_groups(tmp_path):
    rows = [GOOD, {**GOOD, "chosen": " 0 1"}]
    jsonl = write(tmp_path, rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text((tmp_path / "rows.jsonl").read_text())
    pyarrow.parquet.write_table(datasets.Dataset.from_list(rows).data.table, tmp_path / "rows.parquet")
    tokenizer = tiny_tokenizer()
    want, _ = load_groups(DataConfig(data=jsonl), tokenizer)
    for name in ("rows.jsonl.gz", "list.json", "lines.json", "rows.parquet"):
        got, _ = load_groups(DataConfig(data=str(tmp_path / name)), tokenizer)
        assert [lengths(g) for g in got] == [lengths(g) for g in want]
    some, _ = load_groups(DataConfig(data=jsonl, max_rows=1), tokenizer)
    assert len(some) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("rows.txt", b"x", "expected a file that ends in"),
        ("broken.json", b"[1, 2", "not valid JSON"),
        ("object.json", b"{}", "expected a list of rows, found an object"),
        ("broken.parquet", b"no parquet", "not a parquet file"),
        ("broken.jsonl.gz", b"no gzip", "cannot be read"),
        ("cut.jsonl.gz", gzip.compress(b"{}" * 9999)[:-20], "cannot be read"),
        ("flipped.jsonl.gz", gzip.compress(b"{}")[:10] + b"\xff" * 20, "cannot be read"),
        ("deep.json", b"[" * 100_000, "not valid JSON"),
        ("latin.jsonl", b'{"prompt": "\xe9"}', "not UTF-8"),
        ("empty.jsonl", b"\n", "no usable row"),
    ],
)
def test_sources_that_cannot_be_read_say_why(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_groups(DataConfig(data=str(tmp_path / name)), tiny_tokenizer())


def test_a_hub_name_is_handed_to_datasets(monkeypatch):
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        return [GOOD]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    groups, _ = load_groups(DataConfig(data="someone/pairs:test"), tiny_tokenizer())
    assert calls == [("someone/pairs", "test")]
    assert len(groups) == 1


@pytest.mark.parametrize(
    ("which", "gap", "expected"),
    [
        ("best_worst", 0, [(1, 2)]),
        ("best_worst", 6, []),
        ("adjacent", 0, [(1, 3), (3, 0), (0, 2)]),
        ("adjacent", 1, [(1, 3), (0, 2)]),
        ("all", 0, [(1, 3), (1, 0), (1, 2), (3, 0), (3, 2), (0, 2)]),
        ("all", 2.5, [(1, 0), (1, 2), (3, 2), (0, 2)]),
    ],
)
def test_pairs_of_scored_responses(which, gap, expected):
    assert choose_pairs([1, 3.5, -2, 1.5], which, gap) == expected
    assert choose_pairs([2, 2, 2], which, gap) == []
    assert (0, 1) not in choose_pairs([2, 2, 1], which, gap)


def test_each_response_is_kept_once_however_many_pairs_it_is_in(tmp_path):
    rows = [
        {"prompt": "Name a city.", "responses": [" Rome", " Paris", " Oslo", " Rome"], "scores": [1, 3, 2, 0]},
        {"prompt": "Name a town.", "responses": [" A", " A"], "scores": [1, 3]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer()
    (group,), report = load_groups(DataConfig(data=str(path), pairs="all"), tokenizer)
    texts = [tokenizer.decode(answer) for answer in group.answers]
    assert texts == [" Rome<eos>", " Paris<eos>", " Oslo<eos>", " Rome<eos>"]
    # Rome against Rome is no preference, whatever their scores.
    assert sorted(group.pairs) == [(1, 0), (1, 2), (1, 3), (2, 0), (2, 3)]
    assert report.to_dict()["dropped"] == {"identical_answers": 1}
    (best,), _ = load_groups(DataConfig(data=str(path)), tokenizer)
    assert [tokenizer.decode(answer) for answer in best.answers] == [" Paris<eos>", " Rome<eos>"]
    assert best.pairs == ((0, 1),)


def test_scores_weights_and_gold_answers_reach_the_pack(tmp_path):
    """A group's ranking follows its answers when some are dropped, and is what the pack holds."""
    rows = [
        {"prompt": "Name a city.", "responses": [" Rome", " Paris", " Oslo"], "scores": [1, 3.5, 1], "w": 0.5},
        {"prompt": "Name a town.", "responses": [" C", " A", " B"], "scores": [2, 1, 4], "w": 2},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row | {"best": " Cairo"}) + "\n" for row in rows))
    config = DataConfig(data=str(path), pairs="adjacent", min_score_gap=1.5, weight_column="w", gold_column="best")
    tokenizer = tiny_tokenizer()
    groups, _ = load_groups(config, tokenizer)
    texts = [[tokenizer.decode(answer) for answer in group.answers] for group in groups]
    assert texts == [[" Rome<eos>", " Paris<eos>", " Cairo<eos>"], [" C<eos>", " B<eos>", " Cairo<eos>"]]
    batch = pack(groups)
    assert batch.weights.tolist() == [0.5, 2]
    assert batch.score_gaps.tolist() == [2.5, 2]
    assert (batch.chosen.tolist(), batch.rejected.tolist(), batch.gold.tolist()) == ([1, 4], [0, 3], [2, 5])
    plain, _ = load_groups(DataConfig(data=str(path)), tokenizer)
    assert pack(plain).weights is None
    assert pack(plain).gold is None


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("weight", -1, "field 'weight': expected 0 or above, found -1"),
        ("weight", "high", "field 'weight': expected a finite number, found 'high'"),
        ("margin", True, "field 'margin': expected a finite number, found True"),
        ("margin", float("nan"), "field 'margin': expected a finite number, found nan"),
        ("gold", None, "field 'gold' is missing"),
        ("gold", "", "field 'gold' is an empty string"),
    ],
)
def test_columns_of_a_wrong_kind_are_named(tmp_path, column, value, message):
    row = {"prompt": "a", "chosen": " b", "rejected": " c", column: value}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        load_groups(DataConfig(data=str(path), **{f"{column}_column": column}), tiny_tokenizer())


def test_a_margin_is_the_gap(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": " b", "rejected": " c", "margin": 2.25}) + "\n")
    groups, _ = load_groups(DataConfig(data=str(path), margin_column="margin"), tiny_tokenizer())
    assert pack(groups).score_gaps.tolist() == [2.25]
