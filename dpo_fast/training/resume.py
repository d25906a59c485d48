"""What a run may resume with: which settings may change, and whether rows and state are those that it began with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from enum import Enum
from typing import Any

import numpy as np
import torch
import xxhash
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dpo_fast.config import DPOConfig
from dpo_fast.errors import UserError
from dpo_fast.losses.objective import loss_names, needs_reference
from dpo_fast.packs.layout import Group


class Rule(Enum):
    """Whether a setting may change when a run is resumed."""

    USED = "the new value counts from the next step on"
    FIXED = "may not change"
    ROWS = "may change while the rows, as token ids with their labels, stay the same"
    REFERENCE = "may change while the reference stays the same"
    UNSAID = "how to start or where to write, not what to train"


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            *("data", "prompt_column", "chosen_column", "rejected_column", "responses_column", "scores_column"),
            *("weight_column", "margin_column", "gold_column", "tools_column", "system_column", "chat_template"),
            *("chat_template_kwargs", "chat_template_kwargs_column", "apply_chat_template", "max_rows", "strict"),
        ),
        Rule.ROWS,
    ),
    **dict.fromkeys(
        ("pairs", "min_score_gap", "train_on", "keep_reasoning", "max_length", "truncation_mode", "eval_split"),
        Rule.FIXED,
    ),
    **dict.fromkeys(("model", "ref_model"), Rule.REFERENCE),
    **dict.fromkeys(("dtype", "bf16", "sync_ref_model", "loss_type"), Rule.FIXED),
    **dict.fromkeys(
        (
            "peft",
            "use_peft",
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
            "load_in_4bit",
            "sft_adapter",
        ),
        Rule.FIXED,
    ),
    **dict.fromkeys(
        ("max_tokens_per_batch", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"), Rule.FIXED
    ),
    **dict.fromkeys(
        (
            *("device", "head_memory_budget_gib", "autotune", "deterministic_attention", "reference_store"),
            "fused_layers",
            *("loss_weights", "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef"),
            *("discopop_tau", "dpop_lambda", "simpo_gamma", "alphapo_alpha", "tpo_alpha", "score_scale"),
            *("desirable_weight", "undesirable_weight", "ld_alpha", "use_weighting"),
            *("ref_model_sync_steps", "ref_model_mixup_alpha", "eval_data", "eval_steps"),
            *("optim", "gradient_release", "checkpointing_policy", "activation_offloading"),
            *("learning_rate", "lr_scheduler_type", "warmup_steps", "adam_beta1", "adam_beta2"),
            *("adam_epsilon", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps", "torch_compile"),
            *("static_shapes", "gradient_checkpointing", "activation_checkpointing", "logging_steps", "save_steps"),
            *("save_total_limit",),
        ),
        Rule.USED,
    ),
    **dict.fromkeys(
        (
            *("output_dir", "save_dtype", "merge_final", "trust_remote_code", "resume", "overwrite", "dry_run"),
            *("nproc", "parallel"),
            # The weights beneath an adapter are compared instead.
            *("adapter", "adapter_base"),
        ),
        Rule.UNSAID,
    ),
}

Changes = Mapping[str, tuple[Any, Any]]


def settings_text(config: DPOConfig) -> str:
    """The settings as JSON, for a checkpoint's state."""
    return json.dumps(asdict(config), default=str)


def changed_settings(text: str, config: DPOConfig) -> Changes:
    """(old, new) of each setting that differs from those in `text`, by name; one that is unknown there was its default.

    Raises:
        UserError: the text is damaged, or a setting differs that may not; the message has both values of each.
    """
    try:
        old = {field.name: field.default for field in fields(DPOConfig)} | json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError("--resume: the checkpoint's settings are damaged; resume from another one") from error
    new = json.loads(settings_text(config))
    changes = {name: (old[name], new[name]) for name in new if old[name] != new[name]}
    before = DPOConfig(**{name: old[name] for name in new})
    refused = [name for name in changes if RULES[name] is Rule.FIXED and not _is_equivalent(name, before, config)]
    if refused:
        raise UserError(
            f"--resume: {described(changes, refused)}: may not change in a run. Resume with the old values, or start "
            "another run in another --output_dir"
        )
    return changes


def described(changes: Changes, names: Sequence[str]) -> str:
    """`--beta 0.2, was 0.1; ...` for those of `names` that changed."""
    return "; ".join(
        f"--{name} {_shown(new)}, was {_shown(old)}" for name, (old, new) in changes.items() if name in names
    )


def used_changes(changes: Changes) -> str:
    """Those that the run takes over, as a line of text; empty if there are none."""
    return described(changes, [name for name in changes if RULES[name] is not Rule.UNSAID])


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def _is_equivalent(name: str, old: DPOConfig, new: DPOConfig) -> bool:
    """Whether two values of a fixed setting need the same state; the old one may be damaged."""
    try:
        return name == "loss_type" and _loss_state(old) == _loss_state(new)
    except (KeyError, TypeError, ValueError):
        return False


def _loss_state(config: DPOConfig) -> tuple[bool, bool]:
    """What a loss keeps from step to step: a reference, a reward shift."""
    return needs_reference(config), "bco" in loss_names(config)


def rows_fingerprint(groups: Sequence[Group]) -> str:
    """xxh3_128 of everything in the rows that moves a loss: tokens, masks, pairs, scores, weights, and their order."""
    digest = xxhash.xxh3_128()
    for group in groups:
        arrays = [group.prompt_ids, *group.answers, *(mask for mask in group.scored if mask is not None)]
        ranking = group.ranking
        facts = (
            [len(array) for array in arrays],
            [mask is None for mask in group.scored],
            [ranking.pairs, ranking.scores, ranking.gold, ranking.weight],
        )
        digest.update(json.dumps(facts).encode())
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def check_rows(was: Mapping[str, Any], now: Mapping[str, str], changes: Changes) -> None:
    """Refuse rows other than those that the run began with.

    Args:
        was: fingerprints by split, from the checkpoint.
        now: fingerprints by split.
        changes: the settings that changed. Other held-out rows are accepted if `eval_data` is one of them.

    Raises:
        UserError: it names the split and the settings that may be the cause.
    """
    for split, fingerprint in now.items():
        if was.get(split) == fingerprint or (split == "held out" and "eval_data" in changes):
            continue
        causes = described(changes, [name for name, rule in RULES.items() if rule is Rule.ROWS])
        raise UserError(
            f"--resume: the rows that are {split} are not those that the run began with: a text, a label, a weight or "
            f"their order changed ({causes or 'no setting did, so the file, the template or the tokenizer changed'}). "
            "Restore them, or start another run in another --output_dir"
        )


def check_state(state: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]]) -> None:
    """Refuse a state that lacks a part or has one of a wrong type.

    Raises:
        UserError: it names the part.
    """
    for name, expected in types.items():
        if name not in state:
            raise UserError(
                f"--resume: the checkpoint's state has no {name!r}: it was written by another version, or changed. "
                "Resume from another checkpoint"
            )
        if not isinstance(state[name], expected):
            raise UserError(
                f"--resume: {name!r} in the checkpoint's state is of type {type(state[name]).__name__}: it was "
                "changed. Resume from another checkpoint"
            )


@contextmanager
def restoring(part: str) -> Iterator[None]:
    """Turn the errors of a part of the state that does not fit into one line."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else (str(error).strip() or type(error).__name__)
        raise UserError(
            f"--resume: the checkpoint's {part} does not fit this run: {reason.splitlines()[0]}. Resume from another "
            "checkpoint, or with the settings that the run began with"
        ) from error


@contextmanager
def own_settings(optimizer: Optimizer) -> Iterator[None]:
    """Let an optimizer load its moments inside; rate, decay and the like stay those that it was made with."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def check_moments(optimizer: Optimizer) -> None:
    """Refuse moments that are missing or have another shape than their parameter: kernels do not check.

    Raises:
        KeyError: a moment or the number of steps is missing.
        ValueError: it names the moment and both shapes.
    """
    for parameter, state in optimizer.state.items():
        for pair in (("exp_avg", "exp_avg_sq"), ("state1", "state2")):
            if state.keys().isdisjoint(pair):
                continue
            for name in (*pair, "step"):
                if name not in state:
                    raise KeyError(name)
                if name != "step" and state[name].shape != parameter.shape:
                    raise ValueError(
                        f"{name} has shape {tuple(state[name].shape)}, its parameter {tuple(parameter.shape)}"
                    )


def restore_schedule(schedule: LRScheduler, state: dict[str, Any], step: int) -> None:
    """Bring a new schedule to where `step` optimizer steps would have brought it.

    The settings of the new one count: its length, its peak, its form. So the first step after a resume has the rate
    that an uninterrupted run with these settings would have.
    """
    if not isinstance(schedule, LambdaLR):
        schedule.load_state_dict(state)
        return
    schedule.last_epoch = step
    schedule._step_count = step + 1
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def tensors_of(value: object, place: str) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in nested dicts, lists and tuples, with where they are."""
    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from tensors_of(entry, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from tensors_of(entry, f"{place}.{number}")
