"""Adapters that peft writes."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def save_adapter(base: str, folder: Path, **settings: Any) -> Path:
    """An adapter of `base`, with weights that change every log-prob; `settings` are peft's."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(folder)
    return folder
