"""Models and tokenizers by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from dpo_fast.model.attention import use_packed_attention


def _source(model: str) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a model: (path or Hub name, extra arguments)."""
    if not model:
        raise UserError("no model given: pass --model with a checkpoint folder, a Hub name or a .gguf file")
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--model {model}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    # A Hub name has one slash at most; everything else was meant as a folder.
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or model.startswith((".", "~"))):
        raise UserError(f"--model {model}: no such folder; expected a checkpoint folder, a Hub name or a .gguf file")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"--model {model}: the folder holds no config.json; expected a Hugging Face checkpoint folder")
    return model, {}


def load_tokenizer(model: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with `chat_template` (a file of Jinja) in place of its own if given."""
    from transformers import AutoTokenizer

    source, extra = _source(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--model {model}: cannot load its tokenizer: {_first_line(error)}") from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text()
        except OSError as error:
            raise UserError(f"--chat_template {chat_template}: {error.strerror}") from error
    return tokenizer


def load_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model on the CPU, without dropout, set to read packs."""
    from transformers import AutoModelForCausalLM, GgufConfig

    source, extra = _source(name)
    _refuse_encoder_decoder(name, source, extra)
    if extra:
        extra["quantization_config"] = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **extra)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--model {name}: cannot load it: {_first_line(error)}") from error
    _disable_dropout(model)
    use_packed_attention(model)
    return model


def _refuse_encoder_decoder(name: str, source: str, extra: dict[str, Any]) -> None:
    """Of some, transformers would load the decoder alone, which then answers to no prompt."""
    config = _load_config(name, source, extra)
    if config.is_encoder_decoder:
        raise UserError(
            f"--model {name}: {config.model_type} is an encoder-decoder, and prompts and answers are read as one "
            "sequence here; expected a causal language model (decoder only)"
        )


def load_config(name: str) -> PretrainedConfig:
    """A model's configuration alone."""
    return _load_config(name, *_source(name))


def _load_config(name: str, source: str, extra: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source, **extra)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--model {name}: cannot load it: {_first_line(error)}") from error
    return config


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _disable_dropout(model: nn.Module) -> None:
    """Preference losses compare with a reference without noise, so dropout is off in training, too (as in TRL)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # What is a plain number drops out in a function: of attention, of activations (OPT), of layers.
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)
