"""`AdamW8bitFused`: the step of `kernels/adamw.py` as a PyTorch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dpo_fast.kernels.adamw import Hyper, Slot, adamw_step_, join_weight

# What a parameter's state holds beside the number of its steps. fp32 weights have no remainder.
SLOT_FIELDS = ("moments", "exponents", "remainder")


class AdamW8bitFused(torch.optim.Optimizer):
    """AdamW with 8-bit moments and, for bf16 weights, 8 more bits per weight in the state.

    Parameters are bfloat16 or float32, of any shape and layout, on any device. On a GPU a step is one launch for all
    parameters of the same dtype, device, step and settings (two if some addresses are not multiples of 16 bytes).

    `state[parameter]` is empty before the first step; then it holds `step` (int) and the tensors of `Slot`. Saving the
    weights and `state_dict` resumes with the same bits.

    Attributes:
        grad_factor: fp32 scalar tensor that multiplies all gradients of the next step, such as a clipping factor; read
            on the device, and reset to None by the step.

    Raises:
        ValueError: a setting is out of range; in `step`, a parameter has another dtype, or a gradient is sparse.
    """

    grad_factor: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        """Defaults are those of `torch.optim.AdamW`."""
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name}: expected 0 or above, got {value}")
        if not eps > 0:
            raise ValueError(f"eps: expected a number above 0, got {eps}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parameters that have a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        launches: dict[tuple[Hyper, torch.device, torch.dtype], list[Tensor]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    key = (self._next_hyper(parameter, group), parameter.device, parameter.dtype)
                    launches.setdefault(key, []).append(parameter)
        factor, self.grad_factor = self.grad_factor, None
        for (hyper, device, _), parameters in launches.items():
            self._step(parameters, hyper, None if factor is None else factor.to(device, non_blocking=True))
        return loss

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Step one parameter of `group` by its gradient; the result is the same as that of a step of all."""
        self._step([parameter], self._next_hyper(parameter, group), None)

    def exact_weight(self, parameter: Tensor) -> Tensor:
        """The weight that the optimizer holds, as float32: a bf16 parameter is this, rounded to the nearest bf16."""
        return join_weight(parameter.detach().contiguous(), self.state[parameter].get("remainder")).float()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from `state_dict`, keeping the dtypes of its tensors, which PyTorch would change to the parameters'.

        Raises:
            ValueError: the groups differ, or a state does not fit its parameter.
        """
        super().load_state_dict({**state_dict, "state": {}})
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(saved, parameters, strict=True):
            if number in state_dict["state"]:
                state = state_dict["state"][number]
                check_state(state, parameter)
                self.state[parameter] = {
                    key: value.to(parameter.device) if isinstance(value, Tensor) else value
                    for key, value in state.items()
                }

    def _next_hyper(self, parameter: Tensor, group: dict[str, Any]) -> Hyper:
        step = self.state[parameter].get("step", 0) + 1
        beta1, beta2 = group["betas"]
        return Hyper(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], step)

    def _step(self, parameters: list[Tensor], hyper: Hyper, factor: Tensor | None) -> None:
        slots = [self._slot(parameter) for parameter in parameters]
        adamw_step_(slots, [p.grad for p in parameters if p.grad is not None], hyper, factor)
        for parameter, slot in zip(parameters, slots, strict=True):
            self.state[parameter]["step"] = hyper.step
            if slot.weight.data_ptr() != parameter.data_ptr():
                parameter.copy_(slot.weight)

    def _slot(self, parameter: Tensor) -> Slot:
        """The parameter's slot, whose weight is a copy if the parameter is not contiguous."""
        weight, state = parameter.detach().contiguous(), self.state[parameter]
        if not state:
            slot = Slot.zeros(weight)
            state["step"] = 0
            state.update({name: x for name in SLOT_FIELDS if (x := getattr(slot, name)) is not None})
        return Slot(weight, *(state.get(name) for name in SLOT_FIELDS))


def check_state(state: dict[str, Any], parameter: Tensor) -> None:
    """Refuse a state that is not that of this parameter.

    Raises:
        ValueError: it names what differs.
    """
    fields = ("step", *SLOT_FIELDS[: 3 if parameter.dtype == torch.bfloat16 else 2])
    if set(state) != set(fields):
        raise ValueError(
            f"state: expected {', '.join(fields)} for a {parameter.dtype} parameter, got {', '.join(map(str, state))}"
        )
    if state["moments"].shape != parameter.shape:
        raise ValueError(f"state: expected the shape {tuple(parameter.shape)}, got {tuple(state['moments'].shape)}")
