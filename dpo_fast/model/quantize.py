"""4-bit weights: bitsandbytes' NF4 with double quantisation, as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo_fast.config import ModelConfig
from dpo_fast.errors import UserError
from dpo_fast.model.placement import Placement

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


@dataclass(frozen=True)
class FourBit:
    """Quantise linear layers to NF4 while loading; the head and embeddings keep their dtype.

    Attributes:
        device: to quantise on and to stay on.
        compute_dtype: of the products with dequantised weights.
    """

    device: torch.device
    compute_dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig) -> FourBit | None:
        """What the settings ask for; None for ordinary weights."""
        if not config.load_in_4bit:
            return None
        place = Placement.of(config)
        return cls(place.device, place.compute_dtype)

    def config(self) -> BitsAndBytesConfig:
        """What transformers loads by.

        Raises:
            UserError: bitsandbytes is not installed.
        """
        from transformers import BitsAndBytesConfig

        if find_spec("bitsandbytes") is None:
            raise UserError("--load_in_4bit true: bitsandbytes is not installed; pip install bitsandbytes")
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.compute_dtype,
        )


def dequantize(model: Any, dtype: torch.dtype) -> Any:
    """The model on the CPU with ordinary weights, rounded as the 4-bit ones are.

    transformers' own `dequantize` stays on the device, which need not have room for it.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            with torch.device("meta"):
                linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            quantized: Any = module.weight
            weight = dequantize_4bit(quantized.data, quantized.quant_state)
            linear.weight = nn.Parameter(weight.to("cpu", dtype))
            linear.bias = None if module.bias is None else nn.Parameter(module.bias.detach().to("cpu", dtype))
            model.set_submodule(name, linear)
    model.hf_quantizer.remove_quantization_config(model)
    return model.to(device="cpu", dtype=dtype)


def keep_weights_fixed(model: Any) -> None:
    """Keep bitsandbytes from repacking weights on a CPU.

    On CPUs with AVX-512 BF16 its layers repack themselves in the first forward without gradients, with scales in bf16:
    the weights of training and of scoring would differ.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
