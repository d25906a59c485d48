"""A user's own function, named as `module:function` on the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_fast.errors import UserError


def load_function(name: str, option: str) -> Callable[..., Any]:
    """The function that `module:function` names; the module may lie in the working folder.

    Args:
        name: `module:function`.
        option: what the user typed, for messages.

    Raises:
        UserError: there is no such function.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{option}: cannot be imported: {error}; expected module:function") from error
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise UserError(f"{option}: expected a function, found {type(function).__name__}")
    return function
