"""Models and tokenizers by name. Whatever is wrong with one is a line, not a traceback."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo_fast.errors import UserError
from dpo_fast.model.attention import use_packed_attention
from dpo_fast.model.finite import not_finite
from dpo_fast.model.source import check_weights_file, find, without_fetched_code

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("dpo_fast")
# Names of tensors in a message.
SHOWN_TENSORS = 3


def load_tokenizer(
    model: str, chat_template: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with `chat_template` (a file of Jinja) in place of its own if given.

    Raises:
        UserError: one of them cannot be read, or the tokenizer is code and `trust_remote_code` is false.
    """
    from transformers import AutoTokenizer

    source, extra = find(model)
    with one_line(model, "its tokenizer"):
        # Without a value transformers would ask on stdin whether to run a repository's code.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **extra)
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise UserError(f"--chat_template {chat_template}: {reason}") from error
    return tokenizer


def tokenizer_of(config: Any) -> PreTrainedTokenizerBase:
    """As `load_tokenizer`, from settings with `model`, `chat_template` and `trust_remote_code`."""
    return load_tokenizer(config.model, config.chat_template, trust_remote_code=config.trust_remote_code)


def load_config(model: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        UserError: it cannot be read, or is code and `trust_remote_code` is false.
    """
    from transformers import AutoConfig

    source, extra = find(model)
    with one_line(model, "its configuration"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **extra)
        return without_fetched_code(config)


def load_model(name: str, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a causal language model on the CPU, whole, without dropout, set to read packs.

    Raises:
        UserError: it cannot be loaded, lacks weights, or is of a kind that is not supported.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(name, trust_remote_code=trust_remote_code)
    _refuse_other_kinds(name, config)
    model, found = load_weights(AutoModelForCausalLM, name, config, dtype, trust_remote_code=trust_remote_code)
    refuse_missing(name, found["missing_keys"])
    if unused := found["unexpected_keys"]:
        logger.warning("%s: %d tensors of its file are not used: %s", name, len(unused), _named(unused))
    _disable_dropout(model)
    use_packed_attention(model)
    return model


def load_weights(
    kind: Any, name: str, config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool
) -> tuple[Any, dict[str, Any]]:
    """A model on the CPU, from safetensors or GGUF alone.

    Args:
        kind: transformers' automatic class.
        name: of the model.
        config: from `load_config`.
        dtype: of the weights.
        trust_remote_code: run code that comes with the model.

    Returns:
        The model, and transformers' account of its tensors (`missing_keys` and others).

    Raises:
        UserError: it cannot be loaded, is damaged or pickled.
    """
    from transformers import GgufConfig
    from transformers.utils.logging import disable_progress_bar

    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        disable_progress_bar()  # as for downloads: the command has a progress line of its own
    source, extra = find(name)
    check_weights_file(name, source)
    if extra:
        extra["quantization_config"] = GgufConfig(dequantize=True)
    with one_line(name, "its weights"):
        loaded: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if extra else True,
            output_loading_info=True,
            **extra,
        )
        return loaded


def refuse_missing(name: str, missing: Collection[str]) -> None:
    """Refuse a model whose file lacks tensors, which transformers would fill with random numbers.

    Raises:
        UserError: it names them.
    """
    if missing:
        raise UserError(
            f"--model {name}: its file lacks {len(missing)} tensors, which would be random: {_named(missing)}. Use a "
            "complete copy, and check num_hidden_layers and architectures in its config.json"
        )


def refuse_not_finite(name: str, model: nn.Module) -> None:
    """Refuse a model with weights that are not numbers.

    Raises:
        UserError: it names the tensors.
    """
    if bad := not_finite(model.named_parameters()):
        raise UserError(f"--model {name}: {len(bad)} tensors hold nan or infinity: {_named(bad)}. Use another copy")


@contextmanager
def one_line(name: str, part: str) -> Iterator[None]:
    """Turn whatever a library raises over a broken model into one line: there is no telling what that will be."""
    try:
        yield
    except Exception as error:
        text = str(error).strip()
        reason = text.splitlines()[0] if text else ""
        if "trust_remote_code" in text:
            reason = "it comes with code of its own, which is not run; pass --trust_remote_code true if you trust it"
        elif "ignore_mismatched_sizes" in text:
            reason = "its tensors have other shapes than its config.json says"
        elif not isinstance(error, OSError | ValueError | ImportError):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"--model {name}: cannot load {part}: {reason or type(error).__name__}") from error


def _named(tensors: Collection[str]) -> str:
    names = sorted(tensors)
    return ", ".join(names[:SHOWN_TENSORS]) + (", ..." if len(names) > SHOWN_TENSORS else "")


def _refuse_other_kinds(name: str, config: PretrainedConfig) -> None:
    """Of some encoder-decoders, transformers would load the decoder alone, which then answers to no prompt."""
    if config.is_encoder_decoder:
        raise UserError(
            f"--model {name}: {config.model_type} is an encoder-decoder, and prompts and answers are read as one "
            "sequence here; expected a causal language model (decoder only)"
        )
    text_config = config.get_text_config()
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        value = getattr(text_config, key, 1)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"--model {name}: its config.json has {key} {value!r}; expected a number above 0")
    quantization = getattr(config, "quantization_config", None)
    if quantization and not name.endswith(".gguf"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise UserError(
            f"--model {name}: its weights are quantized ({method}), and such weights cannot be trained or compared; "
            "expected the model in bfloat16 or float32"
        )


def _disable_dropout(model: nn.Module) -> None:
    """Preference losses compare with a reference without noise, so dropout is off in training, too (as in TRL)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # What is a plain number drops out in a function: of attention, of activations (OPT), of layers.
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)
