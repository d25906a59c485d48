"""Signals that end a command: it cleans up first, ends its worker processes, and keeps what it has logged."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dpo_fast.errors import STOPPED


class _Stopped(BaseException):
    """A signal arrived; not a SystemExit, which what runs at that moment may take for an answer's mistake."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def exit_on_signals(*, resumable: bool) -> Iterator[None]:
    """End the process with an exit code, after cleaning up, when SIGTERM or SIGHUP arrives inside the block.

    Ctrl-C raises KeyboardInterrupt as always, with the same effect. SIGHUP is left alone where the process was started
    to ignore it (nohup). Outside of the main thread no signal is handled.

    Args:
        resumable: the same command resumes, so the exit code is 75; else it is 128 plus the signal's number.

    Raises:
        SystemExit: a signal arrived.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in numbers}
    handled = [number for number in numbers if before[number] is not signal.SIG_IGN]

    def stop(number: int, frame: object) -> None:
        # Cleaning up takes seconds at most; a second signal must not leave it half done.
        for other in handled:
            signal.signal(other, signal.SIG_IGN)
        raise _Stopped(number)

    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    except _Stopped as stopped:
        cure = "; rerun the same command to resume" if resumable else ""
        print(f"stopped by {signal.Signals(stopped.number).name}{cure}", file=sys.stderr)
        raise SystemExit(STOPPED if resumable else 128 + stopped.number) from None
    finally:
        for number in handled:
            signal.signal(number, before[number])
