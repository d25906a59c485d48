"""A loss that goes wrong in one process."""

import os

_calls = []


def nan_in_the_second(pairs):
    """The sigmoid loss; from the second pack on it is nan in the process of rank 1."""
    _calls.append(None)
    losses = -(0.1 * pairs.margin).sigmoid().log()
    return losses * float("nan") if os.environ["RANK"] == "1" and len(_calls) > 1 else losses
