"""What a folder of an adapter holds, read without peft: its configuration, its base, its files."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_fast.errors import UserError

logger = logging.getLogger("dpo_fast")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLED_WEIGHTS = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk.

    Attributes:
        path: folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: model that it belongs to: a folder, a Hub name, a .gguf file, or another adapter's folder.
        settings: its configuration.
    """

    path: Path
    base: str
    settings: dict[str, Any]

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has a tokenizer; otherwise its base's applies."""
        return any((self.path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def is_adapter(model: str) -> bool:
    """Whether a model's name is the folder of an adapter."""
    return bool(model) and _locate(Path(model)) is not None


def adapter_folder(model: str, base: str | None = None, *, option: str = "--model") -> AdapterFolder | None:
    """The adapter that an option names; None if it names something else.

    Args:
        model: what the option names.
        base: its base, if not the one that its configuration names.
        option: for messages.

    Raises:
        UserError: its configuration cannot be read, its kind is not supported, its weights are pickled or missing.
    """
    if (path := _locate(Path(model))) is None:
        return None
    named = f"{option} {model}"
    try:
        settings = json.loads((path / ADAPTER_CONFIG).read_bytes())
        kind = settings.get("peft_type")
        own_base = settings.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{named}: cannot read {path / ADAPTER_CONFIG}: {error}") from error
    if kind != "LORA":
        raise UserError(f"{named}: an adapter of type {kind}; expected LORA (LoRA, DoRA, QLoRA)")
    if not (path / ADAPTER_WEIGHTS).is_file():
        pickled = (path / _PICKLED_WEIGHTS).is_file()
        raise UserError(
            f"{named}: its weights are pickled ({_PICKLED_WEIGHTS}), and a pickle can run any code, so it is not read. "
            "Convert them: peft.PeftModel.from_pretrained(BASE_MODEL, FOLDER).save_pretrained(NEW_FOLDER)"
            if pickled
            else f"{named}: the folder has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; use a complete copy"
        )
    if base is None and not isinstance(own_base, str):
        raise UserError(f"{named}: {ADAPTER_CONFIG} names no base model; pass --model BASE --adapter {model}")
    if base is not None and own_base and Path(base).name != Path(str(own_base)).name:
        logger.warning("%s: the adapter was trained on %s and is used on %s", named, own_base, base)
    if base is None and _is_missing(str(own_base)):
        raise UserError(
            f"{named}: an adapter of {own_base}, which is not on this machine; pass --model BASE --adapter {model}"
        )
    if (below := _locate(Path(base or str(own_base)))) and is_adapter(_base_named_in(below)):
        raise UserError(f"{named}: an adapter of an adapter of an adapter, or of itself; merge the lower ones")
    if path != Path(model):
        logger.info("%s: reading the adapter in %s", named, path.name)
    return AdapterFolder(path, base or str(own_base), settings)


def _locate(path: Path) -> Path | None:
    """The folder with the adapter's files: `path` itself, or its newest checkpoint if it holds nothing else."""
    if not path.is_dir():
        return None
    if any(next(path.glob(pattern), None) for pattern in ("model*.safetensors*", "pytorch_model*", "*.gguf")):
        return None
    if (path / ADAPTER_CONFIG).is_file():
        return path
    if (path / "config.json").is_file():
        return None
    steps = {
        int(step): entry
        for entry in path.glob("checkpoint-*")
        if (step := entry.name.removeprefix("checkpoint-")).isdecimal() and (entry / ADAPTER_CONFIG).is_file()
    }
    return steps[max(steps)] if steps else None


def _base_named_in(folder: Path) -> str:
    """The base in an adapter's configuration; empty if there is none."""
    try:
        return str(json.loads((folder / ADAPTER_CONFIG).read_bytes())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _is_missing(base: str) -> bool:
    """Whether a base can only have been a path, and is not there."""
    path = Path(base)
    return not path.exists() and (path.is_absolute() or len(path.parts) > 2 or base.startswith((".", "~")))
