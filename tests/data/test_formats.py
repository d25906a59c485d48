"""Rows of every form -> prompts and answers."""

import json

import pytest
from oracle import tiny_tokenizer
from preference_rows import LONDON, PARIS, USER, load

from dpo_fast.config import DataConfig
from dpo_fast.data.formats import FORMATS, Draft, choose_pairs, data_format, to_preference
from dpo_fast.data.load import load_groups
from dpo_fast.data.row_report import RowError
from dpo_fast.errors import UserError
from dpo_fast.packs.layout import Ranking, pack


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


def test_a_gap_of_binary_fractions_is_the_gap_that_is_written():
    """0.7 - 0.4 is 0.29999999999999993, 0.8 - 0.5 is 0.30000000000000004."""
    for scores in ([0.7, 0.4], [0.8, 0.5], [1000.7, 1000.4], [-0.4, -0.7]):
        for which in ("best_worst", "adjacent", "all"):
            assert choose_pairs(scores, which, 0.3) == [(0, 1)]
            assert choose_pairs(scores, which, 0.3001) == []
    assert choose_pairs([0.5, 0.5], "all", 0.0) == []


def test_a_number_that_no_float_holds_is_refused_by_line(tmp_path):
    huge = 10**400
    row = {"prompt": "The", "responses": [" fox", " dog"], "scores": [2, 1], "w": 1}
    lines = [row | {"scores": [huge, 1]}, row | {"w": huge}, row]
    groups, report = load(tmp_path, lines, weight_column="w")
    assert [group.row for group in groups] == [2]
    assert report.causes["wrong_type"] == ["line 1", "line 2"]
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: .*finite numbers in 'scores'"):
        load(tmp_path, lines, strict=True, weight_column="w")


@pytest.mark.parametrize("blank", ["", " ", "\n\t "])
def test_white_space_is_no_answer(blank):
    for row in (
        {"prompt": "p", "chosen": blank, "rejected": "b"},
        {"prompt": [USER], "chosen": [{"role": "assistant", "content": blank}], "rejected": [PARIS]},
    ):
        with pytest.raises(RowError) as caught:
            to_preference(row, DataConfig(), has_chat_template=True)
        assert caught.value.cause == "empty_answer"


def test_strings_that_repeat_their_prompt_are_read_once(tmp_path):
    prompt = "What is the capital of Peru? "
    (group,), report = load(tmp_path, [{"prompt": prompt, "chosen": prompt + "Lima.", "rejected": prompt + "Ghana."}])
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode([*group.prompt_ids, *group.answers[0]]) == prompt + "Lima.<eos>"
    assert "prompt_repeated" in report.causes
    # A short one may well be what an answer begins with.
    row = {"prompt": "The", "chosen": "The fox", "rejected": "The dog"}
    assert to_preference(row, DataConfig(), has_chat_template=False).answers == ("The fox", "The dog")


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


def test_a_new_format_is_read_by_its_definition_alone(tmp_path):
    """Rows of a question, a list of answers and the place of the best one."""

    @data_format
    def best_of_two(row, config):
        if row.get("best") is None:
            return None
        answers = row.require("answers")
        return Draft(row.require("asked"), answers, ["answers"] * 2, Ranking(((row.get("best"), 1 - row.get("best")),)))

    rows = [{"asked": "p", "answers": ["a", "b"], "best": 1}, {"prompt": "p", "chosen": "c", "rejected": "d"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        groups, report = load_groups(DataConfig(data=str(path)), tiny_tokenizer())
    finally:
        del FORMATS["best_of_two"]
    assert [group.pairs for group in groups] == [((1, 0),), ((0, 1),)]
    assert not report.unused
