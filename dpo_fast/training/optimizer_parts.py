"""The optimizer's state of a run that processes share: a file for each, read back by as many processes or by others.

As many processes load their own files, to the bit. Others join the parts, of moments as fp32 numbers, and take theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dpo_fast.errors import UserError
from dpo_fast.training.optimizer_states import FORMATS, Moments, format_of, unwrapped
from dpo_fast.training.own_weights import own_part

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from dpo_fast.ranks import Ranks


def part_file(rank: int, num_parts: int) -> str:
    """Name of a process's file in a checkpoint."""
    return f"part-{rank:05}-of-{num_parts:05}.pt"


def load_parts(optimizer: Optimizer, saved: Sequence[dict[str, Any]], to: str | None, ranks: Ranks) -> str | None:
    """Load the state of an optimizer over `OwnWeights` from all parts of a saved one.

    Args:
        optimizer: of as many parameters in as many groups.
        saved: a `state_dict` for each part; one for whole weights.
        to: the optimizer's own format; None if it is none of `FORMATS`.
        ranks: the processes that share the weights now.

    Returns:
        The format that was converted, or None.

    Raises:
        UserError: it cannot be joined or converted.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    formats = {format_of(state) for part in saved for state in part["state"].values()}
    if None in formats or to is None:
        raise UserError(
            "--resume: the state of this optimizer can only be read by as many processes as wrote it, which was "
            f"{len(saved)}"
        )
    states: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(parameters):
        found = [part["state"][number] for part in saved if number in part["state"]]
        if not found or not parameter.numel():
            continue
        moments = [FORMATS[str(format_of(state))].read(unwrapped(state)) for state in found]
        first, second = (
            own_part(torch.cat([getattr(m, name) for m in moments]), parameter, ranks) for name in ("first", "second")
        )
        states[number] = FORMATS[to].write(Moments(moments[0].step, first, second), parameter)
        if "remainder" in states[number] and all("remainder" in state for state in found):
            joined = torch.cat([state["remainder"] for state in found])
            states[number]["remainder"] = own_part(joined, parameter, ranks).contiguous()
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    (source,) = formats or {to}
    return source if source != to else None
