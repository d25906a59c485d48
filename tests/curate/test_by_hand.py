"""A person's judgements: the queue, what is on disk, the rows they become, the server and the terminal."""

import contextlib
import datetime
import errno
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from itertools import combinations
from urllib.parse import urlsplit

import pytest
from by_hand_pages import judging_of, page_of
from rich.console import Console

from dpo_fast.config import LabelConfig, PairConfig
from dpo_fast.curate.by_hand.items import Item, to_items, visible
from dpo_fast.curate.by_hand.judgements import CHOICES, StaleError, make_queue
from dpo_fast.curate.by_hand.run import run_by_hand
from dpo_fast.curate.by_hand.server import PageServer
from dpo_fast.curate.pair import pair_rows
from dpo_fast.curate.rows import write_rows
from dpo_fast.errors import UserError

ROWS = [{"prompt": f"prompt {n}", "responses": [f"{n}a", f"{n}b", f"{n}c"], "samples": [{}] * 3} for n in range(4)]


def items_of(*answers):
    return [Item({}, (("", "p"),), tuple(own)) for own in answers]


def queue_of(items, **settings):
    return make_queue(items, LabelConfig(**settings))


def test_each_two_answers_that_differ_come_once():
    items = items_of("abcd", "xx", "y", "xxz")

    def pairs(which):
        queue = queue_of(items, pairs=which, repeat_share=0)
        found = [(c.item, *sorted((c.left, c.right))) for c in queue]
        assert len(found) == len(set(found))
        assert all(c.first is None for c in queue)
        return set(found)

    assert pairs("first_two") == {(0, 0, 1)}
    assert pairs("adjacent") == {(0, 0, 1), (0, 1, 2), (0, 2, 3), (3, 1, 2)}
    assert pairs("all") == {(0, *pair) for pair in combinations(range(4), 2)} | {(3, 0, 2), (3, 1, 2)}


def test_order_and_sides_are_random_and_follow_the_seed():
    items = items_of(*["ab"] * 400)
    queue = queue_of(items, repeat_share=0)
    assert queue == queue_of(items, repeat_share=0)
    assert queue != queue_of(items, repeat_share=0, seed=7)
    assert [c.item for c in queue] != sorted(c.item for c in queue)
    assert 140 < sum(c.left == 0 for c in queue) < 260  # six standard deviations of a fair coin


def test_some_come_a_second_time_later_on_sides_of_their_own():
    queue = queue_of(items_of(*["ab"] * 400), repeat_share=0.5)
    repeats = [(place, c) for place, c in enumerate(queue) if c.first is not None]
    assert len(queue) == 600
    assert len({c.first for _, c in repeats}) == len(repeats) == 200
    for place, again in repeats:
        first = queue[again.first]
        assert first.first is None
        assert first.item == again.item
        assert {first.left, first.right} == {again.left, again.right}
        assert place - again.first > 10
    assert 60 < sum(queue[c.first].left == c.left for _, c in repeats) < 140


@pytest.mark.parametrize("seed", range(30))
def test_where_few_come_twice_none_of_them_comes_soon(seed):
    queue = queue_of(items_of(*["ab"] * 30), repeat_share=0.1, seed=seed)
    gaps = [place - c.first for place, c in enumerate(queue) if c.first is not None]
    assert len(gaps) == 3
    assert min(gaps) > 9


@pytest.mark.parametrize(("number", "share", "repeats"), [(1, 1.0, 1), (2, 1.0, 2), (3, 0.1, 0), (12, 1.0, 12)])
def test_repeats_of_a_few_comparisons(number, share, repeats):
    queue = queue_of(items_of(*["ab"] * number), repeat_share=share)
    assert [c.first is not None for c in queue].count(True) == repeats
    assert all(c.first is None or c.first < place for place, c in enumerate(queue))


@pytest.mark.parametrize("seed", range(8))
def test_random_judgements_with_undo_and_restarts_come_to_what_a_person_would_count(tmp_path, seed):
    """Beside it runs a plain list of what was said."""
    rng = random.Random(seed)
    said = []  # (row, shown left, shown right, choice)
    settings = {"pairs": "all", "repeat_share": 0.5, "seed": 3}
    finished = False
    while not finished:
        with judging_of(ROWS, tmp_path, **settings) as judging:
            for _ in range(rng.randint(1, 7)):
                finished = judging.is_finished
                if finished:
                    break
                if said and rng.random() < 0.3:
                    judging.undo(judging.place)
                    said.pop()
                    continue
                item, left, right = judging.show()
                choice = rng.choice(CHOICES)
                judging.judge(judging.place, choice)
                said.append((ROWS.index(item.row), left, right, choice))
                assert judging.progress().done == len(said)
            rows = judging.rows()
    pairs = [(row, frozenset((left, right))) for row, left, right, _ in said]
    assert set(pairs) == {
        (n, frozenset(two)) for n, row in enumerate(ROWS) for two in combinations(row["responses"], 2)
    }
    for n, row in enumerate(ROWS):
        points = {answer: [] for answer in row["responses"]}
        for _, left, right, choice in [one for one in said if one[0] == n and one[3] != "skip"]:
            points[left].append({"left": 1, "right": 0, "tie": 0.5}[choice])
            points[right].append({"left": 0, "right": 1, "tie": 0.5}[choice])
        expected = [sum(p) / len(p) if p else None for p in points.values()]
        assert rows[n]["scores"] == pytest.approx(expected)
        assert rows[n]["signals"] == {"by_hand": rows[n]["scores"]}
        assert {name: rows[n][name] for name in row} == row
        assert [
            (n, row["responses"][c["left"]], row["responses"][c["right"]], c["choice"]) for c in rows[n]["comparisons"]
        ] == [one for one in said if one[0] == n and one[3] != "skip"]
    better = {}
    for pair, (_, left, right, choice) in zip(pairs, said, strict=True):
        better.setdefault(pair, []).append({"left": left, "right": right}.get(choice, choice))
    twice = [found for found in better.values() if len(found) == 2 and "skip" not in found]
    with judging_of(ROWS, tmp_path, **settings) as judging:
        progress = judging.progress()
    assert progress.repeated == len(twice)
    assert progress.agreed == sum(a == b for a, b in twice)
    assert progress.total == progress.done == len(said)
    assert progress.skipped == sum(choice == "skip" for *_, choice in said)


def test_agreement_is_about_answers_and_not_about_sides(tmp_path):
    rows = [{"prompt": str(n), "responses": ["a", "b"]} for n in range(12)]
    for name, judge, agreed in (
        ("answer", lambda left: "left" if left == "a" else "right", range(12, 13)),
        ("side", lambda left: "left", range(1, 12)),
    ):
        with judging_of(rows, tmp_path / name, repeat_share=1.0) as judging:
            shown = {}
            while not judging.is_finished:
                item, left, _ = judging.show()
                shown.setdefault(item.row["prompt"], []).append(left)
                judging.judge(judging.place, judge(left))
            assert judging.progress().repeated == 12
            assert judging.progress().agreed in agreed
            if name == "side":
                assert judging.progress().agreed == sum(a == b for a, b in shown.values())


def test_what_is_skipped_does_not_come_back(tmp_path):
    with judging_of(ROWS, tmp_path, repeat_share=1.0) as judging:
        assert judging.progress().total == 8
        seen = []
        while shown := judging.show():
            seen.append(shown[0].row["prompt"])
            judging.judge(judging.place, "skip")
        assert sorted(seen) == [row["prompt"] for row in ROWS]
        assert judging.progress().total == judging.progress().done == 4
        assert all(row["scores"] == [None] * 3 and row["comparisons"] == [] for row in judging.rows())


def test_late_judgements_and_undos_change_nothing(tmp_path):
    with judging_of(ROWS, tmp_path) as judging:
        with pytest.raises(StaleError):
            judging.undo(judging.place)
        judging.judge(0, "left")
        for wrong in (0, 2, -1):
            with pytest.raises(StaleError):
                judging.judge(wrong, "right")
            with pytest.raises(StaleError):
                judging.undo(wrong)
        assert judging.progress().done == 1
        judging.undo(1)
        assert judging.place == 0
        for place in range(4):
            judging.judge(place, "tie")
        with pytest.raises(StaleError):
            judging.judge(4, "left")


def test_time_runs_from_showing_to_judging(tmp_path):
    now = [100.0]
    with judging_of(ROWS, tmp_path) as judging:
        judging._clock = lambda: now[0]
        judging.show()
        now[0] = 103.0
        judging.show()  # looked at again: the clock runs on
        now[0] = 104.5
        judging.judge(0, "left")
        now[0] = 200.0
        judging.show()
        now[0] = 202.0
        judging.judge(1, "left")
        assert [c["seconds"] for row in judging.rows() for c in row["comparisons"]] in ([4.5, 2.0], [2.0, 4.5])
        assert judging.progress().seconds == 6.5


def test_earlier_signals_stay(tmp_path):
    rows = [row | {"signals": {"json": [1, 0, 0]}, "scores": [9, 9, 9]} for row in ROWS]
    with judging_of(rows, tmp_path) as judging:
        assert judging.rows()[0]["signals"] == {"json": [1, 0, 0], "by_hand": [None] * 3}


def test_a_judgement_that_cannot_be_saved_does_not_count(tmp_path, monkeypatch):
    with judging_of(ROWS, tmp_path) as judging:
        judging.judge(0, "left")

        def full(number):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("dpo_fast.curate.worklog.os.fsync", full)
            with pytest.raises(OSError, match="No space left"):
                judging.judge(1, "left")
            assert judging.place == 1
            with page_of(judging) as (server, _):
                status, answer = ask(server.address, "judge", {"place": 1, "choice": "left"})
                assert status == 507
                assert "No space left" in answer["error"]
        judging.judge(1, "right")
    with judging_of(ROWS, tmp_path) as judging:
        assert judging._judged[1]["choice"] == "right"


# Rows


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
    assert "7 rows left out (row 3: field 'prompt' is missing" in capsys.readouterr().out
    for row, reason in zip(
        rows[4:],
        ("strings or messages", "as JSON", "as JSON", "a list of answers", "are the same", "'prompt' is missing"),
        strict=True,
    ):
        with pytest.raises(UserError, match=reason):
            to_items([row], LabelConfig(data="rows"), Console(quiet=True))


def test_control_characters_become_signs_and_nothing_else_changes():
    assert visible("a\tb\r\nc\rd\x00\x1b[2J\x7f\x9b1m\u202e") == "a\tb\nc" + r"\x0dd\x00\x1b[2J\x7f\x9b1m\u202e"
    harmless = "<b>שלום</b> مرحبا 👩‍🚀 \u200f \u00a0 ␛"
    assert visible(harmless) == harmless


# The whole command, in the terminal


def in_terminal(monkeypatch, folder, words, width=80, **settings):
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl", ROWS)
    settings = {"data": str(folder / "rows.jsonl"), "out": str(folder / "out.jsonl"), "terminal": True} | settings
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{word}\n" for word in words)))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        run_by_hand(LabelConfig(**settings), console=Console(file=output, width=width))
    return output.getvalue()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stop_look_go_on_finish_and_pair(tmp_path, monkeypatch):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    text = in_terminal(monkeypatch, tmp_path, ["l", "u", "s", "q"], repeat_share=0)
    assert f"1 of 4 done, 1 skipped: {out}" in text
    assert "the same command goes on" in text
    assert [row["scores"] for row in read(out)] == [[None] * 3] * 4
    in_terminal(monkeypatch, tmp_path, ["x", "", "R", "1"], repeat_share=0)  # and the input ends
    assert sum(row["scores"] != [None] * 3 for row in read(out)) == 2
    # The mode is no setting that the log belongs to; the last judgement of the earlier run is taken back first.
    text = in_terminal(monkeypatch, tmp_path, ["u", "t", "2", "u", "2", ""], repeat_share=0)
    assert "all is judged" in text
    assert f"4 of 4 done, 1 skipped: {out}" in text
    assert not partial.exists()
    rows = read(out)
    assert sorted(c["choice"] for row in rows for c in row["comparisons"]) == ["right", "right", "tie"]
    train, _, report = pair_rows(rows, PairConfig())
    assert (len(train), report.alike, report.unjudged) == (2, 1, 1)
    for row in train:
        comparison = rows[row["row"]]["comparisons"][0]
        assert row["chosen"] == rows[row["row"]]["responses"][comparison["right"]]
        assert row["rejected"] == rows[row["row"]]["responses"][comparison["left"]]
    with pytest.raises(UserError, match="is there already"):
        in_terminal(monkeypatch, tmp_path, [], repeat_share=0)


def test_a_result_that_someone_changed_is_not_replaced(tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    in_terminal(monkeypatch, tmp_path, ["l"])
    out.write_text(mine := out.read_text() + "\n")
    with pytest.raises(UserError, match=r"is not what .* led to"):
        in_terminal(monkeypatch, tmp_path, ["l"])
    assert out.read_text() == mine
    in_terminal(monkeypatch, tmp_path, ["l"], overwrite=True)
    assert sum(bool(row["comparisons"]) for row in read(out)) == 2


def test_an_interrupt_at_the_terminal_writes_the_result(tmp_path, monkeypatch):
    words = iter("lr")
    monkeypatch.setattr(Console, "input", lambda *_: next(words, None) or signal.raise_signal(signal.SIGTERM))
    text = in_terminal(monkeypatch, tmp_path, [])
    assert "2 of 4 done" in text
    assert sum(bool(row["comparisons"]) for row in read(tmp_path / "out.jsonl")) == 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_nothing_judged_leaves_nothing(tmp_path, monkeypatch):
    assert "nothing was judged" in in_terminal(monkeypatch, tmp_path, ["q"])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_other_settings_do_not_go_on(tmp_path, monkeypatch):
    in_terminal(monkeypatch, tmp_path, ["l"])
    for other in ({"seed": 1}, {"pairs": "all"}, {"repeat_share": 1.0}, {"max_rows": 3}):
        with pytest.raises(UserError, match="other settings or other rows"):
            in_terminal(monkeypatch, tmp_path, ["l"], **other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeat_share": 1.5}, "--repeat_share 1.5: expected a share"),
        ({"out": ""}, "no output given"),
        ({"data": ""}, "no data given"),
        ({"port": 70000, "terminal": False}, "--port 70000: expected a number from 0 to 65535"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, settings, message):
    with pytest.raises(UserError, match=message):
        in_terminal(monkeypatch, tmp_path, [], **settings)


def test_nothing_to_compare_is_a_mistake(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "p", "responses": ["a", "a"]}, {"prompt": "p", "responses": ["a"]}])
    with pytest.raises(UserError, match="no row has two answers that differ"):
        in_terminal(monkeypatch, tmp_path, [])


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


# The server


def ask(address, path, order=None, **headers):
    """Status and JSON or text of one request; `order` makes it a POST, as the page sends it."""
    url = urlsplit(address)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    method, body = "GET", None
    if order is not None:
        method, body = "POST", json.dumps(order)
        headers = {"Origin": f"http://{url.netloc}", "Content-Type": "application/json"} | headers
    target = path if path[0] in "/*" else url.path.replace("page.html", path)
    connection.request(method, target, body, {name: value for name, value in headers.items() if value is not None})
    response = connection.getresponse()
    content = response.read().decode()
    ask.headers = response.headers
    connection.close()
    return response.status, json.loads(content) if "json" in response.headers.get("Content-Type", "") else content


@pytest.fixture
def page(tmp_path):
    with judging_of(ROWS, tmp_path) as judging, page_of(judging) as (server, _):
        yield server.address


def test_page_and_state_are_served_to_the_token_alone(page):
    token = urlsplit(page).path.split("/")[1]
    assert len(token) >= 40
    for path, kind in (("page.html", "text/html"), ("page.css", "text/css"), ("page.js", "text/javascript")):
        status, content = ask(page, path)
        assert status == 200
        assert ask.headers["Content-Type"].startswith(kind)
        assert "://" not in content, "no resource from elsewhere"
    status, state = ask(page, "state")
    assert status == 200
    assert set(state) & {"left", "right", "prompt", "done", "total"} == {"left", "right", "prompt", "done", "total"}
    others = ["/", "*", "/favicon.ico", "/state", "//state", "/%C3%A9/", f"/{token[:-1]}/state", f"/{token}x/state"]
    for path in [*others, f"/x/{token}/state"]:
        assert ask(page, path)[0] == 403, path
    assert ask(page, f"/{token}/../state")[0] in (403, 404)
    assert ask(page, f"/{token}/by_hand/server.py")[0] == 404


def test_every_answer_carries_the_policy(page):
    for path in ("page.html", "state", "nothing", "/wrong/"):
        ask(page, path)
        policy = ask.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy
        assert ask.headers["Cache-Control"] == "no-store"
        assert ask.headers["X-Content-Type-Options"] == "nosniff"
        assert ask.headers["Referrer-Policy"] == "no-referrer"


def test_other_hosts_and_origins_are_refused(page):
    port = urlsplit(page).port
    for host in ("localhost", f"localhost:{port}", "127.0.0.1:80"):
        assert ask(page, "state", Host=host)[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.", "127.0.0.1@evil", ""):
        assert ask(page, "state", Host=host)[0] == 403, host
    order = {"place": 0, "choice": "left"}
    for origin in ("http://evil.example", "null", "https://127.0.0.1", f"http://localhost:{port}", None):
        assert ask(page, "judge", order, Origin=origin)[0] == 403, origin
        assert ask(page, "undo", order, Origin=origin)[0] == 403, origin
    assert ask(page, "state")[1]["done"] == 0
    assert ask(page, "judge")[0] == 405, "a GET changes nothing"
    tunnel = {"Host": "localhost:9999", "Origin": "http://localhost:9999"}
    assert ask(page, "judge", order, **tunnel)[0] == 200


def test_wrong_orders_are_refused(page):
    for order in ([], "x", {}, {"place": "0", "choice": "left"}, {"place": True, "choice": "left"}, {"place": 0},
                  {"place": 0, "choice": "both"}, {"place": 0, "choice": ["left"]}):  # fmt: skip
        assert ask(page, "judge", order)[0] == 400, order
    assert ask(page, "judge", {"place": 0, "choice": "left", "x": "y" * 2000})[0] == 413
    assert ask(page, "state")[1]["done"] == 0


def test_a_late_tab_gets_what_is_to_be_judged_now(page):
    state = ask(page, "state")[1]
    assert ask(page, "judge", {"place": state["place"], "choice": "left"})[0] == 200
    status, now = ask(page, "judge", {"place": state["place"], "choice": "left"})
    assert (status, now["done"], now["place"]) == (409, 1, 1)
    assert ask(page, "undo", {"place": state["place"]})[0] == 409
    assert ask(page, "undo", {"place": 1})[1] == state
    assert ask(page, "undo", {"place": 0})[0] == 409


def test_many_tabs_at_once_judge_each_comparison_once(tmp_path):
    rows = [{"prompt": str(n), "responses": ["a", "b"]} for n in range(40)]
    with judging_of(rows, tmp_path, repeat_share=0) as judging, page_of(judging) as (server, _):
        statuses = []

        def judge():
            while not (state := ask(server.address, "state")[1])["finished"]:
                statuses.append(ask(server.address, "judge", {"place": state["place"], "choice": "left"})[0])

        tabs = [threading.Thread(target=judge) for _ in range(4)]
        for tab in tabs:
            tab.start()
        for tab in tabs:
            tab.join()
        assert statuses.count(200) == 40
        assert set(statuses) <= {200, 409}
    with judging_of(rows, tmp_path, repeat_share=0) as judging:
        assert [len(row["comparisons"]) for row in judging.rows()] == [1] * 40


def test_it_ends_by_itself_once_a_page_knows_that_all_is_judged(tmp_path):
    with judging_of(ROWS[:1], tmp_path) as judging, page_of(judging, seconds_to_end=60) as (server, thread):
        assert ask(server.address, "judge", {"place": 0, "choice": "left"})[1]["finished"]
        first = server._end
        assert first is not None
        assert not ask(server.address, "undo", {"place": 1})[1]["finished"]
        assert first.cancelled()
        assert server._end is None
        assert thread.is_alive()
        server._seconds_to_end = 0.01
        ask(server.address, "judge", {"place": 0, "choice": "right"})
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_only_this_machine_is_listened_to(tmp_path):
    with judging_of(ROWS, tmp_path) as judging, PageServer(judging, 0) as server:
        host, port = server._socket.getsockname()
        assert host == "127.0.0.1"
        assert server._socket.family is socket.AF_INET
        with pytest.raises(UserError, match=f"--port {port}: Address already in use; 0 takes a free one"):
            PageServer(judging, port)


# A process of its own, and its end

PROGRAM = "import sys; from dpo_fast.curate.by_hand import run_by_hand; from dpo_fast.config import LabelConfig as C\n"
PROGRAM += "run_by_hand(C(data='rows.jsonl', out='out.jsonl', by_hand=True, repeat_share=0))"


@contextlib.contextmanager
def program(folder):
    """A running program and the address it printed."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            lines = iter(process.stdout.readline, "")
            yield process, next(line.strip() for line in lines if line.startswith("http://127.0.0.1:"))
        finally:
            process.kill()


def test_a_kill_loses_nothing_and_an_interrupt_writes_the_result(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with program(tmp_path) as (process, address):
        for place, choice in enumerate(("left", "tie", "skip")):
            assert ask(address, "judge", {"place": place, "choice": choice})[0] == 200
        state = ask(address, "undo", {"place": 3})[1]
        with pytest.raises(UserError, match="is in use"):
            run_by_hand(LabelConfig(data=str(tmp_path / "rows.jsonl"), out=str(out), terminal=True, repeat_share=0))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert not out.exists()
    with program(tmp_path) as (process, address):
        again = ask(address, "state")[1]
        assert {**again, "seconds": 0} == {**state, "seconds": 0}
        assert (again["done"], again["place"]) == (2, 2)
        ask(address, "judge", {"place": 2, "choice": "right"})
        process.send_signal(signal.SIGINT)
        assert "3 of 4 done: out.jsonl" in process.stdout.read()
        assert process.wait(timeout=30) == 0
    choices = [c["choice"] for row in read(out) for c in row["comparisons"]]
    assert sorted(choices) == ["left", "right", "tie"]
    assert partial.exists()
    with program(tmp_path) as (process, address):
        ask(address, "judge", {"place": 3, "choice": "left"})
        process.send_signal(signal.SIGTERM)
        assert "4 of 4 done: out.jsonl" in process.stdout.read()
        assert process.wait(timeout=30) == 0
    assert not partial.exists()
    assert all(len(row["comparisons"]) == 1 for row in read(out))


@pytest.mark.parametrize(
    ("missing", "named"), [(("starlette", "uvicorn"), "starlette and uvicorn"), (("uvicorn",), "uvicorn")]
)
def test_without_its_extra_the_page_says_what_to_install(missing, named, monkeypatch, tmp_path):
    from dpo_fast.curate.by_hand import run

    monkeypatch.setattr(run, "find_spec", lambda name: None if name in missing else name)
    settings = {"data": str(tmp_path / "none.jsonl"), "out": str(tmp_path / "out.jsonl")}
    with pytest.raises(UserError, match=rf"needs {named} .*pip install 'dpo-fast\[by-hand\]'.*--terminal"):
        run.run_by_hand(LabelConfig(**settings, by_hand=True))
    with pytest.raises(UserError, match="no such file"):
        run.run_by_hand(LabelConfig(**settings, terminal=True))
