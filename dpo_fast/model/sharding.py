"""A model over several processes: torch's FSDP2, one unit a layer and one of what is left.

With `ddp` every process keeps whole weights and gradients are summed once per step; with `fsdp` each keeps its part of
weights, gradients and optimizer state, and a layer's weights are gathered when it runs. Both are one mechanism with
another mesh (`torch.distributed.fsdp.fully_shard`, hybrid sharding).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dpo_fast.errors import UserError

Parallel = Literal["ddp", "fsdp"]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers does not split over devices: the decoder's layers, if the model names them."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names]


def shard(model: Any, *, device: torch.device, parallel: Parallel, dtype: torch.dtype | None) -> None:
    """Spread a model's weights over the processes of the default group, in place.

    Embedding and head stay in one unit, so that tied weights stay tied, and are whole from the start of a forward to
    the end of its backward: the head reads its weight once per pack, in the dtype of the products.

    Args:
        model: a whole causal language model, the same in each process; on any device.
        device: of this process.
        parallel: what the processes share.
        dtype: of gathered weights; None is their own.

    Raises:
        UserError: the model does not name its layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(
            f"--parallel {parallel}: {type(model).__name__} does not name its layers, so several processes cannot "
            "share it; train it in one process"
        )
    world_size = dist.get_world_size()
    shape = (world_size, 1) if parallel == "ddp" else (1, world_size)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    plain_forward = model.forward

    @wraps(plain_forward)
    def forward(*args: Any, packed: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return plain_forward(*args, **kwargs) if packed is None else packed()

    # Hooks of the outermost unit run around the model's forward, so packs have to go through it.
    model.forward = forward
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    model.register_forward_hook(_part_again)


def _part_again(model: Any, inputs: Any, outputs: Any) -> None:
    """Torch leaves the outermost unit whole for the backward, which does not come after a forward without gradients.

    Whoever asked for the model's weights meanwhile would get others than those that are trained.
    """
    if not torch.is_grad_enabled():
        model.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; all of it if it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all parts; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights by name, on the host, in the first process; nothing in the others. All must ask for them.

    Of tied weights there is one.
    """
    names, every = ({name for name, _ in model.named_parameters(remove_duplicate=once)} for once in (True, False))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return {name: weight for name, weight in weights.items() if name not in every - names}
