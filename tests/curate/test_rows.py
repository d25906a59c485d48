"""Rows in and out."""

import pytest
from datasets import Dataset
from rich.console import Console

from dpo_fast.curate.messages import text_of
from dpo_fast.curate.rows import as_dataset, as_rows, check_out, read_objects, responses_of, write_rows
from dpo_fast.errors import UserError

QUIET = Console(quiet=True)


def test_rows_that_are_no_objects_are_counted_and_named(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n[1]\n{"prompt": \n{"prompt": "b"}\n')
    assert [row["prompt"] for row in read_objects(str(path), None, Console())] == ["a", "b"]
    assert "2 rows dropped (line 2: expected an object with fields)" in capsys.readouterr().out
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="no usable rows"):
        read_objects(str(path), None, QUIET)


def test_every_kind_of_rows_is_read(tmp_path):
    rows = [{"prompt": "a", "x": 1}, {"prompt": "b"}]
    write_rows(tmp_path / "deep" / "rows.jsonl", rows)
    assert as_rows(tmp_path / "deep" / "rows.jsonl", QUIET) == rows
    assert as_rows(rows, QUIET) == rows
    dataset = as_dataset(rows)
    assert isinstance(dataset, Dataset)
    assert as_rows(dataset, QUIET) == [{"prompt": "a", "x": 1}, {"prompt": "b", "x": None}]


def test_a_column_of_two_types_is_explained():
    with pytest.raises(UserError, match="whose columns have one type each"):
        as_dataset([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}])


def test_an_output_is_never_replaced_unasked(tmp_path):
    path = tmp_path / "out.jsonl"
    assert check_out(str(path), overwrite=False) == path
    path.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        check_out(str(path), overwrite=False)
    assert check_out(str(path), overwrite=True) == path
    with pytest.raises(UserError, match=r"ends in \.jsonl"):
        check_out(str(tmp_path / "out.csv"), overwrite=False)


def test_text_of_messages_and_responses():
    assert text_of("a") == "a"
    assert text_of({"role": "assistant", "content": "b"}) == "b"
    assert text_of([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]) == "a\n\n"
    assert responses_of({"responses": ["a", [{"content": "b"}]]}, "responses", 0) == ["a", [{"content": "b"}]]
    for wrong in ({}, {"responses": "a"}, {"responses": [1]}):
        with pytest.raises(UserError, match="row 7: field 'responses'"):
            responses_of(wrong, "responses", 7)
