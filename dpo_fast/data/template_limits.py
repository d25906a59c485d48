"""Limits for a chat template, which is a program of someone else's that runs in this process.

transformers' sandbox lets it reach nothing, but not how long it runs or how much it builds. What is not bounded here: a
multiplication of enormous integers, and, outside of the main thread, time.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType

from dpo_fast.errors import UserError

SECONDS = 10.0
BYTES = 2**30
CHARS = 2**26
_STATM = Path("/proc/self/statm")


class _TimeIsUp(BaseException):
    """Passes through whatever a template or the library catches."""


@contextmanager
def template_limits(template: object) -> Iterator[None]:
    """Stop what renders one conversation inside after `SECONDS`, or when it takes `BYTES` of memory.

    Args:
        template: a tokenizer's `chat_template`; several by name are not looked into.

    Raises:
        UserError: it was stopped, or raises to a power, which no limit would stop.
    """
    if isinstance(template, str):
        check_template(template)
    try:
        with _limited_memory(), _limited_time():
            yield
    except MemoryError as error:
        raise UserError(f"the chat template builds more than {BYTES // 2**20} MiB for one conversation") from error
    except _TimeIsUp as error:
        raise UserError(f"the chat template takes longer than {SECONDS:g} s for one conversation") from error


@contextmanager
def _limited_memory() -> Iterator[None]:
    if not _STATM.exists():  # not Linux
        yield
        return
    used = int(_STATM.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([used + BYTES, *limits]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _limited_time() -> Iterator[None]:
    # Python runs handlers in the main thread alone; a timer that is running is somebody else's.
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@lru_cache(maxsize=8)
def check_template(template: str) -> None:
    """Refuse a template that raises to a power, which no limit would stop.

    Raises:
        UserError: it does.
    """
    from jinja2 import Environment, TemplateSyntaxError, nodes

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError:
        return  # its rendering says more
    if power := next(tree.find_all(nodes.Pow), None):
        raise UserError(f"the chat template, line {power.lineno}: uses **, which could keep this process busy for ever")
