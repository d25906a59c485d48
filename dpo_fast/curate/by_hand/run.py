"""`dpo-fast label --by-hand` and `--terminal`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import xxhash
from rich.console import Console

from dpo_fast.config import LabelConfig
from dpo_fast.console import say
from dpo_fast.curate.by_hand.comparisons import make_queue
from dpo_fast.curate.by_hand.items import to_items
from dpo_fast.curate.by_hand.session import WRITTEN, JudgingSession, is_entry
from dpo_fast.curate.rows import check_out, hold_output, read_objects, to_lines
from dpo_fast.curate.worklog import WorkLog, log_path
from dpo_fast.errors import UserError
from dpo_fast.files import write_file_atomically


def run_by_hand(config: LabelConfig, *, console: Console | None = None) -> Path:
    """Let a person compare the answers of `config.data`, in the terminal or on a page, and write `config.out`.

    Every judgement goes to `OUT.partial` at once. Stopping early writes a result of what is judged so far; the same
    command resumes. When all is judged, the log is removed.

    Raises:
        UserError: a mistake in the settings or the data.
    """
    console = console or Console()
    _check(config)
    out = check_out(config.out, overwrite=config.overwrite or log_path(Path(config.out)).is_file())
    items = to_items(read_objects(config.data, config.max_rows, console), config, console)
    queue = make_queue(items, config)
    if not queue:
        raise UserError(f"--data {config.data}: nothing to compare: no row has two answers that differ")
    settings = {name: getattr(config, name) for name in ("prompt_column", "responses_column", "pairs")}
    depends_on = {
        "settings": settings,
        "rows": [item.row for item in items],
        "comparisons": [asdict(comparison) for comparison in queue],
    }
    is_valid = partial(is_entry, num_places=len(queue))
    with (
        hold_output(out),
        WorkLog(out, depends_on, overwrite=config.overwrite, is_valid=is_valid) as log,
        _signals_as_interrupts(),
    ):
        if out.exists() and not config.overwrite and _digest(out) not in log.results.get(WRITTEN, []):
            raise UserError(
                f"--out {out} was not written from {log.path}: choose another file, or replace it with --overwrite true"
            )
        session = JudgingSession(items, queue, log)
        try:
            _judge(session, config, console)
        except KeyboardInterrupt:
            console.print()
        _write(out, session, log, console)
    return out


def _check(config: LabelConfig) -> None:
    """Reject settings that cannot work."""
    missing = [package for package in ("starlette", "uvicorn") if find_spec(package) is None]
    if missing and not config.terminal:
        raise UserError(
            f"--by-hand needs {' and '.join(missing)} for its page: pip install 'dpo-fast[by-hand]', or judge in the "
            "terminal with --terminal"
        )


def _judge(session: JudgingSession, config: LabelConfig, console: Console) -> None:
    if config.terminal:
        from dpo_fast.curate.by_hand.terminal import judge_in_terminal

        judge_in_terminal(session, console)
        return
    from dpo_fast.curate.by_hand.server import PageServer

    with PageServer(session, config.port) as server:
        say(console, f"{session.progress().render()}; open this page, stop with Ctrl-C:")
        say(console, server.address)
        server.run()


def _write(out: Path, session: JudgingSession, log: WorkLog, console: Console) -> None:
    progress = session.progress()
    if not progress.done and not log.num_damaged and not out.exists():
        log.finish()
        say(console, "nothing was judged, nothing is written")
        return
    content = to_lines(session.rows())
    # Before it is written: killed in between, the next run must know both files as its own.
    log.add({WRITTEN: [*([_digest(out)] if out.exists() else []), xxhash.xxh3_128_hexdigest(content.encode())]})
    write_file_atomically(out, content)
    say(console, f"{progress.render()}: {out}")
    if session.is_finished:
        log.finish()
    else:
        say(console, f"rerun the same command to resume ({log.path} keeps the judgements)")


def _digest(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, so that the result is written; a SIGHUP that is ignored stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
