"""What ends a command with one clear line instead of a traceback."""

# Exit code of a command that a signal stopped and that goes on when it is run again: sysexits' EX_TEMPFAIL.
STOPPED = 75


class UserError(ValueError):
    """A mistake in the input or the settings: one clear message, exit code 2, no traceback."""


class WriteError(UserError):
    """A file that cannot be written while a command runs: the disk is full, a size limit is reached. Exit code 1."""


class TrainingError(RuntimeError):
    """A run that stopped itself: a first step that is not at the reference, a loss or gradient that is not finite."""
