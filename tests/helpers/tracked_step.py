"""Peak memory of a training step as torch's memory tracker counts it, with real tensors or fake ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, PretrainedConfig

from dpo_fast.kernels import linear_logprob_torch
from dpo_fast.kernels.prefix_attention import PrefixLayout
from dpo_fast.model import policy as policy_module
from dpo_fast.model.attention import use_packed_attention
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import PackedBatch


class _Tracker(MemTracker):
    """Tells gradients from other tensors by no hook, since a frozen weight allows none; only the total is read."""

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        found: tuple[int, int] = super()._track_module_params_and_buffers(module, install_grad_hooks=False)
        return found


def tracked_peak(
    config: PretrainedConfig,
    batch: PackedBatch,
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: type[Optimizer] = torch.optim.AdamW,
    fake: bool = True,
    num_packs: int = 1,
    adapt: Any = None,
    trainable: dict[str, Any] | None = None,
    **of_policy: Any,
) -> int:
    """Bytes at the peak of the second step on a CPU, when the optimizer's state exists.

    Args:
        config: of the model, which has random weights.
        batch: the step's only pack, or every one of `num_packs`.
        dtype: of the weights.
        optimizer: its class.
        fake: use fake tensors, which take no memory and no time.
        num_packs: packs of the step.
        adapt: turns the model into the one to train, such as one with adapters.
        trainable: arguments of `Policy.set_trainable`.
        of_policy: fields of `Policy`.
    """
    with ExitStack() as stack:
        if fake:
            mode = stack.enter_context(FakeTensorMode())
            stack.enter_context(_fakeable(mode))
            batch = _faked(batch, mode)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        use_packed_attention(model)
        if adapt is not None:
            model = adapt(model)
        policy = Policy(model, torch.device("cpu"), **of_policy)
        policy.set_trainable(**trainable or {})
        steps = optimizer(p for p in model.parameters() if p.requires_grad)
        _step(policy, batch, steps, num_packs)
        tracker = _Tracker()
        tracker.track_external(model, steps)
        with tracker:
            _step(policy, batch, steps, num_packs, tracker)
        return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def _step(
    policy: Policy, batch: PackedBatch, optimizer: Optimizer, num_packs: int, tracker: MemTracker | None = None
) -> None:
    for _ in range(num_packs):
        policy.forward(batch).logps.sum().backward()
        if tracker is not None:
            tracker.reset_mod_stats()  # it follows a module through one forward only
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _faked(batch: PackedBatch, mode: FakeTensorMode) -> PackedBatch:
    """The pack on fake tensors, but for its bounds, whose values are read."""
    from dataclasses import fields, replace

    on_host = ("cu_seqlens_q", "cu_seqlens_k")
    values = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name not in on_host}
    return replace(batch, **{k: mode.from_tensor(v) for k, v in values.items() if isinstance(v, torch.Tensor)})


@contextmanager
def _fakeable(mode: FakeTensorMode) -> Iterator[None]:
    """Replace what reads values: the lengths of segments, and the rows of the head that are out of range."""
    real = policy_module.prefix_layout

    def layout(cu_seqlens_q: Any, cu_seqlens_k: Any, kv_index: Any, num_rows: int, **options: Any) -> PrefixLayout:
        with unset_fake_temporarily():
            lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
            bounds = mode.from_tensor(cu_seqlens_q.int()), mode.from_tensor(cu_seqlens_k.int())
        rows = real.__globals__["RowIndex"].of(kv_index, num_rows)
        return PrefixLayout(*lengths, rows, *bounds, **options)

    with (
        patch.object(policy_module, "prefix_layout", layout),
        patch.object(linear_logprob_torch, "_reanchor", lambda *_: torch.empty(0, dtype=torch.int64)),
    ):
        yield
