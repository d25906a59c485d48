"""`dpo-fast label --by-hand` and `--terminal`."""

from __future__ import annotations

import fcntl
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import xxhash
from rich.console import Console

from dpo_fast.config import LabelConfig
from dpo_fast.console import say
from dpo_fast.curate.by_hand.items import to_items
from dpo_fast.curate.by_hand.judgements import Judging, make_queue
from dpo_fast.curate.rows import check_out, read_objects, write_rows
from dpo_fast.curate.worklog import WorkLog, fingerprint
from dpo_fast.errors import UserError

# Key of the log: hash of the last result that was written from it, which a later one may replace.
_WRITTEN = "written"


def run_by_hand(config: LabelConfig, *, console: Console | None = None) -> Path:
    """Let a person compare the answers of `config.data`, in the terminal or on a page, and write `config.out`.

    Every judgement is kept in `OUT.partial` at once. Whoever stops in between has a result of what is judged so far,
    and goes on by the same command; when all is judged, the log goes.

    Raises:
        UserError: a mistake in the settings or the data.
    """
    console = console or Console()
    missing = [package for package in ("starlette", "uvicorn") if find_spec(package) is None]
    if missing and not config.terminal:
        raise UserError(
            f"--by-hand needs {' and '.join(missing)} for its page: pip install 'dpo-fast[by-hand]', or judge in the "
            "terminal by --terminal"
        )
    if not 0 <= config.repeat_share <= 1:
        raise UserError(f"--repeat_share {config.repeat_share}: expected a share, from 0 to 1")
    partial = Path(config.out + ".partial")
    out = check_out(config.out, overwrite=config.overwrite or partial.is_file())
    items = to_items(read_objects(config.data, config.max_rows, console), config, console)
    queue = make_queue(items, config)
    if not queue:
        raise UserError(f"--data {config.data}: nothing to compare: no row has two answers that differ")
    settings = {name: getattr(config, name) for name in ("prompt_column", "responses_column", "pairs")}
    key = fingerprint(settings, [item.row for item in items], [asdict(comparison) for comparison in queue])
    with _log_alone(out, key, overwrite=config.overwrite) as log, _ended_by_sigterm():
        if out.exists() and not config.overwrite and _digest(out) != log.results.get(_WRITTEN):
            raise UserError(
                f"--out {out} is not what {log.path} led to: choose another file, or replace it by --overwrite true"
            )
        judging = Judging(items, queue, log)
        try:
            _judge(judging, config, console)
        except KeyboardInterrupt:
            console.print()
        _write(out, judging, log, console)
    return out


def _judge(judging: Judging, config: LabelConfig, console: Console) -> None:
    if config.terminal:
        from dpo_fast.curate.by_hand.terminal import judge_in_terminal

        judge_in_terminal(judging, console)
        return
    from dpo_fast.curate.by_hand.server import PageServer

    with PageServer(judging, config.port) as server:
        say(console, f"{judging.progress().render()}; open this page, and end by Ctrl-C:")
        say(console, server.address)
        server.run()


def _write(out: Path, judging: Judging, log: WorkLog, console: Console) -> None:
    progress = judging.progress()
    if not progress.done and not out.exists():
        log.finish()
        say(console, "nothing was judged, nothing is written")
        return
    write_rows(out, judging.rows())
    say(console, f"{progress.render()}: {out}")
    if judging.is_finished:
        log.finish()
    else:
        log.add({_WRITTEN: _digest(out)})
        say(console, f"the same command goes on with it ({log.path} keeps the judgements)")


def _digest(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


@contextmanager
def _log_alone(out: Path, key: str, *, overwrite: bool) -> Iterator[WorkLog]:
    """The log, which no other process has open; a log that is there is locked before it is touched."""
    partial = out.with_name(out.name + ".partial")
    with ExitStack() as stack:
        existed = partial.exists()
        if existed:
            stack.enter_context(_locked(partial))
        log = stack.enter_context(WorkLog(out, key, overwrite=overwrite))
        if not existed:
            stack.enter_context(_locked(partial))
        yield log


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{path} is in use: end the other dpo-fast label first") from error
        yield


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the work like Ctrl-C, so that the result is written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
