"""Files and data sets -> rows."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from chat_templates import family_tokenizer
from oracle import tiny_tokenizer
from preference_rows import GOOD, USER, load, texts, write

from dpo_fast.config import DataConfig
from dpo_fast.data.load import load_groups
from dpo_fast.data.rows import read_rows
from dpo_fast.errors import UserError


def lengths(group):
    return [len(group.prompt_ids), *map(len, group.answers)]


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
        ("cut.jsonl.gz", gzip.compress(b"{}" * 9999, mtime=0)[:-20], "cannot be read"),
        ("flipped.jsonl.gz", gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 20, "cannot be read"),
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


def test_parquet_gives_back_tools_and_calls_as_they_were_written(tmp_path):
    """A column has one type there: keys that other rows have come back as null, at any depth."""

    def row(name, arguments):
        function = {
            "name": name,
            "parameters": {"type": "object", "properties": {key: {"type": "string"} for key in arguments}},
        }
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {
            "prompt": [USER],
            "chosen": [{"role": "assistant", "tool_calls": [call]}],
            "rejected": [{"role": "assistant", "content": "No."}],
            "tools": [{"type": "function", "function": function}],
        }

    rows = [row("turn", {"theta": 1.5}), row("weather", {"city": "Rome", "day": "today"})]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tokenizer = family_tokenizer("chatml")
    want, _ = load(tmp_path, rows, tokenizer, max_length=None)
    got, _ = load_groups(DataConfig(data=str(tmp_path / "rows.parquet"), max_length=None), tokenizer)
    assert [texts(group, tokenizer) for group in got] == [texts(group, tokenizer) for group in want]
    assert '"arguments": {"city": "Rome", "day": "today"}' in texts(want[1], tokenizer)[1]
    assert "null" not in "".join(texts(got[0], tokenizer))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_keys_that_are_named_twice_are_counted(tmp_path, name):
    good = json.dumps(GOOD)
    top = '{"prompt": "The", "chosen": " fox", "chosen": " quick fox", "rejected": " dog"}'
    deep = '{"prompt": "The", "chosen": " fox", "rejected": " dog", "meta": [{"a": 1, "a": 2}]}'
    lines = [good, top, deep]
    (tmp_path / name).write_text(f"[{','.join(lines)}]" if name == "rows.json" else "\n".join(lines))
    groups, report = load_groups(DataConfig(data=str(tmp_path / name)), tiny_tokenizer())
    assert len(groups) == 3
    places = ["row 1", "row 2"] if name == "rows.json" else ["line 2", "line 3"]
    assert report.causes["duplicate_keys"] == places
    assert tiny_tokenizer().decode(groups[1].answers[0]) == " quick fox<eos>"


def test_a_line_without_an_end_is_named(tmp_path, monkeypatch):
    """A compressed file may hold any length of it."""
    monkeypatch.setattr("dpo_fast.data.rows.LINE_BYTES", 1000)
    for name, opened in (("a.jsonl", open), ("a.jsonl.gz", gzip.open)):
        with opened(tmp_path / name, "wb") as file:
            file.write(b'{"a": 1}\n' + b"x" * 1001)
        rows = read_rows(str(tmp_path / name))
        assert next(rows).value == {"a": 1}
        with pytest.raises(UserError, match=rf"{name}, line 2: longer than 0 MiB; expected one row a line"):
            next(rows)


def test_a_value_that_python_cannot_hold_is_named(tmp_path):
    """Microseconds that lead to a year far beyond 9999."""
    values = pyarrow.array([0, 2**61], type=pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"when": values, "prompt": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 1: column 'when' holds a value that cannot be read"):
        list(read_rows(str(tmp_path / "a.parquet")))
