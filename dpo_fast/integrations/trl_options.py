"""What TRL's options mean here, and which of them are refused."""

from __future__ import annotations

import copy
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.dpo_config import DPOConfig

from dpo_fast.config import LossConfig
from dpo_fast.integrations import TRL_VERSION, is_trl_of_our_version
from dpo_fast.integrations.arguments import loss_settings

if not is_trl_of_our_version():
    raise ImportError(f"dpo_fast.integrations.trl is written for TRL {TRL_VERSION}: pip install trl=={TRL_VERSION}.*")


def refuse_unsupported(args: DPOConfig, arguments: dict[str, Any]) -> None:
    """Raise for what would otherwise be ignored; docs/drop_in.md has all options.

    Args:
        args: the configuration.
        arguments: those of the trainer's constructor, by name.

    Raises:
        NotImplementedError: it names the option, and says why or what to use.
        ValueError: as TRL, for streams that are to be scored beforehand.
    """
    if args.precompute_ref_log_probs:
        for name in ("train_dataset", "eval_dataset"):
            if any(isinstance(part, IterableDataset) for part in parts_of(arguments[name])):
                raise ValueError(
                    f"{name}: precompute_ref_log_probs=True cannot score a stream beforehand; leave it out, and rows "
                    "are scored as they come"
                )
    for name, reason in refusals(args, arguments).items():
        if reason:
            raise NotImplementedError(f"{name} is not supported by dpo_fast.integrations.trl.DPOTrainer: {reason}")


def refusals(args: DPOConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """Each option that can be refused, and why it is; something false where it is not. Arguments as there."""
    return {
        "data_collator": arguments["data_collator"] is not None and "packs have their own collator",
        "processing_class": _refused_tokenizer(arguments["processing_class"]),
        "peft_config": _refused_adapter(arguments["peft_config"]),
        "model": _refused_adapter(getattr(arguments["model"], "active_peft_config", None)),
        "truncation_mode": args.truncation_mode != "keep_start"
        and "with 'keep_end' the answers of a pair would not have one prompt; use 'keep_start'",
        "pad_to_multiple_of": args.pad_to_multiple_of not in (None, "auto") and "nothing is padded; leave it out",
        "disable_dropout": not args.disable_dropout and "packed attention has no dropout; leave it on",
        "fp16": args.fp16 and "use bf16, which needs no loss scaling",
        "fp16_full_eval": args.fp16_full_eval and "use bf16_full_eval",
        "neftune_noise_alpha": args.neftune_noise_alpha and "its noise would depend on what else is in a pack",
        "use_liger_kernel": args.use_liger_kernel and "it replaces forwards that packs go through; leave it out",
        "activation_offloading": args.activation_offloading and "use gradient_checkpointing",
        "torch_compile": args.torch_compile and "it would compile anew for packs of every size; leave it out",
        "fsdp": bool(args.fsdp) and "use single processes or DDP",
        "deepspeed": bool(args.deepspeed) and "use single processes or DDP",
        "parallelism_config": args.parallelism_config is not None and "a pack is not split over devices",
    }


def parts_of(given: Any) -> list[Any]:
    """The datasets of an argument, which may be one, none, or several by name."""
    return list(given.values()) if isinstance(given, dict) else [] if given is None else [given]


def _refused_tokenizer(given: Any) -> str | None:
    if given is None or isinstance(given, PreTrainedTokenizerBase):
        return None
    return f"expected a tokenizer, got {type(given).__name__}; there are no packs of images"


def _refused_adapter(given: Any) -> str | None:
    if getattr(given, "is_prompt_learning", False):
        return "virtual tokens have no place in a pack; use LoRA or another adapter of weights"
    return None


def with_stored_reference(args: DPOConfig) -> DPOConfig:
    """A copy in which the reference is scored beforehand, unless it moves."""
    # `dataclasses.replace` would run the checks of the first construction again, on what they have changed.
    args = copy.copy(args)
    args.precompute_ref_log_probs = not args.sync_ref_model
    return args


def loss_config(args: DPOConfig) -> LossConfig:
    """TRL's settings of the loss as ours; its `sft` is the mean over all chosen tokens of a batch.

    Raises:
        ValueError: a value out of range, or an option that the losses do not read.
    """
    return loss_settings(
        loss_type=["sft_tokens" if name == "sft" else name for name in args.loss_type],
        loss_weights=args.loss_weights,
        beta=args.beta,
        label_smoothing=args.label_smoothing,
        f_divergence_type=args.f_divergence_type,
        f_alpha_divergence_coef=args.f_alpha_divergence_coef,
        discopop_tau=args.discopop_tau,
        ld_alpha=args.ld_alpha,
        use_weighting=args.use_weighting,
    )
