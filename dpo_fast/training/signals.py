"""Signals that end a run."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dpo_fast.errors import is_interrupt

_FORCED = 3


class StopSignals:
    """The signals that asked a run to stop; see `stop_signals`."""

    def __init__(self) -> None:
        self._count = 0
        self._deferred = False
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def is_set(self) -> bool:
        """Whether a signal has arrived."""
        return self._count > 0

    @property
    def is_forced(self) -> bool:
        """Whether signals enough have arrived to end the process whatever it is writing."""
        return self._count >= _FORCED

    def defer(self) -> None:
        """From here on the run ends by itself after its step.

        Raises:
            KeyboardInterrupt: a signal has arrived, and Python dropped the one that it raised, as in a finalizer.
        """
        if self.is_set():
            raise KeyboardInterrupt
        self._deferred = True

    def explains(self, error: BaseException) -> bool:
        """Whether a signal is behind this error, in a process that need not end at once."""
        return self.is_set() and not self.is_forced and is_interrupt(error)

    def receive(self, number: int, frame: object) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: nothing has begun that must be finished, or the signal is the third.
        """
        self._count += 1
        if self.is_forced or not self._deferred:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            self._leave_terminals()
        # Written past Python's buffers, which the code that was interrupted may be using.
        with suppress(OSError):
            os.write(2, b"stopping after this step; the third signal stops at once, without a checkpoint\n")

    def _leave_terminals(self) -> None:
        """Every write to a terminal that hung up would fail, and end the run before its checkpoint."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Turn SIGTERM, Ctrl-C and SIGHUP into a stop after the current step, with a checkpoint.

    Before `defer` is called the first signal raises KeyboardInterrupt. After it the first one sets the flag, the second
    changes nothing, so that a write that has begun is finished, and the third raises KeyboardInterrupt. SIGHUP is left
    alone where the process was started to ignore it (nohup). Outside of the main thread no signal is handled.
    """
    stop = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    hook = sys.unraisablehook

    def quiet(unraisable: sys.UnraisableHookArgs) -> None:
        """Print no traceback of an interrupt that Python drops; the signal is counted."""
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)

    sys.unraisablehook = quiet
    try:
        with handled_signals(stop.receive):
            yield stop
    finally:
        sys.unraisablehook = hook


@contextmanager
def handled_signals(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Handle SIGTERM, Ctrl-C and SIGHUP, but leave SIGHUP alone where the process was started to ignore it (nohup)."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
