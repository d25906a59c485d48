"""How a signal is declared: how users write it, and what it needs from the process that calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from dpo_fast.config import SignalConfig
from dpo_fast.curate.identity import Identity
from dpo_fast.curate.verdict import Question, TextSignal, Verdict
from dpo_fast.errors import UserError

if TYPE_CHECKING:
    from dpo_fast.curate.signals.served import ServedSignal

# Seconds beyond `--timeout` after which a process that does not return is killed.
KILL_GRACE = 5.0
# What to do when there is no room for temporary files.
TMPDIR_CURE = "TMPDIR names it; rerun the same command to resume"


class RowSignal(Protocol):
    """Judges many rows at once, in the main process."""

    def judge(self, questions: Sequence[Question]) -> list[list[Verdict]]:
        """For each row, one verdict for each of its answers."""


# Both take what follows the signal's name, and the settings; a `UserError` says what is wrong with either.
TextBuilder: TypeAlias = Callable[[str, SignalConfig], TextSignal]
RowBuilder: TypeAlias = "Callable[[str, SignalConfig], RowSignal | ServedSignal]"
_TextBuilder = TypeVar("_TextBuilder", bound=TextBuilder)
_RowBuilder = TypeVar("_RowBuilder", bound="RowBuilder")


@dataclass(frozen=True)
class Limits:
    """What the worker process enforces while it calls a text signal.

    Attributes:
        timeout_grace: seconds beyond `--timeout` before the call is interrupted, for a signal that enforces `--timeout`
            itself; below `KILL_GRACE`.
        memory: hold the process to `--memory_limit_mib`; false if the signal may load whatever it needs.
    """

    timeout_grace: float = 0.0
    memory: bool = True

    def __post_init__(self) -> None:
        assert 0 <= self.timeout_grace < KILL_GRACE, f"timeout_grace {self.timeout_grace}: the process is killed first"


@dataclass(frozen=True)
class Declaration:
    """What is known of a signal besides its code.

    Attributes:
        usages: how users write it, such as `length:MIN-MAX`; the name is the part before the colon.
        build_text: makes a signal that judges one answer; None for the other kind.
        build_rows: makes a signal that judges many rows; None for the other kind.
        limits: what the process that calls it enforces.
        is_slow: every answer is worth the start of a worker process (0.1 s).
        identity: argument -> hashes of the files or the model that it names, which the scores depend on; called once
            the signal is built. None if the scores depend on nothing else.
    """

    usages: tuple[str, ...]
    build_text: TextBuilder | None = None
    build_rows: RowBuilder | None = None
    limits: Limits = Limits()
    is_slow: bool = False
    identity: Callable[[str], Identity] | None = None


SIGNALS: dict[str, Declaration] = {}


def text_signal(
    *usages: str,
    limits: Limits = Limits(),
    is_slow: bool = False,
    identity: Callable[[str], Identity] | None = None,
) -> Callable[[_TextBuilder], _TextBuilder]:
    """Declare a signal that judges one answer by its text and its row, in a worker process: answers are hostile."""

    def declare(build: _TextBuilder) -> _TextBuilder:
        _add(Declaration(usages, build_text=build, limits=limits, is_slow=is_slow, identity=identity))
        return build

    return declare


def row_signal(*usages: str, identity: Callable[[str], Identity] | None = None) -> Callable[[_RowBuilder], _RowBuilder]:
    """Declare a signal that judges many rows at once in the main process: it reads a column or asks a model."""

    def declare(build: _RowBuilder) -> _RowBuilder:
        _add(Declaration(usages, build_rows=build, identity=identity))
        return build

    return declare


def _add(declaration: Declaration) -> None:
    (name,) = {usage.partition(":")[0] for usage in declaration.usages}
    assert name not in SIGNALS, f"two signals are named {name}"
    SIGNALS[name] = declaration


def bad_spec(spec: str, expected: str) -> UserError:
    """The error for a signal that is written wrongly."""
    return UserError(f"--signals {spec}: expected {expected}")
