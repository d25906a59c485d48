"""The LM head as the implementations of `linear_logprob.py` read it, and the options that a caller sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from dpo_fast.kernels.backends import Backend

DEFAULT_MEMORY_BUDGET = 2 * 2**30


class HeadKeywords(TypedDict, total=False):
    """The fields of `HeadOptions` as keyword arguments of a call; defaults are given there."""

    softcap: float | None
    temperature: float
    backend: Backend
    memory_budget: int
    assume_valid: bool
    autotune: bool


@dataclass(frozen=True)
class HeadOptions:
    """Options of a call to the head.

    Attributes:
        softcap: cap(x) = softcap · tanh(x / softcap), as in Gemma 2; None for none.
        temperature: divides the capped logits.
        backend: "torch", "triton" (CUDA), or "auto": Triton for CUDA tensors if it is installed, else torch.
        memory_budget: bytes to keep from the forward for the backward. Rows that do not fit are recomputed in the
            backward: slower, with the same result.
        assume_valid: trust that every target is in [0, V). Otherwise targets are checked, which synchronizes with a GPU
            once.
        autotune: on a GPU, time the variants of the kernels once per size and take the fastest; see `autotune.py`.
            Otherwise take the default.

    Raises:
        ValueError: an option is out of range.
    """

    softcap: float | None = None
    temperature: float = 1.0
    backend: Backend = "auto"
    memory_budget: int = DEFAULT_MEMORY_BUDGET
    assume_valid: bool = False
    autotune: bool = True

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap: expected a positive number or None, got {self.softcap}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        if self.memory_budget < 0:
            raise ValueError(f"memory_budget: expected 0 bytes or more, got {self.memory_budget}")


@dataclass(frozen=True)
class Head:
    """logits = scale · cap(hidden·weightᵀ + bias), cap(x) = softcap · tanh(x / softcap) if there is a softcap.

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        softcap: see `HeadOptions`.
        scale: 1 / temperature.
        dtype: of products and exponentials, fp32 or fp64.
        autotune: see `HeadOptions`.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    dtype: torch.dtype
    autotune: bool = True

    @property
    def has_epilogue(self) -> bool:
        """Whether products need more than scaling: a bias or a softcap."""
        return self.bias is not None or self.softcap is not None

    def tile(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """(C, D) weight and (C,) bias of a tile in the dtype of the products."""
        bias = None if self.bias is None else self.bias[columns].to(self.dtype)
        return self.weight[columns].to(self.dtype), bias

    def logits_(self, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Fill `out` (R, C) with logits; returns cap', the softcap's slope, or None for 1 everywhere."""
        factor = self.scale if self.softcap is None else 1 / self.softcap
        if bias is None:
            torch.addmm(out, hidden, weight.t(), beta=0, alpha=factor, out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), beta=factor, alpha=factor, out=out)
        return self.cap_(out)

    def cap_(self, product: Tensor) -> Tensor | None:
        """Turn a product, already times scale or 1 / softcap, into logits; returns what `logits_` does."""
        if self.softcap is None:
            return None
        product.tanh_()
        slope = 1 - product * product
        product.mul_(self.softcap * self.scale)
        return slope
