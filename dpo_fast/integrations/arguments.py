"""Settings of a loss from a Python caller's arguments."""

from __future__ import annotations

import re
from typing import Any

from dpo_fast.config import LossConfig
from dpo_fast.errors import UserError
from dpo_fast.losses.objective import check_loss


def loss_settings(**arguments: Any) -> LossConfig:
    """The settings, checked.

    Raises:
        ValueError: it names the arguments as the caller wrote them.
    """
    try:
        config = LossConfig(**arguments)
        check_loss(config)
    except UserError as error:
        raise ValueError(re.sub(r"--(\w+)", r"\1", str(error))) from error
    return config
