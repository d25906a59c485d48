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
from dpo_fast.model.adapter import merged, read_adapter
from dpo_fast.model.adapter_folder import adapter_folder, is_adapter
from dpo_fast.model.attention import use_packed_attention
from dpo_fast.model.finite import not_finite
from dpo_fast.model.quantize import FourBit, dequantize, keep_weights_fixed
from dpo_fast.model.source import check_weights_file, find, without_fetched_code

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("dpo_fast")
# Names of tensors in a message.
SHOWN_TENSORS = 3


def load_tokenizer(
    model: str, chat_template: str | None = None, *, base: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with `chat_template` (a file of Jinja) in place of its own if given.

    That of an adapter is in its folder or its base's; `base` is the latter if its configuration names another one.

    Raises:
        UserError: one of them cannot be read, or the tokenizer is code and `trust_remote_code` is false.
    """
    from transformers import AutoTokenizer

    source, extra = find(model, base)
    if (adapter := adapter_folder(model, base)) and adapter.has_tokenizer:
        source = str(adapter.path)
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
    """As `load_tokenizer`, from settings with `model`, `adapter_base`, `chat_template` and `trust_remote_code`.

    Raises:
        UserError: as there, or a base is given and `model` is no adapter.
    """
    if config.adapter_base is not None and not is_adapter(config.model):
        raise UserError(
            f"--adapter {config.model}: no folder with adapter_config.json in it; an adapter on the Hub has to be "
            "downloaded first: hf download NAME --local-dir FOLDER"
        )
    return load_tokenizer(
        config.model, config.chat_template, base=config.adapter_base, trust_remote_code=config.trust_remote_code
    )


def config_of(config: Any) -> PretrainedConfig:
    """As `load_config`, from settings with `model`, `adapter_base` and `trust_remote_code`."""
    return load_config(config.model, base=config.adapter_base, trust_remote_code=config.trust_remote_code)


def load_config(model: str, *, base: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration; that of an adapter's base.

    Raises:
        UserError: it cannot be read, or is code and `trust_remote_code` is false.
    """
    from transformers import AutoConfig

    source, extra = find(model, base)
    with one_line(model, "its configuration"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **extra)
        return without_fetched_code(config)


def load_model(
    name: str,
    dtype: torch.dtype,
    *,
    base: str | None = None,
    four_bit: FourBit | None = None,
    merge: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of `load_adapted`; `merge` adds an adapter to the weights, which are dequantised for it."""
    model, peft = load_adapted(
        *(name, dtype), base=base, four_bit=four_bit, as_plain=merge, trust_remote_code=trust_remote_code
    )
    if merge and peft is not None:
        model = merged(peft)
    return model


def load_adapted(
    name: str,
    dtype: torch.dtype,
    *,
    base: str | None = None,
    four_bit: FourBit | None = None,
    as_plain: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PeftModel | None]:
    """Load a causal language model, whole, without dropout, set to read packs; and peft's view of its adapter, if any.

    Args:
        name: a model, or the folder of an adapter.
        dtype: of the weights.
        base: base of the adapter, if not the one that its configuration names.
        four_bit: quantise the weights; otherwise the model lies on the CPU.
        as_plain: turn quantised weights back into `dtype`, on the CPU, rounded as they are.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: it cannot be loaded, lacks weights, or is of a kind that is not supported.
    """
    folder = adapter_folder(name, base)
    if folder is None:
        model = _load_plain(name, dtype, four_bit, trust_remote_code)
        return (dequantize(model, dtype) if four_bit and as_plain else model), None
    check_weights_file(name, str(folder.path))
    # An adapter of an adapter: the lower one is part of the weights that the upper one was trained on.
    is_stacked = is_adapter(folder.base)
    if is_stacked and four_bit is not None and not as_plain:
        raise UserError(f"--load_in_4bit true: {name} is an adapter of the adapter {folder.base}; merge one of them")
    model, below = load_adapted(
        *(folder.base, dtype), four_bit=four_bit, as_plain=as_plain, trust_remote_code=trust_remote_code
    )
    if below is not None:
        model = merged(below)
    return model, read_adapter(model, folder, f"--model {name}")


def _load_plain(name: str, dtype: torch.dtype, four_bit: FourBit | None, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    config = load_config(name, trust_remote_code=trust_remote_code)
    _refuse_other_kinds(name, config, four_bit)
    model, found = load_weights(
        AutoModelForCausalLM, name, config, dtype, four_bit=four_bit, trust_remote_code=trust_remote_code
    )
    keep_weights_fixed(model)
    refuse_missing(name, found["missing_keys"])
    if unused := found["unexpected_keys"]:
        logger.warning("%s: %d tensors of its file are not used: %s", name, len(unused), _named(unused))
    _disable_dropout(model)
    use_packed_attention(model)
    return model


def load_weights(
    kind: Any,
    name: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    four_bit: FourBit | None = None,
    trust_remote_code: bool,
) -> tuple[Any, dict[str, Any]]:
    """A model on the CPU, from safetensors or GGUF alone.

    Args:
        kind: transformers' automatic class.
        name: of the model.
        config: from `load_config`.
        dtype: of the weights.
        four_bit: quantise the weights, on its device.
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
    if is_adapter(name):
        raise UserError(f"--model {name}: an adapter, which is not read here; merge it into its base first")
    source, extra = find(name)
    check_weights_file(name, source)
    if four_bit is not None:
        if extra:
            raise UserError(f"--load_in_4bit true: {name} is quantised already; expected weights as safetensors")
        extra = {"device_map": {"": four_bit.device}}
        if not getattr(config, "quantization_config", None):
            extra["quantization_config"] = four_bit.config()
    elif extra:
        extra["quantization_config"] = GgufConfig(dequantize=True)
    with one_line(name, "its weights"):
        loaded: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if "gguf_file" in extra else True,
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


def _refuse_other_kinds(name: str, config: PretrainedConfig, four_bit: FourBit | None) -> None:
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
        if four_bit is not None and method == "bitsandbytes":
            return
        raise UserError(
            f"--model {name}: its weights are quantized ({method}), and such weights cannot be trained or compared; "
            "expected the model in bfloat16 or float32"
            + "; or train an adapter on them by --peft qlora"
            * (method == "bitsandbytes")
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
