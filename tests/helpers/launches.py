"""How many kernels a function would launch on a GPU: its operators, without views and empty tensors."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNEL = {"aten::empty_like", "aten::empty.memory_format", "aten::new_empty", "aten::_unsafe_view"}


class _Counter(TorchDispatchMode):
    launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        self.launches += not is_view and func._schema.name not in NO_KERNEL
        return func(*args, **(kwargs or {}))


def launches(function, inputs, parameters=()):
    """Of the forward, and of the backward to inputs and parameters."""
    with _Counter() as forward:
        out = function(*inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    grads = [torch.ones_like(x) for x in outputs]
    with _Counter() as backward:
        torch.autograd.grad(outputs, [*inputs, *parameters], grads)
    return forward.launches, backward.launches
