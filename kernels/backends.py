"""Triton or PyTorch: chosen by where a call's tensors are, never by what can be imported.

Attention has backends of its own, in attention_backends.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]
P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with the GPU of its first tensor as the current one.

    PyTorch's own operators do this themselves. Triton launches on the current GPU, wherever its arguments are.
    """

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
            return function(*args, **kwargs)

    return guarded


def choose_backend(backend: Backend, tensor: Tensor) -> Literal["torch", "triton"]:
    """ "torch" or "triton" for `tensor`, whose device and dtype stand for the call's.

    "auto" is Triton for CUDA tensors of up to 32 bits and PyTorch for all others. On a CUDA machine without Triton,
    which some platforms lack, it warns once about the slower backend.

    Raises:
        ValueError: no such backend, or Triton cannot take this tensor.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f'backend: expected "auto", "torch" or "triton", got {backend!r}')
    if backend == "triton":
        if tensor.dtype == torch.float64:
            raise ValueError('backend: "triton" takes up to 32 bits; pass backend="torch" for float64')
        if not tensor.is_cuda and not _interpreted():
            raise ValueError(f'backend: "triton" expects CUDA tensors, got {tensor.device}; pass backend="auto"')
        return "triton"
    if backend == "torch" or not tensor.is_cuda or tensor.dtype == torch.float64:
        return "torch"
    return "triton" if _has_triton() else "torch"


@cache
def _has_triton() -> bool:
    found = find_spec("triton") is not None
    if not found:
        warnings.warn(
            "Triton is not installed: CUDA tensors take the slower torch backend; pip install triton", stacklevel=4
        )
    return found


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors (TRITON_INTERPRET=1, for tests)."""
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)
