"""The real page server, in a thread of a test."""

import threading
from contextlib import contextmanager

from rich.console import Console

from dpo_fast.config import LabelConfig
from dpo_fast.curate.by_hand.items import to_items
from dpo_fast.curate.by_hand.judgements import Judging, make_queue
from dpo_fast.curate.by_hand.server import PageServer
from dpo_fast.curate.worklog import WorkLog


@contextmanager
def judging_of(rows, folder, **settings):
    """Judgements of rows, kept in `folder`; entering it again goes on."""
    config = LabelConfig(data="rows", **settings)
    items = to_items(rows, config, Console(quiet=True))
    with WorkLog(folder / "out.jsonl", "", overwrite=False) as log:
        yield Judging(items, make_queue(items, config), log)


@contextmanager
def page_of(judging, *, seconds_to_end=60.0):
    """A server that answers, and the thread it runs in."""
    with PageServer(judging, 0, seconds_to_end=seconds_to_end) as server:
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            yield server, thread
        finally:
            server.stop()
            thread.join(timeout=30)
            assert not thread.is_alive()
