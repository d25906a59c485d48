"""People who judge, played by a test: in a session, at the real page server, in the terminal."""

import contextlib
import http.client
import io
import json
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

from rich.console import Console

from dpo_fast.config import LabelConfig
from dpo_fast.curate.by_hand.comparisons import make_queue
from dpo_fast.curate.by_hand.items import to_items
from dpo_fast.curate.by_hand.run import run_by_hand
from dpo_fast.curate.by_hand.server import PageServer
from dpo_fast.curate.by_hand.session import JudgingSession
from dpo_fast.curate.rows import write_rows
from dpo_fast.curate.worklog import WorkLog

ROWS = [{"prompt": f"prompt {n}", "responses": [f"{n}a", f"{n}b", f"{n}c"], "samples": [{}] * 3} for n in range(4)]


@contextmanager
def session_of(rows, folder, **settings):
    """A session over rows, kept in `folder`; entering it again resumes it."""
    config = LabelConfig(data="rows", **settings)
    items = to_items(rows, config, Console(quiet=True))
    folder.mkdir(exist_ok=True)
    with WorkLog(folder / "out.jsonl", {}, overwrite=False) as log:
        yield JudgingSession(items, make_queue(items, config), log)


@contextmanager
def page_of(session, *, seconds_to_end=60.0):
    """A server that answers, and the thread it runs in."""
    with PageServer(session, 0, seconds_to_end=seconds_to_end) as server:
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            yield server, thread
        finally:
            server.stop()
            thread.join(timeout=30)
            assert not thread.is_alive()


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


def in_terminal(monkeypatch, folder, words, width=80, **settings):
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl", ROWS)
    settings = {"data": str(folder / "rows.jsonl"), "out": str(folder / "out.jsonl"), "terminal": True} | settings
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{word}\n" for word in words)))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        run_by_hand(LabelConfig(**settings), console=Console(file=output, width=width))
    return output.getvalue()
