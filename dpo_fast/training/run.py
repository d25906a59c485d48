"""`train`: rows -> plan -> policy -> reference -> a `Trainer`, whose `run` is the loop.

The reference is scored before the first step and then gone.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from dpo_fast.config import DPOConfig
from dpo_fast.console import say
from dpo_fast.data.load import load_groups
from dpo_fast.errors import UserError
from dpo_fast.model.check import with_fitting_layout
from dpo_fast.model.load import load_tokenizer
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import Group
from dpo_fast.training.as_planned import fit_plan, run_as_planned
from dpo_fast.training.checkpoint import load_state, resolve_resume
from dpo_fast.training.loop import STATE_FILE, Trainer, TrainResult
from dpo_fast.training.metrics import METRICS_FILE
from dpo_fast.training.plan import Plan
from dpo_fast.training.ranks import refuse_many_processes
from dpo_fast.training.references import prepare_reference
from dpo_fast.training.reporter import CHOICES_FILE
from dpo_fast.training.settings import check_config, check_scores, refuse_to_overwrite
from dpo_fast.training.step import PairSet
from dpo_fast.training.warning_signs import WarningSigns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train(config: DPOConfig, *, console: Console | None = None) -> TrainResult:
    """Train `config.model` on `config.data` and write `config.output_dir`.

    Raises:
        UserError: a mistake in the settings or the data; nothing was trained.
        TrainingError: the run stopped itself; its last checkpoint is good.
    """
    console = console or Console()
    refuse_many_processes()
    check_config(config)
    output_dir = Path(config.output_dir)
    checkpoint = resolve_resume(config.resume, output_dir)
    refuse_to_overwrite(config, output_dir)

    tokenizer = load_tokenizer(config.model, config.chat_template)
    groups, held_out = load_splits(config, tokenizer, console)
    check_scores(config, groups + held_out)

    plan = fit_plan(config, Plan.of(config, groups, held_out), groups)
    say(console, str(plan))
    if config.dry_run:
        return TrainResult(None, [], 0)

    torch.manual_seed(config.seed)
    policy = load_policy(config, plan, groups, checkpoint)

    state = load_state(checkpoint / STATE_FILE) if checkpoint else None
    reference = prepare_reference(
        *(config, plan, None if checkpoint or config.ref_model else policy, groups, held_out),
        fingerprint=state["reference"] if state else None,
        console=console,
    )

    policy.set_trainable(**plan.activations(config))
    trainer = Trainer(
        *(config, plan, policy, tokenizer),
        PairSet(groups, reference.train),
        PairSet(held_out, reference.held_out),
        reference,
        WarningSigns.of_run(config, groups, reference.answers, resumed=state is not None),
        console,
    )
    if state:
        trainer.load_state_dict(state)
        say(console, f"resumed from {checkpoint} at step {trainer.step}")
    start_output(config, output_dir, trainer.step)
    return run_as_planned(trainer)


def load_policy(config: DPOConfig, plan: Plan, groups: list[Group], checkpoint: Path | None) -> Policy:
    """The model to train, checked on some of `groups`, in the layout that it can be computed in."""
    policy = with_fitting_layout(Policy.load(config, str(checkpoint) if checkpoint else None), groups)
    if config.static_shapes:
        policy = replace(policy, static_tokens=plan.max_tokens)
    return policy.compiled() if config.torch_compile else policy


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


def start_output(config: DPOConfig, output_dir: Path, step: int) -> None:
    """Make the run's folder and write its settings; a run that starts anew clears the old one's metrics."""
    import yaml

    output_dir.mkdir(parents=True, exist_ok=True)
    if step == 0:
        for name in (METRICS_FILE, CHOICES_FILE):
            (output_dir / name).unlink(missing_ok=True)
    (output_dir / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
