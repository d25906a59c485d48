"""What the terminal shows."""

import pytest
from by_hand_pages import in_terminal

from dpo_fast.curate.rows import write_rows


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_shows_hostile_answers_as_text(tmp_path, monkeypatch, width):
    hostile = "\x1b]0;title\x07\x1b[31mred\x1b[2J\r\x9b1m\x08 [bold]markup[/bold] [/] :smile: \u202etxt"
    long = "x" * 100_000
    rows = [{"prompt": f"[red]{hostile}", "responses": [hostile, long]}, {"prompt": "p", "responses": ["", "b"]}]
    write_rows(tmp_path / "rows.jsonl", rows)
    text = in_terminal(monkeypatch, tmp_path, ["l", "r", ""], width=width)
    assert not set(text) & {chr(code) for code in [*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x202E]}
    assert text.replace("\n", "").count("[bold]markup[/bold]") >= 1
    assert ":smile:" in text
    assert r"[red]\x1b]0;title\x07\x1b[31mred\x1b[2J\x0d\x9b1m\x08" in text
    assert text.count("x") > 100_000
    assert "(empty)" in text
