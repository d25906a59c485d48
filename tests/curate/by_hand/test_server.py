"""The page's server: who may ask, and what it answers."""

import socket
import threading
from urllib.parse import urlsplit

import pytest
from by_hand_pages import ROWS, ask, page_of, session_of

from dpo_fast.curate.by_hand.server import PageServer
from dpo_fast.errors import UserError


@pytest.fixture
def page(tmp_path):
    with session_of(ROWS, tmp_path) as session, page_of(session) as (server, _):
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
    with session_of(rows, tmp_path, repeat_share=0) as session, page_of(session) as (server, _):
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
    with session_of(rows, tmp_path, repeat_share=0) as session:
        assert [len(row["comparisons"]) for row in session.rows()] == [1] * 40


def test_it_ends_by_itself_once_a_page_knows_that_all_is_judged(tmp_path):
    with session_of(ROWS[:1], tmp_path) as session, page_of(session, seconds_to_end=60) as (server, thread):
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
    with session_of(ROWS, tmp_path) as session, PageServer(session, 0) as server:
        host, port = server._socket.getsockname()
        assert host == "127.0.0.1"
        assert server._socket.family is socket.AF_INET
        with pytest.raises(UserError, match=f"--port {port}: Address already in use; 0 picks a free one"):
            PageServer(session, port)
