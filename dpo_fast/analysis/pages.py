"""HTML pages that are one file each: no script, nothing loaded from elsewhere, everything escaped."""

from __future__ import annotations

from typing import Any


def render(template: str, **values: Any) -> str:
    """A template of `dpo_fast/templates` with its values."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dpo_fast"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
