"""What happens to gradients between backward and optimizer step: they are clipped, or released during the backward.

An optimizer takes part by what it has, not by its name: `grad_factor` if it multiplies gradients itself, which saves
clipping a pass over them, and `step_parameter` if it can step one parameter during the backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError
from dpo_fast.model.sharding import whole
from dpo_fast.training.optimizers import OPTIMIZERS, optimizer_name

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from dpo_fast.packs.layout import Group
    from dpo_fast.training.plan import Plan


class Gradients(Protocol):
    """Called once per optimizer step, after the backward and before the optimizer."""

    def clip(self) -> Tensor:
        """The norm of the gradient before clipping, as a scalar on the device."""


@runtime_checkable
class MultipliesGradients(Protocol):
    """An optimizer whose next step multiplies all gradients by this fp32 scalar; None multiplies by nothing."""

    grad_factor: Tensor | None


@runtime_checkable
class StepsOneParameter(Protocol):
    """An optimizer that can step one parameter of a group, as during the backward."""

    param_groups: list[dict[str, Any]]

    def step_parameter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Step `parameter` by its gradient."""


class Clipping:
    """Gradients stay until the step, which scales their norm down to `max_norm`; 0 does not clip."""

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor], max_norm: float) -> None:
        self._optimizer, self._parameters, self._max_norm = optimizer, list(parameters), max_norm or math.inf

    def clip(self) -> Tensor:
        """Scale the gradients, or let the optimizer do so; returns their norm before, over all processes."""
        if not isinstance(self._optimizer, MultipliesGradients):
            return whole(clip_grad_norm_(self._parameters, self._max_norm))
        norm = whole(get_total_norm([p.grad for p in self._parameters if p.grad is not None]))
        if self._max_norm < math.inf:
            # As in torch.nn.utils.clip_grads_with_norm_.
            self._optimizer.grad_factor = (self._max_norm / (norm.float() + 1e-6)).clamp(max=1.0)
        return norm


class GradientRelease:
    """Each parameter is stepped as soon as its gradient is complete, and the gradient is freed.

    Gradients then take the memory of the few parameters that the backward is working on. The next `optimizer.step`
    finds none and does nothing.
    """

    def __init__(self, optimizer: StepsOneParameter, parameters: Iterable[Tensor]) -> None:
        self._optimizer, self._parameters = optimizer, list(parameters)
        self._norms: dict[Tensor, Tensor] = {}
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._step, number))

    def _step(self, group: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._norms[parameter] = get_total_norm([parameter.grad])
        self._optimizer.step_parameter(parameter, self._optimizer.param_groups[group])
        parameter.grad = None

    def clip(self) -> Tensor:
        """The norm of the gradients since the last call, of which none is left to clip."""
        norms, self._norms = self._norms, {}
        return get_total_norm([norms[p] for p in self._parameters if p in norms])


def prepare_gradients(config: DPOConfig, optimizer: Optimizer, parameters: Iterable[Tensor]) -> Gradients:
    """What `config` asks for; it passed `check_gradient_release`."""
    if not config.gradient_release:
        return Clipping(optimizer, parameters, config.max_grad_norm)
    assert isinstance(optimizer, StepsOneParameter), "an optimizer declares `releases_gradients` if it can"
    return GradientRelease(optimizer, parameters)


def check_gradient_release(config: DPOConfig, plan: Plan, groups: Sequence[Group]) -> None:
    """Refuse to release gradients if something needs them all at once.

    Raises:
        UserError: the optimizer, clipping, or a step of several packs does.
    """
    if not config.gradient_release:
        return
    if plan.ranks.world_size > 1:
        raise UserError("--gradient_release true: several processes sum their gradients first; pass false")
    name = optimizer_name(config)
    if not OPTIMIZERS[name].releases_gradients:
        able = ", ".join(known for known, declared in OPTIMIZERS.items() if declared.releases_gradients)
        raise UserError(f"--gradient_release true: --optim {name} steps all weights at once; expected {able}")
    if config.max_grad_norm:
        raise UserError(
            f"--gradient_release true: --max_grad_norm {config.max_grad_norm:g} needs the norm of the whole gradient; "
            "pass --max_grad_norm 0"
        )
    for number, step in enumerate(islice(plan.sampler(groups), plan.num_steps), 1):
        if len(step.packs) > 1:
            tokens = sum(groups[i].num_tokens for i in step.groups)
            raise UserError(
                f"--gradient_release true: the gradients of step {number} are the sum over {len(step.packs)} packs; "
                f"pass --max_tokens_per_batch {tokens} or above, or fewer rows per step"
            )
