"""What an optimizer sees of a model that processes share: the part of each weight that this process holds.

Optimizers with kernels of their own know no DTensors, and none of them needs more than its part: Adam's step of a
number depends on that number alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo_fast.model.sharding import local
from dpo_fast.ranks import Ranks


class OwnWeights:
    """The trainable weights of a model as plain parameters, which share memory with its own.

    Attributes:
        parameters: one for each trainable weight of the model, in its order; the weight itself if it is whole.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take a model whose weights stay where they are."""
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.parameters = [
            nn.Parameter(local(weight.detach())) if isinstance(weight, DTensor) else weight for weight in self._weights
        ]

    def sum_gradients(self, ranks: Ranks) -> None:
        """Average the gradients of weights that are whole in each process, as FSDP2 does with those that it shares.

        Those of an adapter are small enough to go as one tensor.
        """
        found = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if ranks.world_size == 1 or not found:
            return
        total = ranks.sum(torch.cat([gradient.flatten().float() for gradient in found])) / ranks.world_size
        parts = total.split([gradient.numel() for gradient in found])
        for gradient, part in zip(found, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def take_gradients(self) -> None:
        """Give each parameter its part of the gradient; one of which this process holds nothing has none."""
        for weight, parameter in zip(self._weights, self.parameters, strict=True):
            if parameter is not weight:
                parameter.grad = local(weight.grad) if weight.grad is not None and parameter.numel() else None

    def drop_gradients(self) -> None:
        """Free all gradients."""
        for tensor in (*self._weights, *self.parameters):
            tensor.grad = None


def own_part(whole: Tensor, like: nn.Parameter, ranks: Ranks) -> Tensor:
    """The part of a whole tensor that this process holds of it under FSDP2: rows of the first dimension.

    Args:
        whole: the tensor.
        like: this process's part of a weight of that shape.
        ranks: the processes that share it.
    """
    if ranks.world_size == 1:
        return whole
    size = -(-whole.shape[0] // ranks.world_size)
    part = whole[ranks.rank * size : (ranks.rank + 1) * size]
    assert part.shape == like.shape, "FSDP2 cuts tensors as torch.chunk does"
    return part
