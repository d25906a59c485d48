"""What options are called here that other trainers call otherwise, and what is not there yet."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

# Ours: names in TRL, transformers, axolotl, LLaMA-Factory, torchtune and OpenRLHF, and what people type.
_OTHER_NAMES = {
    "model": "model_name_or_path model_name base_model pretrain model_path policy_model",
    "ref_model": "ref_model_name_or_path reference_model ref_pretrain ref_model_path",
    "data": ("dataset_name dataset datasets data_path dataset_path train_file dataset_dir train_dataset data_files"),
    "eval_data": "eval_dataset validation_file eval_file val_dataset test_datasets",
    "eval_split": "val_size val_set_size validation_split test_split eval_size",
    "output_dir": "output out_dir output_path save_path save_dir checkpoint_dir",
    "out": "output output_path output_file out_file",
    "learning_rate": "lr actor_learning_rate peak_lr",
    "lr_scheduler_type": "lr_scheduler scheduler schedule",
    "warmup_steps": "warmup_ratio lr_warmup_ratio warmup num_warmup_steps",
    "optim": "optimizer",
    "adam_epsilon": "eps adam_eps",
    "weight_decay": "wd l2",
    "max_grad_norm": "max_norm clip_grad_norm gradient_clipping clip gradient_clip_val",
    "per_device_train_batch_size": (
        "batch_size bs micro_batch_size per_device_batch_size train_batch_size micro_train_batch_size"
    ),
    "gradient_accumulation_steps": "grad_accum gradient_accumulation accumulation_steps grad_accum_steps",
    "num_train_epochs": "epochs num_epochs max_epochs n_epochs",
    "max_steps": "steps num_steps max_train_steps max_steps_per_epoch",
    "loss_type": "loss pref_loss loss_fn rl objective",
    "beta": "pref_beta dpo_beta rl_beta kl_coef",
    "label_smoothing": "label_smoothing_factor dpo_label_smoothing",
    "max_length": (
        "max_len seq_len cutoff_len sequence_len max_seq_len max_seq_length max_prompt_length max_completion_length"
    ),
    "max_rows": "max_samples num_samples limit max_train_samples",
    "max_tokens_per_batch": "max_tokens token_budget packing_max_length",
    "dtype": "torch_dtype precision weight_dtype",
    "gradient_checkpointing": "grad_checkpoint checkpointing recompute activation_recompute",
    "resume": "resume_from_checkpoint load_checkpoint auto_resume_from_checkpoints",
    "overwrite": "overwrite_output_dir force",
    "save_steps": "save_every checkpoint_steps save_interval",
    "logging_steps": "log_every log_interval",
    "eval_steps": "eval_every eval_interval",
    "chat_template": "template tokenizer_chat_template chat_template_path",
    "apply_chat_template": "conversational use_chat_template",
    "seed": "random_seed random_state",
    "ld_alpha": "ld_dpo_alpha",
    "peft": "lora use_dora qlora finetuning_type train_type tuner_type use_lora",
    "lora_r": "lora_rank rank r",
    "lora_alpha": "alpha",
    "lora_target_modules": "lora_target target_modules lora_target_linear",
    "load_in_4bit": "quantization_bit bits",
    "adapter": "adapter_name_or_path lora_model_dir adapters lora_path",
}
_MEANINGS: dict[str, list[str]] = {}
for _ours, _others in _OTHER_NAMES.items():
    for _other in _others.split():
        _MEANINGS.setdefault(_other, []).append(_ours)

_ABSENT_NAMES = {
    "4-bit weights are here: --load_in_4bit true": "load_in_8bit",
    "this command is one process: for several GPUs use dpo_fast.integrations.trl.DPOTrainer, by DDP": (
        "deepspeed fsdp fsdp_config zero_stage ddp tensor_parallel nproc num_processes"
    ),
    "there are no trackers yet: metrics.jsonl holds all metrics, and dpo-fast report draws them": (
        "report_to run_name wandb_project use_wandb logging_dir"
    ),
    "packs have no padding and attention picks the fastest kernel, always; leave it out": (
        "packing sample_packing padding_free flash_attn attn_implementation use_liger_kernel"
    ),
}
_ABSENT = {name: reason for reason, names in _ABSENT_NAMES.items() for name in names.split()}


def described(names: Iterable[str], known: Collection[str]) -> str:
    """`--lr (here --learning_rate), --foo` for option names that a command does not know.

    Args:
        names: without dashes.
        known: those that it has.
    """
    return ", ".join(f"--{name}{_hint(name, known)}" for name in names)


def _hint(name: str, known: Collection[str]) -> str:
    if name in _ABSENT:
        return f" ({_ABSENT[name]})"
    if ours := [f"--{other}" for other in _MEANINGS.get(name, ()) if other in known]:
        return f" (here {' or '.join(ours)})"
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean --{near[0]}?)" if near else ""
