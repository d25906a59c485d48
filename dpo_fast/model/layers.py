"""Fused layers: Liger's kernels for RMSNorm, rotary embeddings and gated MLPs, in place of transformers' own.

Each of these layers is a chain of elementwise operators, and each operator reads and writes the whole activation. One
kernel per layer reads its inputs and writes its result once. docs/measurements.md counts bytes and launches.

Liger patches a model's module of classes and functions for good, so that models loaded later would have its layers too,
on any device. Here only the given model changes: the module is restored, and the rotary embedding, a global function
that attention calls by name, is replaced in copies of the attention's own `forward`.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from importlib.util import find_spec
from types import FunctionType, MethodType, ModuleType
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dpo_fast.errors import UserError
from dpo_fast.model.check import length_thresholds, probe_groups, scores, worst_difference
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import Group

logger = logging.getLogger("dpo_fast")
# transformers' model types whose fused layers the tests compare with the plain ones.
DENSE = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "granite", "glm4"),
        *("gemma", "gemma2", "gemma3_text", "olmo2", "olmo3"),
    }
)
# Of mixtures of experts the MLPs stay plain: Liger's grouped products are no elementwise layer.
EXPERTS = frozenset({"mixtral", "qwen3_moe", "gpt_oss"})
ROTARY = "apply_rotary_pos_emb"


def with_fused_layers(policy: Policy, groups: list[Group], wanted: bool | Literal["auto"]) -> Policy:
    """The policy with fused layers, if they are wanted and give the log-probs of the plain ones.

    Args:
        policy: in the layout that it is used in, and not compiled; its model is changed in place.
        groups: rows to compare both on.
        wanted: `auto` takes fused layers where they are available, and plain ones with a warning if they differ.

    Raises:
        UserError: fused layers are wanted, and not available here or different.
    """
    if wanted is False:
        return policy
    reason = why_unavailable(policy)
    if not reason:
        fused, reason = _fuse(policy, groups)
        if not reason:
            return fused
        if wanted == "auto":
            logger.warning("fused layers are off: %s", reason)
    if wanted is True:
        raise UserError(f"--fused_layers true: {reason}; use --fused_layers auto")
    return policy


def why_unavailable(policy: Policy) -> str:
    """Why fused layers cannot be used; empty if they can be tried."""
    if policy.device.type != "cuda":
        return f"they are GPU kernels, and the model is on {policy.device}"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'dpo-fast[liger]')"
    model_type = _plain_model(policy.model).config.model_type
    return "" if model_type in DENSE | EXPERTS else f"not known for {model_type}"


def _fuse(policy: Policy, groups: list[Group]) -> tuple[Policy, str]:
    """The policy with fused layers, or the policy as it was and why."""
    probes = probe_groups(groups, length_thresholds(policy))
    plain = scores(policy, probes)
    before = {module: dict(vars(module)) for module in policy.model.modules()}
    try:
        # Frequencies that depend on the length of a row have only been tried with transformers' own rotation.
        parts = fuse_layers(policy.model, rotary=policy.length_regimes is None)
        difference, row = worst_difference(scores(policy, probes), plain, probes)
        if difference <= policy.noise:
            return replace(policy, layers=parts), ""
        reason = f"row {row} differs by {difference:.2g} nats, expected at most {policy.noise:g}"
    except Exception as error:  # whatever a GPU's compiler raises over another library's kernels
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    for module, attributes in before.items():
        vars(module).clear()
        vars(module).update(attributes)
    return policy, reason


def fuse_layers(model: Any, *, rotary: bool = True) -> str:
    """Put Liger's layers into a model, and into no other; its loss stays transformers'.

    Args:
        model: of a type in `DENSE` or `EXPERTS`, with or without an adapter.
        rotary: fuse the rotary embedding as well.

    Returns:
        What was done, for the reference store's keys: Liger's version, and whether rotary embeddings are fused.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    plain = _plain_model(model)
    model_type = plain.config.model_type
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    if model_type in EXPERTS:
        off["swiglu"] = False
    if not rotary:
        off["rope"] = False
    modeling = sys.modules[type(plain).__module__]
    own_rotation: Any = vars(modeling).get(ROTARY)
    with _restored(modeling):
        apply(model=plain, **off)
        rotation: Any = vars(modeling).get(ROTARY)
    fuses_rotation = rotation is not own_rotation
    if fuses_rotation:
        _replace_rotation(plain, modeling, _of_copies(rotation))
    return f"liger {importlib.metadata.version('liger-kernel')}{' rotary' * fuses_rotation}"


def _plain_model(model: Any) -> Any:
    """The transformers model inside an adapter's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _restored(modeling: ModuleType) -> Iterator[None]:
    """The module's globals are afterwards what they were before."""
    before = dict(vars(modeling))
    try:
        yield
    finally:
        for name, value in list(vars(modeling).items()):
            if name not in before:
                delattr(modeling, name)
            elif value is not before[name]:
                setattr(modeling, name, before[name])


def _replace_rotation(model: nn.Module, modeling: ModuleType, rotation: Callable[..., Any]) -> None:
    """Let the model's own modules call `rotation`, by a copy of their `forward` with other globals."""
    for module in model.modules():
        forward: Any = inspect.unwrap(type(module).forward)
        if forward.__globals__ is vars(modeling) and ROTARY in forward.__code__.co_names:
            names = {**forward.__globals__, ROTARY: rotation}
            copied = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
            copied.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(copied, module)


def _of_copies(rotation: Callable[..., Any]) -> Callable[..., Any]:
    """Rotate copies where results of operators are being kept.

    Liger rotates in place, in the memory of the projections' results. Selective checkpointing keeps these for the
    backward, which would rotate them once more.
    """

    @wraps(rotation)
    def rotated(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_in_torch_dispatch_mode(include_infra_modes=False):
            q, k = q.clone(), k.clone()
        return rotation(q, k, *args, **kwargs)

    return rotated
