"""States of PyTorch's AdamW, bitsandbytes' 8-bit AdamW and the fused one, converted into each other.

A state is what an optimizer keeps of one parameter. All three keep the number of steps and two moments; converting
rounds the moments to the codes of the target. Only the fused one keeps bits of the weight: they are lost when its state
is converted, and zero when another's is, so the weight is then the bf16 parameter itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpo_fast.errors import UserError
from dpo_fast.kernels.adamw import Slot, decode_moments, encode_moments

if TYPE_CHECKING:
    from torch.optim import Optimizer

State = Mapping[str, Any]
# bitsandbytes hides the tensors of a saved state from FSDP under this key.
BITSANDBYTES_WRAPPER = "__bnb_optimizer_quant_state__"
BITSANDBYTES_BLOCK = 256
# It keeps smaller tensors in fp32.
BITSANDBYTES_MIN_8BIT = 4096


@dataclass(frozen=True)
class Moments:
    """Steps taken, and both moments as fp32 in the parameter's shape."""

    step: int
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class StateFormat:
    """How an optimizer keeps its moments.

    Attributes:
        field: a key that no other format has.
        read: moments of a state.
        write: state of moments for a parameter.
    """

    field: str
    read: Callable[[State], Moments]
    write: Callable[[Moments, Tensor], dict[str, Any]]


def read_torch(state: State) -> Moments:
    """Moments of `torch.optim.AdamW`."""
    return Moments(int(state["step"]), state["exp_avg"].float(), state["exp_avg_sq"].float())


def write_torch(moments: Moments, parameter: Tensor) -> dict[str, Any]:
    """State of `torch.optim.AdamW`, which keeps moments in the parameter's dtype."""
    first, second = (moment.to(parameter.dtype) for moment in (moments.first, moments.second))
    return {"step": torch.tensor(float(moments.step)), "exp_avg": first, "exp_avg_sq": second}


def read_bitsandbytes(state: State) -> Moments:
    """Moments of `bitsandbytes.optim.AdamW8bit`."""

    def dequantize(number: int) -> Tensor:
        codes: Tensor = state[f"state{number}"]
        if codes.dtype != torch.uint8:
            return codes.float()
        scales = state[f"absmax{number}"].repeat_interleave(BITSANDBYTES_BLOCK)[: codes.numel()]
        numbers: Tensor = state[f"qmap{number}"][codes.long()] * scales.view(codes.shape)
        return numbers

    return Moments(int(state["step"]), dequantize(1), dequantize(2))


def write_bitsandbytes(moments: Moments, parameter: Tensor) -> dict[str, Any]:
    """State of `bitsandbytes.optim.AdamW8bit`."""
    from bitsandbytes import functional

    state: dict[str, Any] = {"step": moments.step}
    for number, (moment, signed) in enumerate(((moments.first, True), (moments.second, False)), 1):
        if parameter.numel() < BITSANDBYTES_MIN_8BIT:
            state[f"state{number}"] = moment
            continue
        code = functional.create_dynamic_map(signed=signed).to(moment.device)
        codes, made = functional.quantize_blockwise(moment, code=code, blocksize=BITSANDBYTES_BLOCK)
        state |= {f"state{number}": codes, f"absmax{number}": made.absmax, f"qmap{number}": code}
    return state


def read_fused(state: State) -> Moments:
    """Moments of `AdamW8bitFused`."""
    return Moments(int(state["step"]), *decode_moments(state["moments"], state["exponents"]))


def write_fused(moments: Moments, parameter: Tensor) -> dict[str, Any]:
    """State of `AdamW8bitFused`, whose weight is the parameter."""
    codes, exponents = encode_moments(moments.first, moments.second)
    remainder = Slot.zeros(parameter.detach().contiguous()).remainder
    state = {"step": moments.step, "moments": codes, "exponents": exponents}
    return state if remainder is None else state | {"remainder": remainder}


FORMATS = {
    "torch": StateFormat("exp_avg", read_torch, write_torch),
    "bitsandbytes": StateFormat("state1", read_bitsandbytes, write_bitsandbytes),
    "fused": StateFormat("moments", read_fused, write_fused),
}


def format_of(state: State) -> str | None:
    """Which of `FORMATS` a state is in, or None."""
    return next((name for name, known in FORMATS.items() if known.field in unwrapped(state)), None)


def convert_state(state: State, parameter: Tensor, to: str) -> dict[str, Any]:
    """The state in format `to`, for this parameter; the tensors stay on their device.

    Raises:
        ValueError: it is in none of `FORMATS`.
    """
    name = format_of(state)
    if name is None:
        raise ValueError(f"state: expected one of {', '.join(FORMATS)}, got the keys {', '.join(map(str, state))}")
    return FORMATS[to].write(FORMATS[name].read(unwrapped(state)), parameter)


def load_optimizer_state(optimizer: Optimizer, saved: dict[str, Any], to: str | None) -> str | None:
    """Load a `state_dict`, converted if an optimizer of another format wrote it.

    Args:
        optimizer: of as many parameters in as many groups.
        saved: from `state_dict`.
        to: the optimizer's own format; None if it is none of `FORMATS`.

    Returns:
        The format that was converted, or None.

    Raises:
        UserError: it cannot be converted.
    """
    written = {format_of(state) for state in saved["state"].values()} or {to}
    if written == {to}:
        optimizer.load_state_dict(saved)
        return None
    (source,) = written if len(written) == 1 else (None,)
    if source is None or to is None:
        raise UserError(
            f"--resume: the optimizer's state is in the format of {source or 'an unknown optimizer'}, and --optim "
            "does not read it; resume with the optimizer that wrote it"
        )
    numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    of = dict(zip(numbers, parameters, strict=True))
    groups = [
        own | {key: value for key, value in old.items() if key in own}
        for own, old in zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
    ]
    state = {number: convert_state(state, of[number], to) for number, state in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return source


def unwrapped(state: State) -> State:
    """The state with the tensors that bitsandbytes hides in it."""
    return {**state, **state.get(BITSANDBYTES_WRAPPER, {})}
