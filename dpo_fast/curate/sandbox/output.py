"""What a program prints, read as it comes and never beyond a limit."""

from __future__ import annotations

import os
import selectors
import subprocess
from types import TracebackType

from dpo_fast.curate.verdict import Unjudged

_BLOCK = 65536
_MOMENT = 0.002


class Output:
    """Reads the standard output of a program, and counts and discards its standard error."""

    def __init__(self, process: subprocess.Popen[bytes], limit: int) -> None:
        """Read from both pipes of `process`; `limit` is in bytes, of both together."""
        assert process.stdout is not None
        assert process.stderr is not None
        self._limit = self._left = limit
        self._text = bytearray()
        self._stdout = process.stdout
        self._selector = selectors.DefaultSelector()
        for pipe in (process.stdout, process.stderr):
            self._selector.register(pipe, selectors.EVENT_READ)

    def read(self, seconds: float) -> bool:
        """Read what comes within `seconds`, at most one block of each pipe; returns whether there was something.

        Once both pipes are closed it returns almost at once, since the program is about to end.

        Raises:
            Unjudged: more came than the limit.
        """
        events = self._selector.select(seconds if self._selector.get_map() else min(seconds, _MOMENT))
        for key, _ in events:
            block = os.read(key.fd, _BLOCK)
            if not block:
                self._selector.unregister(key.fileobj)
            elif key.fileobj is self._stdout:
                self._text += block
            self._left -= len(block)
        if self._left < 0:
            raise Unjudged(f"printed more than {self._limit // 1024} KiB")
        return bool(events)

    def drain(self) -> None:
        """Read what is left in the pipes."""
        while self.read(0):
            pass

    def last_line(self) -> str:
        """The last non-empty line on standard output."""
        lines = self._text.decode(errors="replace").rstrip().splitlines()
        return lines[-1] if lines else ""

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()
