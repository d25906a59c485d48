"""`train`: rows -> plan -> policy -> reference -> a `Trainer`, whose `run` is the loop.

The reference is scored before the first step and then gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from dpo_fast.config import DPOConfig
from dpo_fast.console import say
from dpo_fast.data.load import load_groups
from dpo_fast.errors import STOPPED, TrainingError, UserError
from dpo_fast.files import write_file_atomically
from dpo_fast.losses.objective import needs_reference
from dpo_fast.model.check import with_fitting_layout
from dpo_fast.model.layers import with_fused_layers
from dpo_fast.model.load import tokenizer_of
from dpo_fast.model.placement import busy_cpu
from dpo_fast.model.policy import Policy
from dpo_fast.packs.layout import Group
from dpo_fast.packs.steps import rows_of_step
from dpo_fast.ranks import Ranks, joined_ranks
from dpo_fast.reference.fill import store_path
from dpo_fast.reference.store import ReferenceStore
from dpo_fast.training.adapters import (
    base_fingerprint,
    check_base,
    describe_start,
    is_adapted,
    merges_on_load,
    start_adapter,
)
from dpo_fast.training.as_planned import fit_plan, run_as_planned
from dpo_fast.training.checkpoint import load_state, resolve_resume
from dpo_fast.training.gradients import check_gradient_release
from dpo_fast.training.launch import launch, needs_launch
from dpo_fast.training.loop import STATE_FILE, STATE_TYPES, Trainer, TrainResult
from dpo_fast.training.metrics import METRICS_FILE, read_metrics
from dpo_fast.training.plan import Plan
from dpo_fast.training.references import known_reference, prepare_reference
from dpo_fast.training.resume import (
    Changes,
    changed_settings,
    check_rows,
    check_state,
    rows_fingerprint,
    used_changes,
)
from dpo_fast.training.run_folder import CONFIG_FILE, FINAL_FOLDER, RunFolder, hold_run_folder
from dpo_fast.training.settings import check_config, check_output_dir, check_scores
from dpo_fast.training.signals import StopSignals, stop_signals
from dpo_fast.training.step import PairSet
from dpo_fast.training.warning_signs import WarningSigns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train(config: DPOConfig, *, console: Console | None = None) -> TrainResult:
    """Train `config.model` on `config.data` and write `config.output_dir`.

    SIGTERM, SIGINT and SIGHUP stop the run after its step, with a checkpoint; see `signals.stop_signals`.

    Raises:
        UserError: a mistake in the settings or the data; nothing was trained.
        WriteError: a file could not be written; what was written before is whole.
        TrainingError: the run stopped itself; its last checkpoint is good.
    """
    console = console or Console()
    check_config(config)
    if needs_launch(config):
        return train_in_processes(config)
    with joined_ranks(config.device) as ranks:
        return train_together(config, ranks, console if ranks.is_writer else Console(quiet=True))


def train_in_processes(config: DPOConfig) -> TrainResult:
    """`train` in `nproc` processes of their own.

    Raises:
        TrainingError: they failed, and have said why.
    """
    if (code := launch(config)) not in (0, STOPPED):
        raise TrainingError(f"the processes of the run ended with exit code {code}; the reason is above")
    output_dir = Path(config.output_dir)
    rows = read_metrics(output_dir / METRICS_FILE)
    step = rows[-1]["step"] if rows else 0
    return TrainResult(None if code else output_dir / FINAL_FOLDER, rows, step, stopped=code == STOPPED)


def train_together(config: DPOConfig, ranks: Ranks, console: Console) -> TrainResult:
    """`train` in each of the processes that share a run; the first one holds its folder."""
    check_output_dir(Path(config.output_dir))
    if config.dry_run:
        prepare_rows(config, console)
        return TrainResult(None, [], 0)
    with run_folder(config, ranks, console) as folder, stop_signals() as stop:
        try:
            trainer = prepare(config, folder, stop, console)
            stop.defer()
            start_output(config, trainer, console)
            return run_as_planned(trainer)
        except (KeyboardInterrupt, Exception) as error:
            if not stop.explains(error):
                raise
        ranks.end(STOPPED)
        say(console, "stopped by a signal before the first step; rerun the same command to continue")
        return TrainResult(None, [], 0, stopped=True)


@contextmanager
def run_folder(config: DPOConfig, ranks: Ranks, console: Console) -> Iterator[RunFolder]:
    """The folder of the run, held by the first process, which makes room in it for a new run."""
    output_dir = Path(config.output_dir)
    if not ranks.is_writer:
        ranks.wait()
        yield RunFolder(output_dir)
        return
    with hold_run_folder(output_dir) as folder:
        if config.resume is None and not config.overwrite:
            folder.refuse_old_run()
        elif config.resume is None and (set_aside := folder.set_aside()):
            say(console, set_aside)
        ranks.wait()
        yield folder


@dataclass(frozen=True)
class Rows:
    """What a run reads, and the plan that follows from it."""

    tokenizer: PreTrainedTokenizerBase
    groups: list[Group]
    held_out: list[Group]
    plan: Plan

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the rows in each split."""
        return {"trained on": rows_fingerprint(self.groups), "held out": rows_fingerprint(self.held_out)}


def prepare_rows(config: DPOConfig, console: Console, state: Mapping[str, Any] | None = None) -> Rows:
    """Read the rows and plan the run, or the rest of the one that left `state`; prints both reports."""
    tokenizer = tokenizer_of(config)
    groups, held_out = load_splits(config, tokenizer, console)
    check_scores(config, groups + held_out)
    rows_per_step = None if state is None else rows_of_step(state["sampler"])
    plan = fit_plan(config, Plan.of(config, groups, held_out, rows_per_step=rows_per_step), groups)
    say(console, str(plan))
    check_gradient_release(config, plan, groups)
    return Rows(tokenizer, groups, held_out, plan)


def prepare(config: DPOConfig, folder: RunFolder, stop: StopSignals, console: Console) -> Trainer:
    """All that precedes the first step. Writes only into the reference store, so it can be interrupted anywhere."""
    checkpoint = resolve_resume(config.resume, folder.path)
    state = None
    changes: Changes = {}
    if checkpoint is not None:
        state = load_state(checkpoint / STATE_FILE)
        check_state(state, STATE_TYPES)
        folder.check_owner(checkpoint, state["run"], overwrite=config.overwrite)
        changes = changed_settings(state["settings"], config)

    rows = prepare_rows(config, console, state)
    if state is not None:
        check_rows(state["rows"], rows.fingerprints, changes)
        check_progress(config, rows.plan, state)

    if needs_reference(config) and not config.sync_ref_model:
        ReferenceStore(store_path(config)).close()  # a place that cannot be written is found before a model is loaded
    if rows.plan.placement.device.type == "cpu" and (note := busy_cpu()):
        say(console, note, style="yellow")
    torch.manual_seed(config.seed)
    if start := describe_start(config):
        say(console, start)
    adapts = is_adapted(config)
    # A checkpoint of an adapter holds no other weights.
    name = config.model if adapts else str(checkpoint or config.model)
    policy = load_policy(config, rows.plan, rows.groups + rows.held_out, name)
    base = base_fingerprint(policy) if adapts else None
    if state is not None and base is not None:
        check_base(state, base, config)
    is_reference = config.ref_model is None and (adapts or checkpoint is None)
    reference = prepare_reference(
        *(config, rows.plan, policy if is_reference else None, rows.groups, rows.held_out),
        known=None if state is None else known_reference(state, changes),
        load=partial(load_policy, config, rows.plan, rows.groups),
        console=console,
    )

    if base is not None:
        policy = start_adapter(config, policy, base, checkpoint, console)
    policy.set_trainable(**rows.plan.activations(config))
    trainer = Trainer(
        *(config, rows.plan, policy, rows.tokenizer),
        PairSet(rows.groups, reference.train),
        PairSet(rows.held_out, reference.held_out),
        reference,
        WarningSigns.of_run(config, rows.groups, reference.answers, resumed=state is not None),
        *(folder, stop, rows.fingerprints, console),
    )
    if state is not None:
        assert checkpoint is not None, "the state is from it"
        trainer.load_state_dict(state, checkpoint)
        say(console, f"resumed from {checkpoint} at step {trainer.step}")
        if used := used_changes(changes):
            say(console, f"changed settings, used from here on: {used}")
    return trainer


def check_progress(config: DPOConfig, plan: Plan, state: dict[str, Any]) -> None:
    """Refuse a checkpoint that is past the end, or was computed in other numbers."""
    if state["step"] > plan.num_steps:
        raise UserError(
            f"--resume: the checkpoint has {state['step']} steps, but the run ends after {plan.num_steps} (--max_steps "
            f"{config.max_steps}, --num_train_epochs {config.num_train_epochs:g})"
        )
    dtype = str(plan.placement.compute_dtype)
    if state["compute_dtype"] != dtype:
        raise UserError(
            f"--resume: the matrix products would be in {dtype}, and were in {state['compute_dtype']} (--device "
            f"{config.device}): resume on a device of the same kind"
        )


def load_policy(config: DPOConfig, plan: Plan, groups: list[Group], name: str) -> Policy:
    """The model `name`, checked on some of `groups`, in the layout that it can be computed in."""
    # The weights beneath an adapter are whole in each process.
    parallel = None if is_adapted(config) else plan.parallel
    policy = Policy.load(config, name, merge=merges_on_load(config), parallel=parallel)
    policy = with_fitting_layout(policy, groups)
    policy = with_fused_layers(policy, groups, config.fused_layers if not config.torch_compile else False)
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


def start_output(config: DPOConfig, trainer: Trainer, console: Console) -> None:
    """Make the folder that of this run, and record its settings."""
    import yaml

    folder, ranks = trainer.folder, trainer.ranks
    if ranks.is_writer:
        if set_aside := folder.begin(trainer.run_id):
            say(console, set_aside)
        text = yaml.safe_dump(asdict(config), sort_keys=False)
        write_file_atomically(trainer.output_dir / CONFIG_FILE, text)
    folder.run = ranks.first(folder.run)
