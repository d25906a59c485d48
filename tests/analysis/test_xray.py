"""Rows as they are trained on: every token with its part, what was cut, what inference has instead."""

import io
import json
import re
from pathlib import Path

import pytest
from chat_templates import family_tokenizer
from oracle import tiny_llama, tiny_tokenizer
from preference_rows import LONDON, PARIS, USER
from rich.console import Console

from dpo_fast.analysis.xray import parse_rows, xray_rows
from dpo_fast.cli import main
from dpo_fast.config import InspectConfig
from dpo_fast.data.load import load_groups
from dpo_fast.errors import UserError

HOSTILE = "<script>alert(1)</script> {{ 7 * 7 }} \x1b[31m[/a]"
MORE = {"role": "user", "content": "Another?"}
ROWS = [
    {"prompt": [USER], "chosen": [PARIS], "rejected": [LONDON], "w": 1},
    {"prompt": [USER], "chosen": [PARIS, MORE, PARIS], "rejected": [LONDON], "w": 2.5},
    {"prompt": [USER], "chosen": "", "rejected": "b", "w": 1},
    {"prompt": [USER], "chosen": [{**PARIS, "content": HOSTILE}], "rejected": [LONDON], "w": 1},
    {"prompt": [USER] * 3, "chosen": [{**PARIS, "content": "0 1 2 3 4 5 6 7 8 9 " * 9}], "rejected": [LONDON], "w": 1},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = family_tokenizer("qwen3")
    tiny_llama(len(tokenizer)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def show(**settings):
    console = Console(file=io.StringIO(), width=120, no_color=True)
    settings = {"model": "model", "data": "rows.jsonl", "weight_column": "w"} | settings
    config = InspectConfig(**settings)
    return xray_rows(config, console=console), console.file.getvalue(), config


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_tokens_and_their_parts_are_those_of_training(folder, mode):
    views, _, config = show(max_length=150, truncation_mode=mode)
    tokenizer = family_tokenizer("qwen3")
    groups, _ = load_groups(config, tokenizer)
    whole, _ = load_groups(InspectConfig(data="rows.jsonl", max_length=None), tokenizer)
    used = [view for view in views if not view.refusal]
    assert [view.row for view in used] == [group.row for group in groups]
    for view, group, uncut in zip(used, groups, whole, strict=True):
        assert [token.id for token in view.prompt if token.kind != "cut"] == group.prompt_ids.tolist()
        assert [token.id for token in view.prompt] == uncut.prompt_ids.tolist()
        for number, answer in enumerate(view.answers):
            ids = group.answers[number]
            assert [token.id for token in answer.tokens if token.kind != "cut"] == ids.tolist()
            assert [token.id for token in answer.tokens] == uncut.answers[number].tolist()
            assert [token.id for token in answer.tokens if token.kind == "scored"] == ids[
                group.targets(number)
            ].tolist()
            text = "".join(token.text for token in [*view.prompt, *answer.tokens])
            assert text == tokenizer.decode([*uncut.prompt_ids, *uncut.answers[number]])
    assert any(token.kind == "cut" for view in used for answer in view.answers for token in answer.tokens)
    assert any(token.kind == "cut" for view in used for token in view.prompt) == (mode == "keep_end")


def test_rows_say_what_happens_to_them(folder):
    views, printed, _ = show(rows="0-2")
    assert [view.weight for view in views] == [1, 2.5, 1]
    assert views[2].refusal.startswith("an answer is empty")
    assert "row 2 (line 3)\nleft out: an answer is empty: field 'chosen'" in printed
    assert "weight 2.5" in printed
    plain = printed.replace("│", "")
    assert "⟦Paris.<|im_end|>↵\n⟧<|im_start|>user↵\nAnother?<|im_end|>↵\n<|im_start|>assistant↵\n⟦" in plain
    # Without a thought Qwen3's template writes an empty one, and inference starts with none.
    assert "at inference  <|im_start|>user↵\nName a capital.<|im_end|>↵\n<|im_start|>assistant↵\n[-<think>↵" in plain
    difference = views[0].answers[0].difference
    assert (difference.trained, difference.inference) == ("<think>\n\n</think>\n\n", "")
    views, printed, _ = show(rows="0", chat_template_kwargs={"enable_thinking": False})
    assert views[0].answers[0].difference is None
    assert printed.count("inference has the same text") == 2


def test_the_report_heads_every_run(folder):
    _, printed, _ = show(rows=[0])
    assert "5 rows read, 4 used" in printed
    assert "first row, ⟦scored⟧: <|im_start|>user\\nName a capital." in printed
    assert "4 pairs; the chosen answer is longer in" in printed


def test_the_page_shows_hostile_text_as_text(folder):
    _, printed, _ = show(rows=[1, 3], out="page.html", max_length=150)
    assert "\x1b" not in printed
    page = Path("page.html").read_text()
    assert "<script" not in page
    assert "\x1b" not in page
    text = re.sub(r"<[^>]*>", "", page)
    assert "alert(1)&lt;/script&gt; {{ 7 * 7 }} \\x1b[31m[/a]" in text
    assert "5 rows read" in text
    assert 'class="scored" title="token ' in page
    assert "weight 2.5" in page
    assert "dropped 1: an answer is empty" in text
    assert "http" not in page.replace("http-equiv", "")


def test_no_model_is_loaded(folder, capsys):
    Path("model/model.safetensors").unlink()
    assert main(["inspect", "--model", "model", "--data", "rows.jsonl", "--rows", "0-1", "--weight_column", "w"]) == 0
    assert "row 1 (line 2)" in capsys.readouterr().out
    assert main(["inspect", "--model", "model", "--data", "rows.jsonl", "--rows", "7"]) == 2
    assert "has no row 7; expected 0 to 4" in capsys.readouterr().err
    assert main(["inspect", "--model", "model", "--data", "rows.jsonl", "--rows", "[0, 3]"]) == 0
    assert "row 3 (line 4)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "rows"), [("0-3", [0, 1, 2, 3]), ("4", [4]), ("3, 5-6,3", [3, 5, 6]), ([2, 0], [2, 0]), (None, None)]
)
def test_row_numbers(text, rows):
    assert parse_rows(text) == rows


@pytest.mark.parametrize("text", ["", "x", "5-2", "-3", "1;2"])
def test_row_numbers_that_are_none(text):
    with pytest.raises(UserError, match="expected row numbers, such as 0-20"):
        parse_rows(text)


def test_ranked_answers_are_named_by_number(folder):
    row = {"prompt": "The", "responses": [" fox", " dog", " dog"], "scores": [3, 2, 1]}
    Path("rows.jsonl").write_text(json.dumps(row))
    views, _, _ = show(pairs="all", weight_column=None, apply_chat_template=False)
    assert [answer.name for answer in views[0].answers] == ["answer 0", "answer 1", "answer 2"]
    texts = ["".join(token.text for token in answer.tokens) for answer in views[0].answers]
    assert texts == [" fox<|im_end|>", " dog<|im_end|>", " dog<|im_end|>"]
    assert tiny_tokenizer().decode([token.id for token in views[0].prompt]) == "The"
