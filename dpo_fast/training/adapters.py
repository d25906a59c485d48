"""Training an adapter: what it starts from, what it is compared with, and what is written at the end.

The weights beneath the new adapter are frozen, and they are the reference: it is scored before the adapter is put on,
under the fingerprint of those weights, so all adapters of one base share its scores.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from dpo_fast.config import DPOConfig
from dpo_fast.console import say
from dpo_fast.errors import UserError
from dpo_fast.files import write_folder_atomically
from dpo_fast.losses.objective import any_loss
from dpo_fast.model.adapter import TRAINED, Adapter, attach, require_peft
from dpo_fast.model.adapter_folder import AdapterFolder, adapter_folder
from dpo_fast.model.adapter_join import why_not_plain
from dpo_fast.model.load import load_model
from dpo_fast.model.policy import Policy
from dpo_fast.model.precision import saved_dtype
from dpo_fast.model.quantize import FourBit
from dpo_fast.reference.fingerprint import model_fingerprint
from dpo_fast.training.run_folder import MERGED_FOLDER

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase


def is_adapted(config: DPOConfig) -> bool:
    """Whether an adapter is trained, not the weights."""
    return config.peft != "none"


def check_adapter(config: DPOConfig) -> None:
    """Refuse adapters that cannot be trained.

    Raises:
        UserError: it names the option and the cure.
    """
    if not is_adapted(config):
        if config.load_in_4bit:
            raise UserError("--load_in_4bit true: 4-bit weights cannot be trained; add --peft qlora")
        if config.merge_final:
            raise UserError("--merge_final true: no adapter is trained; add --peft lora, or leave it out")
        return
    require_peft(f"--peft {config.peft}")
    if config.parallel == "fsdp":
        raise UserError(
            f"--parallel fsdp: under --peft {config.peft} frozen weights are whole in each process; pass auto or ddp"
        )
    if config.sync_ref_model:
        raise UserError(f"--sync_ref_model true: the reference under --peft {config.peft} is frozen; leave one out")
    if config.lora_dropout and any_loss(config, lambda facts: facts.compares_pairs):
        raise UserError(
            f"--lora_dropout {config.lora_dropout:g}: --loss_type {config.loss_type} computes packs twice, and dropout "
            "would differ; pass --lora_dropout 0"
        )
    if "lm_head" in _targets(config) and (config.lora_dropout or config.peft == "dora"):
        raise UserError(
            "--lora_target_modules: lm_head takes a plain LoRA; pass --lora_dropout 0 and --peft lora, or leave it out"
        )
    if (below := adapter_folder(config.model, config.adapter_base)) and (reason := _why_not_joined(config, below)):
        if keeps_sft_adapter(config):
            raise UserError(
                f"--model {config.model}: {reason}, so a second adapter cannot be kept on top of it; pass "
                "--sft_adapter merge" + " without 4-bit weights" * config.load_in_4bit
            )
        if not config.merge_final:
            raise UserError(
                f"--model {config.model}: {reason}, so what is trained on top of it is no adapter of {below.base}; "
                "pass --merge_final true"
            )


def keeps_sft_adapter(config: DPOConfig) -> bool:
    """Whether the adapter that `model` names stays beneath the new one; merging into 4-bit weights would round it."""
    if config.sft_adapter == "merge" and config.load_in_4bit:
        raise UserError("--sft_adapter merge: 4-bit weights would round it; pass --sft_adapter keep, or --peft lora")
    return is_adapted(config) and (config.load_in_4bit or config.sft_adapter == "keep")


def merges_on_load(config: DPOConfig) -> bool:
    """Whether an adapter that a model's name means is added to the weights before training."""
    return not keeps_sft_adapter(config)


def describe_start(config: DPOConfig) -> str:
    """What becomes of the adapter that `model` names; empty if it names none."""
    if (below := adapter_folder(config.model, config.adapter_base)) is None:
        return ""
    how = "merged into the weights" if merges_on_load(config) else "kept beneath the new adapter"
    reference = "" if config.ref_model else f"; with it, {below.base} is the reference"
    return f"the adapter {config.model} is {how}{reference}"


def start_adapter(
    config: DPOConfig, policy: Policy, fingerprint: str, checkpoint: Path | None, console: Console
) -> Policy:
    """The policy with a new adapter, or with that of a checkpoint; everything else in it is frozen.

    Args:
        config: of the run.
        policy: to adapt.
        fingerprint: of its weights, which checkpoints repeat.
        checkpoint: to restore the adapter from.
        console: for output.

    Raises:
        UserError: the adapter does not fit the model, or the checkpoint.
    """
    below = adapter_folder(config.model, config.adapter_base)
    base, joined = config.model, None
    if below is not None and not _why_not_joined(config, below):
        base, joined = below.base, below
    peft = attach(policy.model, lora_settings(config), beneath=policy.adapter.peft if policy.adapter else None)
    adapter = Adapter(peft, TRAINED, base=base, below=joined, base_fingerprint=fingerprint, card=card(config, base))
    if checkpoint is not None:
        try:
            adapter.restore(checkpoint)
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"--resume {checkpoint}: its adapter does not fit this run: {error}") from error
    weights = adapter.weights().values()
    trained, whole = sum(x.numel() for x in weights), sum(x.numel() for x in policy.model.parameters())
    say(console, f"adapter: {config.peft}, rank {config.lora_r}, {trained:,} numbers ({trained / whole:.2%} of all)")
    return replace(policy, adapter=adapter)


def lora_settings(config: DPOConfig) -> LoraConfig:
    """peft's settings of the adapter to train."""
    from peft import LoraConfig

    targets = _targets(config)
    alpha = int(config.lora_alpha) if float(config.lora_alpha).is_integer() else config.lora_alpha
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        use_dora=config.peft == "dora",
        task_type="CAUSAL_LM",
    )


def base_fingerprint(policy: Policy) -> str:
    """The hash of the frozen weights, before an adapter is put on them."""
    return model_fingerprint(policy.model, numerics=policy.numerics)


def check_base(state: dict[str, Any], found: str, config: DPOConfig) -> None:
    """Refuse to resume an adapter on other weights than those that it was trained on.

    Raises:
        UserError: it names the model.
    """
    if state.get("base") != found:
        raise UserError(
            f"--resume: --model {config.model} is not the base that the adapter was trained on (other weights, "
            "configuration or dtype). Pass that one, or start another run in another --output_dir"
        )


def write_merged(config: DPOConfig, adapter: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write the model with its adapter added to its weights, as a Hugging Face folder next to `adapter`.

    Weights are added in fp32 on the CPU; those of QLoRA to the dequantised base, which is what it was trained on.

    Returns:
        What was written, as a sentence.

    Raises:
        WriteError: it cannot be written.
    """
    options: dict[str, Any] = {"four_bit": FourBit.of(config), "trust_remote_code": config.trust_remote_code}
    model = load_model(str(adapter), torch.float32, merge=True, **options)
    below = adapter_folder(str(adapter))
    assert below is not None, "it was just written"
    saved = saved_dtype(model.state_dict(), below.base, config.save_dtype, **options)
    policy = Policy(model, device=torch.device("cpu"))
    path = write_folder_atomically(
        adapter.with_name(MERGED_FOLDER), lambda folder: policy.save(folder, tokenizer, saved.dtype)
    )
    what = f"{below.base} dequantised from 4 bits" if config.load_in_4bit else below.base
    return f"merged model: {path} (the adapter added to {what})" + (f"; {saved.reason}" if saved.reason else "")


def card(config: DPOConfig, base: str) -> str:
    """README of an adapter's folder, with the header that the Hub reads."""
    kind = {"lora": "LoRA", "dora": "DoRA", "qlora": "LoRA on 4-bit weights (NF4, double quantisation)"}[config.peft]
    loss = config.loss_type if isinstance(config.loss_type, str) else ", ".join(config.loss_type)
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [dpo-fast, dpo, lora]
---

# Adapter of {base}

{kind}, rank {config.lora_r}, alpha {config.lora_alpha:g}, trained on preferences by dpo-fast.

| setting | value |
|---|---|
| started from | {config.model} |
| data | {config.data} |
| loss | {loss}, beta {config.beta:g} |
| learning rate | {config.learning_rate:g} |
| layers | {", ".join(_targets(config))} |

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "FOLDER")
```
"""


def _targets(config: DPOConfig) -> list[str]:
    names = config.lora_target_modules
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)


def _why_not_joined(config: DPOConfig, below: AdapterFolder) -> str:
    """Why the sum of an adapter and the one that is trained on top of it is no plain adapter; empty if it is one."""
    if config.peft == "dora":
        return "DoRA scales the weights beneath it"
    entry = why_not_plain(below.settings)
    return f"its {entry} is not that of a plain LoRA" if entry else ""
