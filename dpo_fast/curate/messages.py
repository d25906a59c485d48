"""The text of prompts and answers that are strings or messages."""

from __future__ import annotations

from typing import Any


def text_of(value: Any) -> str:
    """The text of a prompt or an answer: a string as it is, the contents of messages one below the other."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    return "\n\n".join(str(message.get("content") or "") for message in value)
