"""Rotary embeddings whose frequencies depend on the length of the row.

transformers takes that length from the largest position of a whole forward, so one long row in a pack would change all
others; and what it calls `dynamic` remembers the longest forward so far. Rows are therefore computed in packs of one
regime, each from a fresh start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LengthRegimes:
    """How a row's length decides on its frequencies.

    Attributes:
        threshold: rows of up to this many tokens have the same.
        by_length: whether longer rows have frequencies by their exact length (`dynamic`), or all the same (`longrope`).
        modules: the embeddings that remember.
    """

    threshold: int
    by_length: bool
    modules: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module) -> LengthRegimes | None:
        """Those of a model; None if the length of a row does not matter."""
        found = [(module, kind) for module in model.modules() for kind in _rope_types(module)]
        scaled = [(module, kind) for module, kind in found if kind == "longrope" or "dynamic" in kind]
        if not scaled:
            return None
        return cls(
            threshold=min(_threshold(module, kind) for module, kind in scaled),
            by_length=any("dynamic" in kind for _, kind in scaled),
            modules=tuple(module for module, kind in scaled if "dynamic" in kind),
        )

    def of_length(self, length: int) -> int:
        """A number that rows of one regime share."""
        if length <= self.threshold:
            return 0
        return length if self.by_length else 1

    def forget(self) -> None:
        """Let the next forward begin as the first one did."""
        for module in self.modules:
            for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
                setattr(module, name, module.original_max_seq_len)
            for name in [name for name, _ in module.named_buffers(recurse=False) if name.endswith("original_inv_freq")]:
                module.register_buffer(name.replace("original_", ""), getattr(module, name), persistent=False)


def _rope_types(module: nn.Module) -> list[str]:
    """Of a rotary embedding, one or one for each kind of layer; none of other modules."""
    kinds = getattr(module, "rope_type", None)
    return list(kinds.values()) if isinstance(kinds, dict) else [kinds] if isinstance(kinds, str) else []


def _threshold(module: Any, kind: str) -> int:
    if "dynamic" in kind:
        return int(module.original_max_seq_len)
    parameters = module.config.rope_parameters
    nested = [x for x in parameters.values() if isinstance(x, dict)] or [parameters]
    return min(int(x["original_max_position_embeddings"]) for x in nested if x.get("rope_type") == kind)
