"""Scored answers -> preference rows, and the report on them."""

import json
import math
import random

import pytest
from datasets import DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast import pair
from dpo_fast.cli import main
from dpo_fast.config import DataConfig, PairConfig
from dpo_fast.curate.pair import pair_rows
from dpo_fast.curate.pair_report import LengthBias
from dpo_fast.data.formats import to_preference
from dpo_fast.errors import UserError

ROW = {"prompt": "p", "responses": ["a", "bb", "ccc", "dddd"], "scores": [0.0, 2.0, 1.0, 2.0]}


def pairs_of(row, **settings):
    rows, _, _ = pair_rows([row], PairConfig(**settings))
    return [(row["chosen"], row["rejected"], row["score_gap"]) for row in rows]


def test_which_pairs_are_made():
    assert pairs_of(ROW) == [("bb", "a", 2.0)]
    assert pairs_of(ROW, pairs="adjacent") == [("dddd", "ccc", 1.0), ("ccc", "a", 1.0)]
    every = {("bb", "ccc"), ("dddd", "ccc"), ("bb", "a"), ("dddd", "a"), ("ccc", "a")}
    assert {(a, b) for a, b, _ in pairs_of(ROW, pairs="all")} == every
    assert {(a, b) for a, b, _ in pairs_of(ROW, pairs="all", min_score_gap=1.5)} == {("bb", "a"), ("dddd", "a")}
    assert [gap for _, _, gap in pairs_of(ROW, pairs="all", pairs_per_prompt=3)] == [2.0, 2.0, 1.0]


def test_what_the_template_is_given_is_kept():
    row = ROW | {"system": "Be brief.", "chat_template_kwargs": {"mode": "fast"}, "tools": [{"name": "a"}], "other": 1}
    (pair,), _, _ = pair_rows([row], PairConfig())
    kept = ("system", "chat_template_kwargs", "tools")
    assert {name: pair.get(name) for name in (*kept, "other")} == {name: row[name] for name in kept} | {"other": None}
    names = {"system_column": "s", "chat_template_kwargs_column": None, "tools_column": "t"}
    (pair,), _, _ = pair_rows([row | {"s": "x", "t": [{"name": "b"}]}], PairConfig(**names))
    assert (pair["s"], pair["t"]) == ("x", [{"name": "b"}])
    assert pair.keys().isdisjoint(kept)
    (pair,), _, _ = pair_rows([ROW | {"system_prompt": "x"}], PairConfig())
    found = to_preference(pair, DataConfig(), has_chat_template=True)
    assert found.prompt == [{"role": "system", "content": "x"}, {"role": "user", "content": "p"}]


def test_unscored_answers_and_tied_prompts_are_dropped_and_counted():
    rows = [
        ROW | {"scores": [None, 1.0, None, 0.0]},
        ROW | {"scores": [None, 1.0, None, None]},
        ROW | {"scores": [1.0] * 4},
        ROW | {"responses": ["same"] * 4},
        ROW | {"scores": [1.0]},
        ROW | {"scores": [1.0, 2.0, math.nan, 0.0]},
        {"responses": [], "scores": []},
        {"prompt": "p", "responses": [], "scores": []},
    ]
    made, _, report = pair_rows(rows, PairConfig())
    assert [(row["chosen"], row["rejected"], row["row"]) for row in made] == [("bb", "dddd", 0)]
    assert (report.prompts, report.paired, report.tied, report.unjudged, report.cut) == (5, 1, 2, 2, 0)
    assert len(report.unusable) == 3
    assert "row 4: field 'scores': expected a list of 4 numbers" in report.unusable[0]
    assert "dropped 2: all answers have the same score" in report.render()


def test_answers_that_were_cut():
    row = ROW | {"samples": [{"finished": i != 1} for i in range(4)]}
    assert pairs_of(row) == [("dddd", "a", 2.0)]
    assert pairs_of(row, truncated="keep") == [("bb", "a", 2.0)]
    worst_cut = ROW | {"samples": [{"finished": i != 0} for i in range(4)]}
    assert pairs_of(worst_cut) == [("bb", "a", 2.0)]
    assert pairs_of(worst_cut, truncated="drop") == [("bb", "ccc", 1.0)]
    _, _, report = pair_rows([ROW | {"samples": [{"finished": False}] * 4}], PairConfig())
    assert report.cut == 1


def test_conversations_get_messages_that_training_reads():
    prompt, tools = [{"role": "user", "content": "hi"}], [{"name": "search"}]
    (row,), _, _ = pair_rows([ROW | {"prompt": prompt, "tools": tools}], PairConfig())
    preference = to_preference(row, DataConfig(), has_chat_template=True)
    assert preference.prompt == prompt
    assert preference.answers == ([{"role": "assistant", "content": "bb"}], [{"role": "assistant", "content": "a"}])
    assert preference.tools == tools


@given(st.integers(0, 5), st.floats(0.05, 0.6))
def test_a_prompt_is_on_one_side_of_the_split(seed, share):
    rows = [ROW | {"prompt": f"p{i % 20}"} for i in range(60)]
    train, test, _ = pair_rows(rows, PairConfig(eval_split=share, seed=seed, pairs="all"))
    sides = [{row["prompt"] for row in side} for side in (train, test)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == round(20 * share)
    # A prompt stays on its side when others come.
    more, _, _ = pair_rows([*rows, ROW | {"prompt": "new"}], PairConfig(eval_split=share, seed=seed, pairs="all"))
    assert len(sides[0] ^ ({row["prompt"] for row in more} - {"new"})) <= 1


def test_length_bias_is_measured_and_taken_away():
    rng = random.Random(0)
    rows = []
    for i in range(300):
        lengths = [rng.randint(1, 200) for _ in range(4)]
        # The longer the answer, the better it scores, most of the time.
        scores = [float(rng.random() < 0.2 + 0.6 * (n > 100)) for n in lengths]
        rows.append(
            {"prompt": str(i), "responses": ["x" * n + str(k) for k, n in enumerate(lengths)], "scores": scores}
        )
    _, _, plain = pair_rows(rows, PairConfig())
    assert plain.before.longer > 1.8 * plain.before.shorter
    assert plain.before.ratio > 1.5
    assert "--balance_length" in plain.render()
    kept, _, balanced = pair_rows(rows, PairConfig(balance_length=True))
    assert balanced.after.longer == balanced.after.shorter
    assert balanced.after.pairs == len(kept)
    assert abs(math.log(balanced.after.ratio)) < 0.5 * math.log(plain.before.ratio)
    # Nearest lengths first: the gap within a pair shrinks, too.
    gap = sum(abs(len(r["chosen"]) - len(r["rejected"])) for r in kept) / len(kept)
    made, _, _ = pair_rows(rows, PairConfig())
    assert gap < 0.6 * sum(abs(len(r["chosen"]) - len(r["rejected"])) for r in made) / len(made)


def test_length_bias_by_hand():
    bias = LengthBias.of([(20, 10), (5, 10), (3, 3), (0, 0)])
    assert (bias.pairs, bias.longer, bias.shorter, bias.chosen, bias.rejected) == (4, 1, 1, 7.0, 5.75)
    assert bias.ratio == pytest.approx(1.0)
    assert LengthBias.of([]) is None


def test_datasets_in_and_out():
    from datasets import Dataset

    rows = Dataset.from_list([ROW | {"prompt": f"p{i}"} for i in range(10)])
    made = pair(rows)
    assert made.column_names == ["prompt", "chosen", "rejected", "chosen_score", "rejected_score", "score_gap", "row"]
    assert made["chosen"][0] == "bb"
    split = pair(rows, eval_split=0.2)
    assert isinstance(split, DatasetDict)
    assert (len(split["train"]), len(split["test"])) == (8, 2)
    with pytest.raises(UserError, match="no prompt yields a pair"):
        pair([ROW | {"scores": [0.0] * 4}])


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [ROW | {"prompt": f"p{i}"} for i in range(10)]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["pair", "--data", "scored.jsonl", "--out", "pairs.jsonl"]
    assert main([*command, "--eval-split", "0.3", "--eval-out", "held.jsonl"]) == 0
    counts = [len((tmp_path / name).read_text().splitlines()) for name in ("pairs.jsonl", "held.jsonl")]
    assert counts == [7, 3]
    assert "10 prompts, 10 with pairs" in capsys.readouterr().out
    for extra, message in (
        ([], "pairs.jsonl exists already"),
        (["--overwrite", "--eval_split", "0.3"], "--eval_split and --eval_out go together"),
        (["--overwrite", "--pairs_per_prompt", "0"], "--pairs_per_prompt 0: expected"),
        (["--overwrite", "--min_score_gap", "9"], "yields no pair to train on"),
        (["--overwrite", "--scores_column", "marks"], "yields no pair to train on"),
    ):
        assert main([*command, *extra]) == 2
        assert message in capsys.readouterr().err
