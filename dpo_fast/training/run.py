"""`train`: rows -> groups -> reference scores -> a prepared `Trainer`, whose `run` is the loop.

The reference is scored before the first step and then gone.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from dpo_fast.config import DPOConfig
from dpo_fast.console import say
from dpo_fast.data.load import load_groups
from dpo_fast.errors import UserError
from dpo_fast.losses.objective import needs_reference
from dpo_fast.model.check import check_packed_forward
from dpo_fast.model.load import load_tokenizer
from dpo_fast.model.policy import Policy
from dpo_fast.packs.bins import StepSampler, best_fit_decreasing
from dpo_fast.packs.budget import token_budget
from dpo_fast.packs.layout import Group
from dpo_fast.reference.fill import reference_logps
from dpo_fast.reference.moving import MovingReference
from dpo_fast.training.checkpoint import load_state, resolve_resume
from dpo_fast.training.metrics import METRICS_FILE
from dpo_fast.training.settings import check_config, check_scores, refuse_to_overwrite
from dpo_fast.training.warning_signs import WarningSigns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from dpo_fast.training.loop import CHOICES_FILE, STATE_FILE, PairSet, Trainer, TrainResult


def train(config: DPOConfig, *, console: Console | None = None) -> TrainResult:
    """Train `config.model` on `config.data` and write `config.output_dir`.

    Raises:
        UserError: a mistake in the settings or the data; nothing was trained.
        TrainingError: the run stopped itself; its last checkpoint is good.
    """
    console = console or Console()
    check_config(config)
    output_dir = Path(config.output_dir)
    checkpoint = resolve_resume(config.resume, output_dir)
    refuse_to_overwrite(config, output_dir)

    tokenizer = load_tokenizer(config.model, config.chat_template)
    groups, eval_groups = load_splits(config, tokenizer, console)
    check_scores(config, groups + eval_groups)
    max_tokens = token_budget(config, groups + eval_groups, config.per_device_train_batch_size)

    def make_sampler() -> StepSampler:
        return StepSampler(
            [group.num_tokens for group in groups],
            groups_per_step=config.per_device_train_batch_size * config.gradient_accumulation_steps,
            max_tokens=max_tokens,
            seed=config.seed,
        )

    sampler = make_sampler()
    num_steps = config.max_steps
    if num_steps < 0:
        num_steps = math.ceil(config.num_train_epochs * sampler.steps_per_epoch)
    print_plan(console, config, groups, eval_groups, num_steps, max_tokens)
    if config.dry_run:
        return TrainResult(None, [], 0)

    torch.manual_seed(config.seed)
    policy = Policy.load(config, str(checkpoint) if checkpoint else None)
    check_packed_forward(policy, groups)
    policy.static_tokens = max_tokens if config.static_shapes else None
    if config.torch_compile:
        policy.compile_layers()
    state = load_state(checkpoint / STATE_FILE) if checkpoint else None
    # The packs of the first epoch hold every group that the run will read, in the layout of its first steps: scored in
    # them, the reference equals the untrained policy bit for bit.
    first_packs = [
        packed for step in islice(make_sampler(), min(num_steps, sampler.steps_per_epoch)) for packed in step
    ]
    eval_packs = best_fit_decreasing([group.num_tokens for group in eval_groups], max_tokens)
    references, fingerprint, moving = None, None, None
    if config.sync_ref_model:
        moving = MovingReference(
            Policy.load(config, config.ref_model or config.model),
            sync_steps=config.ref_model_sync_steps,
            alpha=config.ref_model_mixup_alpha,
        )
        moving.reference.shares_prompts = policy.shares_prompts
    elif needs_reference(config):
        references, fingerprint = reference_logps(
            config,
            config.ref_model or config.model,
            groups + eval_groups,
            packs=first_packs + [[len(groups) + i for i in packed] for packed in eval_packs],
            policy=None if checkpoint or config.ref_model else policy,
            fingerprint=state["reference"] if state else None,
            console=console,
        )

    policy.set_trainable(gradient_checkpointing=config.gradient_checkpointing)
    trainer = Trainer(config, policy, tokenizer, sampler, num_steps, fingerprint, console)
    trainer.train_set = PairSet(groups, references and references[: len(groups)], moving)
    trainer.eval_set = PairSet(eval_groups, references and references[len(groups) :], moving)
    trainer.moving_reference = moving
    trainer.eval_packs = eval_packs
    trainer.signs = WarningSigns.of_run(config, groups, trainer.train_set.references, resumed=state is not None)
    if state:
        trainer.load_state_dict(state)
        say(console, f"resumed from {checkpoint} at step {trainer.step}")
    start_output(config, output_dir, trainer.step)
    return trainer.run()


def load_splits(
    config: DPOConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> tuple[list[Group], list[Group]]:
    """Groups to train on and groups to evaluate on; a prompt is never on both sides of `eval_split`."""
    groups, report = load_groups(config, tokenizer)
    say(console, report.render())
    if config.eval_data:
        eval_config = DPOConfig(**asdict(config) | {"data": config.eval_data, "max_rows": None})
        eval_groups, eval_report = load_groups(eval_config, tokenizer)
        say(console, eval_report.render())
        return groups, eval_groups
    prompts = {group.prompt_ids.tobytes(): i for i, group in enumerate(groups)}
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed)).tolist()
    num_held_out = round(config.eval_split * len(prompts))
    held_out = {prompt for rank, prompt in zip(order, prompts, strict=True) if rank < num_held_out}
    if held_out and len(held_out) == len(prompts):
        raise UserError(f"--eval_split {config.eval_split}: no row is left to train on")
    train_groups = [group for group in groups if group.prompt_ids.tobytes() not in held_out]
    return train_groups, [group for group in groups if group.prompt_ids.tobytes() in held_out]


def print_plan(
    console: Console,
    config: DPOConfig,
    groups: list[Group],
    eval_groups: list[Group],
    num_steps: int,
    max_tokens: int,
) -> None:
    """What is about to run, in three lines."""
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    num_pairs = sum(len(group.pairs) for group in groups)
    shared = sum(group.num_tokens for group in groups)
    unshared = sum(group.num_unshared_tokens for group in groups)
    lines = (
        f"{len(groups)} rows with {num_pairs} pairs to train on, {len(eval_groups)} rows held out",
        f"{num_steps} steps of {rows_per_step} rows, packs of up to {max_tokens} tokens",
        f"prompt sharing: {unshared / shared:.2f}x fewer tokens",
    )
    say(console, "\n".join(lines))


def start_output(config: DPOConfig, output_dir: Path, step: int) -> None:
    """Make the run's folder and write its settings; a run that starts anew clears the old one's metrics."""
    import yaml

    output_dir.mkdir(parents=True, exist_ok=True)
    if step == 0:
        for name in (METRICS_FILE, CHOICES_FILE):
            (output_dir / name).unlink(missing_ok=True)
    (output_dir / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
