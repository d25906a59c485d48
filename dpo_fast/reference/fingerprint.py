"""A hash of everything in a model that can move a log-prob."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo_fast.model.sharding import whole

# Entries that say where a model came from or how it is run, not what it computes. Everything else counts, known or
# not: a needless rescoring is cheaper than a stale score. dtype and architecture are hashed with the weights.
_PROVENANCE = {
    *("_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype"),
    *("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping"),
}
# What an adapter's layers keep outside of configuration and weights.
_ADAPTER_STATE = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")


def model_fingerprint(model: nn.Module, *, numerics: str) -> str:
    """Hash of everything that can move a log-prob.

    Args:
        model: a transformers model, with or without a peft adapter, on any device.
        numerics: compute dtype and versions of attention and head.

    Returns:
        32 hexadecimal digits of xxh3_128.

    Raises:
        ValueError: a weight is on the meta device, so its bytes cannot be read.
    """
    digest = xxhash.xxh3_128()

    def add(*parts: object) -> None:
        digest.update(json.dumps(_plain(parts), sort_keys=True).encode() + b"\0")

    add(numerics, type(model).__name__.removeprefix("FSDP"))  # which torch puts before the name of a shared model
    config = getattr(model, "config", None)
    if config is not None:
        add(_without_provenance(config.to_dict()))
    for name, adapter in sorted(getattr(model, "peft_config", {}).items()):
        add(name, _without_provenance(adapter.to_dict()))
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters"):
            add(name, [getattr(module, attribute, None) for attribute in _ADAPTER_STATE])
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            raise ValueError(f"{name} has no data (meta device): load the model whole before it is hashed")
        add(name, str(tensor.dtype), tuple(tensor.shape))
        # A tied weight is the same view of the same memory; a transposed or sliced view is not.
        is_shared = isinstance(tensor, DTensor)  # whose part may be empty, and so may those of others
        view = (id(tensor) if is_shared else tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and view in seen:
            add("tied to", seen[view])
            continue
        seen[view] = name
        flat: Tensor = whole(tensor.detach()).cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(memoryview(flat.numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def _without_provenance(entries: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in entries.items() if key not in _PROVENANCE}


def _plain(value: object) -> object:
    """The value as JSON can hold it, the same in every process (sets have no order of their own)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)
