"""What a program prints, read as it comes and never more than a limit of it."""

from __future__ import annotations

import os
import selectors
from types import TracebackType

from dpo_fast.curate.verdict import Unjudged

_BLOCK = 65536
_MOMENT = 0.002


class Output:
    """The two pipes of a program.

    Attributes:
        stdout: descriptor to give to the program.
        stderr: likewise; what comes there is counted and thrown away.
    """

    def __init__(self, limit: int) -> None:
        """Open the pipes; `limit` is in bytes, of both together."""
        self._limit = limit
        self._left = limit
        self._text = bytearray()
        self._selector = selectors.DefaultSelector()
        self._from_stdout, self.stdout = os.pipe()
        self._from_stderr, self.stderr = os.pipe()
        for descriptor in (self._from_stdout, self._from_stderr):
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ)
        self._open = {self._from_stdout, self._from_stderr, self.stdout, self.stderr}

    def started(self) -> None:
        """Close the program's ends, which it has by now."""
        self._close(self.stdout)
        self._close(self.stderr)

    def read(self, seconds: float) -> bool:
        """Read what comes within `seconds`, a block of each pipe at most; whether there was something.

        Where both ends are closed it returns soon, since the program is about to end.

        Raises:
            Unjudged: more came than the limit.
        """
        events = self._selector.select(seconds if self._selector.get_map() else min(seconds, _MOMENT))
        for key, _ in events:
            block = os.read(key.fd, _BLOCK)
            if not block:
                self._selector.unregister(key.fd)
                self._close(key.fd)
            elif key.fd == self._from_stdout:
                self._text += block
            self._left -= len(block)
        if self._left < 0:
            raise Unjudged(f"printed more than {self._limit // 1024} KiB")
        return bool(events)

    def drain(self) -> None:
        """Read what is still in the pipes."""
        while self.read(0):
            pass

    def last_line(self) -> str:
        """The last line on standard output that is not empty."""
        lines = self._text.decode(errors="replace").rstrip().splitlines()
        return lines[-1] if lines else ""

    def _close(self, descriptor: int) -> None:
        if descriptor in self._open:
            self._open.remove(descriptor)
            os.close(descriptor)

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()
        for descriptor in list(self._open):
            self._close(descriptor)
