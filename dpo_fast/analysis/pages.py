"""HTML pages, each a single file: no scripts, nothing loaded from elsewhere, everything escaped."""

from __future__ import annotations

from typing import Any


def render(template: str, **values: Any) -> str:
    """Fill a template of `dpo_fast/templates`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dpo_fast"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
