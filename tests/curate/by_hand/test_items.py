"""Rows in every form: judged, or left out with a reason."""

import datetime

import pytest
from rich.console import Console

from dpo_fast.config import LabelConfig
from dpo_fast.curate.by_hand.items import to_items
from dpo_fast.errors import UserError


def test_rows_of_all_forms_are_judged_or_left_out_with_their_reason(tmp_path, capsys):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "?"}]
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "id": 7},
        {"prompt": chat, "responses": ["a", [{"role": "assistant", "content": "b"}]]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"responses": ["a", "b"]},
        {"prompt": "p", "responses": [["no message"], "b"]},
        {"prompt": "p", "responses": ["\ud800", "b"]},
        {"prompt": "p", "responses": ["a", "b"], "date": datetime.date(2026, 1, 1)},
        {"prompt": "p"},
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"chosen": "one", "rejected": "two"},
    ]
    items = to_items(rows, LabelConfig(), Console(width=500))
    assert [item.row for item in items] == [
        {"prompt": "p", "id": 7, "responses": ["a", "b"]},
        rows[1],
        {"prompt": "\n\nHuman: q\n\nAssistant:", "responses": [" a", " b"]},
    ]
    assert items[1].prompt == (("user", "hi"), ("assistant", "ho"), ("user", "?"))
    assert items[1].answers == ("a", "b")
    assert "7 rows dropped (row 3: field 'prompt' is missing" in capsys.readouterr().out
    for row, reason in zip(
        rows[4:],
        ("strings or messages", "as JSON", "as JSON", "a list of answers", "are the same", "'prompt' is missing"),
        strict=True,
    ):
        with pytest.raises(UserError, match=reason):
            to_items([row], LabelConfig(data="rows"), Console(quiet=True))
