"""The YAML file of `--config`: whatever is wrong with it is said at once, with its name."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from dpo_fast.errors import UserError
from dpo_fast.option_names import described


def check_config_file(name: str, known: Collection[str]) -> None:
    """Refuse a file that is no mapping of settings.

    Args:
        name: of the file.
        known: names of the settings.

    Raises:
        UserError: it names the file and all keys that are unknown.
    """
    try:
        settings = yaml.load(Path(name).read_bytes(), _OnceEach)
    except (OSError, ValueError) as error:
        raise UserError(f"--config {name}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"--config {name}{line}: {getattr(error, 'problem', None) or 'not YAML'}") from error
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise UserError(f"--config {name}: holds a {type(settings).__name__}; expected `name: value` lines")
    if unknown := [str(key) for key in settings if key not in known]:
        raise UserError(f"--config {name}: unknown settings: {described(unknown, known)}")


class _OnceEach(yaml.SafeLoader):
    """A loader that refuses keys that occur twice; the last would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As of `SafeLoader`."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} occurs twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
