"""What `--model` names: a checkpoint folder, a Hub name or a .gguf file, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_fast.errors import UserError
from dpo_fast.files import MANIFEST, verify_folder
from dpo_fast.model.adapter_folder import adapter_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Settings of a configuration that name code to fetch, as in "org/kernel".
_IMPLEMENTATIONS = ("_attn_implementation_internal", "_experts_implementation_internal")


def find(model: str, base: str | None = None, *, option: str = "--model") -> tuple[str, dict[str, Any]]:
    """Where transformers finds the model that an option names: its path or Hub name, and further arguments.

    Args:
        model: what the option names; of an adapter, the model beneath it is found.
        base: base of an adapter, if not the one that its configuration names.
        option: for messages.

    Raises:
        UserError: there is nothing, or something else than a model.
    """
    if not model:
        raise UserError("no model given: pass --model with a checkpoint folder, a Hub name or a .gguf file")
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{option} {model}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    # A Hub name has one slash at most; everything else was meant as a folder.
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or model.startswith((".", "~"))):
        raise UserError(f"{option} {model}: no such folder; expected a checkpoint folder, a Hub name or a .gguf file")
    if path.is_file():
        raise UserError(f"{option} {model}: a file; expected a checkpoint folder, a Hub name or a .gguf file")
    if adapter := adapter_folder(model, base, option=option):
        return find(adapter.base, option=f"{option} {model}: its base")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{option} {model}: the folder holds no config.json and no adapter_config.json; expected a Hugging Face "
            "checkpoint folder or an adapter's folder"
        )
    return model, {}


def check_weights_file(model: str, source: str) -> None:
    """Refuse a folder whose files are not those that were saved, or whose weights are pickled.

    Raises:
        UserError: it names the files.
    """
    path = Path(source)
    if not path.is_dir():
        return
    manifest = path / MANIFEST
    # Other tools may use the name.
    is_ours = manifest.is_file() and "xxh3_128" in manifest.read_text(errors="replace")
    if is_ours and (problems := verify_folder(path)):
        raise UserError(
            f"--model {model}: damaged since it was saved: {'; '.join(problems[:3])}. Use another copy or an earlier "
            f"checkpoint; if you changed the files on purpose, remove {manifest}"
        )
    names = {file.name for file in path.iterdir()}
    has_safetensors = any(name.endswith((".safetensors", ".safetensors.index.json", ".gguf")) for name in names)
    if not has_safetensors and (pickled := sorted(name for name in names if name.startswith("pytorch_model"))):
        raise UserError(
            f"--model {model}: its weights are pickled ({pickled[0]}), and a pickle can run any code, so it is not "
            "read. Convert them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )


def without_fetched_code(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration, but for implementations of attention or experts that would be fetched from the Hub.

    Attention is our own in packs, and transformers' otherwise.
    """
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        for name in _IMPLEMENTATIONS:
            if "/" in str(getattr(part, name, None)):
                setattr(part, name, None)
    return config
