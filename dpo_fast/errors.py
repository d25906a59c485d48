"""What ends a command with one clear line instead of a traceback."""

# Exit code of a command that a signal stopped and that goes on when it is run again: sysexits' EX_TEMPFAIL.
STOPPED = 75
# Those of a run that stopped itself or could not write a file, of a user's mistake, and of Ctrl-C.
RUN_FAILED, USER_MISTAKE, INTERRUPTED = 1, 2, 130


class UserError(ValueError):
    """A mistake in the input or the settings: one clear message, exit code 2, no traceback."""


class WriteError(UserError):
    """A file that cannot be written while a command runs: the disk is full, a size limit is reached. Exit code 1."""


class TrainingError(RuntimeError):
    """A run that stopped itself: a first step that is not at the reference, a loss or gradient that is not finite."""


class PeerError(TrainingError):
    """Another process of the run failed first, and says why; this one ends with the same exit code.

    Attributes:
        code: the exit code.
    """

    def __init__(self, code: int) -> None:
        """Take the exit code."""
        super().__init__("another process of the run failed")
        self.code = code


def exit_code(error: Exception) -> int:
    """What a command exits with after this error."""
    if isinstance(error, PeerError):
        return error.code
    return USER_MISTAKE if isinstance(error, UserError) and not isinstance(error, WriteError) else RUN_FAILED


def is_interrupt(error: BaseException) -> bool:
    """Whether a KeyboardInterrupt is behind an error: Python turns one that comes during an import into others."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
