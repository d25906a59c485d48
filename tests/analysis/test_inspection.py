"""Token by token: numbers against a plain forward, text that joins, pages that hostile text cannot break."""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import save_tiny_checkpoint, tiny_tokenizer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast.analysis.inspection import inspect_rows, make_view
from dpo_fast.analysis.inspection_view import coloured, render_page, token_text
from dpo_fast.analysis.token_views import AnswerView, PairView, RowView, TokenView, probability, token_pieces
from dpo_fast.cli import main
from dpo_fast.config import InspectConfig
from dpo_fast.packs.layout import Group

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} \u202eabc \x1b[31m"
ROWS = [
    {"prompt": "The capital of France", "chosen": " is Paris.", "rejected": " is London, of England."},
    {"prompt": "Numbers", "chosen": " same", "rejected": " same"},
    {"prompt": "Say " + HOSTILE, "chosen": HOSTILE, "rejected": "naïve 日本 \U0001f600"},
    {"prompt": "Ranked", "responses": [" fox", " dog", " lazy dog"], "scores": [2, 1, 0]},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_tiny_checkpoint(tmp_path / "reference")
    save_tiny_checkpoint(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained("model")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    model.save_pretrained("model")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def show(**settings):
    console = Console(file=io.StringIO(), width=120, no_color=True)
    config = InspectConfig(**{"model": "model", "reference": "reference", "data": "rows.jsonl"} | settings)
    return inspect_rows(config, console=console), console.file.getvalue()


def test_numbers_are_those_of_a_plain_forward(folder):
    (view,), printed = show(rows=[0], beta=0.3)
    tokenizer = AutoTokenizer.from_pretrained("model")
    models = [AutoModelForCausalLM.from_pretrained(name).double() for name in ("model", "reference")]
    prompt = tokenizer(ROWS[0]["prompt"])["input_ids"]
    sums = {}
    for answer, side in zip(view.answers, ("chosen", "rejected"), strict=True):
        ids = tokenizer(ROWS[0]["prompt"] + ROWS[0][side])["input_ids"] + [tokenizer.eos_token_id]
        assert answer.name == side
        assert [token.id for token in answer.tokens] == ids[len(prompt) :]
        for model, name in zip(models, ("logp", "ref_logp"), strict=True):
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            want = logps.gather(1, torch.tensor(ids[1:])[:, None])[len(prompt) - 1 :, 0]
            got = [getattr(token, name) for token in answer.tokens]
            np.testing.assert_allclose(got, want, atol=1e-4)
            sums[side, name] = want.sum().item()
    (pair,) = view.pairs
    delta = (
        sums["chosen", "logp"] - sums["chosen", "ref_logp"] - sums["rejected", "logp"] + sums["rejected", "ref_logp"]
    )
    assert pair.delta == pytest.approx(delta, abs=1e-4)
    assert pair.loss == pytest.approx(math.log1p(math.exp(-0.3 * delta)), abs=1e-4)
    assert pair.probability == pytest.approx(1 / (1 + math.exp(-0.3 * delta)), abs=1e-4)
    assert f"{pair.loss:.4f}" in printed
    assert pair.sentence in printed.replace("\n", " ")


def test_ranked_answers_are_all_shown_with_their_pairs(folder):
    (view,), printed = show(rows=[3], pairs="all")
    assert [answer.name for answer in view.answers] == ["answer 0", "answer 1", "answer 2"]
    assert {(p.chosen.name, p.rejected.name) for p in view.pairs} == {
        ("answer 0", "answer 1"),
        ("answer 0", "answer 2"),
        ("answer 1", "answer 2"),
    }
    assert "answer 1 > answer 2" in printed


def test_pieces_join_to_the_text_whatever_the_characters():
    tokenizer = tiny_tokenizer()
    for text in (HOSTILE, "naïve 日本語 \U0001f600\U0001f468\u200d\U0001f469", "  two  spaces\n\ttab", "a", "\ufffd x"):
        ids = tokenizer(text)["input_ids"]
        pieces = token_pieces(ids, tokenizer("before")["input_ids"], tokenizer)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == text
    # A cut character: its bytes are not lost from the count.
    ids = tokenizer("a日")["input_ids"][:-1]
    assert len(token_pieces(ids, [], tokenizer)) == len(ids)


def answer_of(name, *ratios):
    return AnswerView(name, "", [TokenView(i, f"t{i}", -1.0 + r, -1.0) for i, r in enumerate(ratios)])


@pytest.mark.parametrize(
    ("raised", "sunk", "words"),
    [
        (2.0, 2.0, "Won from both sides"),
        (2.0, -1.0, "although the rejected one rose, too"),
        (-1.0, 3.0, "Won by sinking the rejected answer alone"),
        (-3.0, 1.0, "The pair is lost"),
        (0.0, 0.0, "Nothing has moved"),
    ],
)
def test_the_sentence_says_where_the_margin_comes_from(raised, sunk, words):
    pair = PairView(answer_of("chosen", raised), answer_of("rejected", -sunk), 0.1, raised + sunk, 0.5)
    assert words in pair.sentence


def test_most_moved_tokens_in_order():
    answer = answer_of("chosen", 0.1, -2.0, 3.0, 0.0, -0.5)
    assert answer.most_moved(5) == ([2, 0], [1, 4])
    assert answer.most_moved(1) == ([2], [1])
    assert answer.around(2, width=1) == ("t1", "t2", "t3")


def test_colour_or_signs_say_the_same():
    answer = answer_of("chosen", 0.0, 0.1, 0.5, 1.0, -0.5, -9.0)
    assert coloured(answer, 1.0, signs=True).plain == "t0t1t2⁺t3⁺⁺t4⁻t5⁻⁻"
    plain = coloured(answer, 1.0, signs=False)
    assert plain.plain == "t0t1t2t3t4t5"
    assert {span.style for span in plain.spans} == {
        "blue",
        "bold underline blue",
        "dark_orange",
        "bold underline dark_orange",
    }


def test_control_characters_show_and_do_not_act(folder):
    assert token_text("a\x1b[31m\x00\u202eb\n\tc\r\n") == "a\\x1b[31m\\x00\\u202eb\n⇥\tc\\x0d\n"
    _, printed = show(rows=[2])
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    assert "{{ 7 * 7 }}" in printed.replace("⁺", "").replace("⁻", "")


def test_the_page_shows_hostile_text_as_text(folder):
    views, _ = show(rows=[0, 2], out="page.html")
    page = Path("page.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "onerror=alert(2)&gt;" in re.sub(r"</?span[^>]*>", "", page)
    assert "49" not in re.sub(r"<[^>]*>", "", page).split("7 * 7")[1][:10]
    text = re.sub(r"<[^>]*>", "", page)
    assert all(f"Row {view.row}" in text for view in views)
    assert "http" not in page.replace("http-equiv", "")
    huge = RowView(0, "p", [answer_of("chosen", *[0.1] * 20_000)], [])
    assert render_page([huge], model="<m>", reference="r", data="d", beta=0.1).count("<span") > 20_000


@pytest.mark.parametrize(
    ("logp", "text"), [(0.0, "100%"), (math.log(0.43), "43%"), (math.log(0.0012), "0.12%"), (-191.0, "10^-83")]
)
def test_probabilities_for_people(logp, text):
    assert probability(logp) == text


def test_context_between_scored_tokens_is_shown_without_a_figure():
    """An answer of several turns: the user's text stands where it is, and counts nowhere."""
    tokenizer = tiny_tokenizer()
    ids = np.array(tokenizer("one two three four five")["input_ids"], np.int32)
    mask = np.zeros(len(ids), dtype=bool)
    mask[[1, 2, -2]] = True
    group = Group(0, ids[:2], (ids, ids[::-1].copy()), scored=(mask, None))
    logps = [(np.full(int(mask.sum()), -1.0), np.full(len(ids), -1.0))] * 2
    view = make_view(group, *logps, tokenizer, 0.1)
    chosen = view.answers[0]
    assert [token.id for token in chosen.tokens] == ids[mask].tolist()
    assert chosen.unscored + "".join(token.text + token.context for token in chosen.tokens) == tokenizer.decode(ids)
    assert coloured(chosen, 1.0, signs=False).plain == tokenizer.decode(ids)
    page = render_page([view], model="m", reference="r", data="d", beta=0.1)
    assert chosen.tokens[1].context in page


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--model model --reference reference", "no data given"),
        ("--model model --reference reference --data rows.jsonl --rows [1]", "row 1 of rows.jsonl is not there or was"),
        ("--model model --reference reference --data rows.jsonl --rows [99]", "begin with 0, 2, 3"),
        ("--model model --reference reference --data rows.jsonl --out page.pdf", "ends in .html"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, command, message):
    assert main(["inspect", *command.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
