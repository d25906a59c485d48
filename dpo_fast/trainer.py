"""The training loop: rows -> groups -> reference scores -> steps -> checkpoints -> final model.

One optimizer step takes `per_device_train_batch_size x gradient_accumulation_steps` pairs, lays them out in as few
packs as the token budget allows, and divides every pack's summed loss by the step's number of pairs: how a step is
cut into packs changes neither loss nor gradient. The reference is scored before the first step and then gone.

`train` prepares a run and `Trainer.run` is the loop; the helpers follow in the order in which the loop meets them.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from dpo_fast.batch import Group, PackedBatch, pack
from dpo_fast.checkpoint import (
    load_state,
    resolve_resume,
    save_checkpoint,
    save_state,
    write_file_atomically,
    write_folder_atomically,
)
from dpo_fast.config import DPOConfig, UserError
from dpo_fast.data import StepSampler, best_fit_decreasing, load_groups
from dpo_fast.guards import FiniteWatch, check_first_step, check_packed_forward
from dpo_fast.kernels import autotune
from dpo_fast.metrics import METRICS_FILE, MetricsFile, PairAverage, Window, peak_memory_gib, read_metrics
from dpo_fast.model import Policy, load_tokenizer
from dpo_fast.objective import loss_names, needs_reference
from dpo_fast.optim import make_optimizer, make_schedule
from dpo_fast.progress import ProgressLine, progress_line
from dpo_fast.reference import AnswerLogps
from dpo_fast.run_settings import check_config, check_scores, refuse_to_overwrite
from dpo_fast.score import reference_logps, token_budget
from dpo_fast.step import MovingReference, RewardShift, backward, loss_and_metrics
from dpo_fast.warning_signs import WarningSigns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE_FILE = "training_state.pt"
CHOICES_FILE = "autotune.json"
FINAL_FOLDER = "final"


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind.

    Attributes:
        model_dir: Hugging Face folder of the trained model; None after a dry run or a stop by a signal.
        metrics: rows of `metrics.jsonl`.
        step: optimizer steps done.
    """

    model_dir: Path | None
    metrics: list[dict[str, Any]]
    step: int


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
        console.print(f"resumed from {checkpoint} at step {trainer.step}", highlight=False, soft_wrap=True)
    start_output(config, output_dir, trainer.step)
    return trainer.run()


@dataclass(frozen=True)
class PairSet:
    """Groups with the reference's log-probs of their answers: cached, by a model that moves, or none."""

    groups: list[Group]
    references: list[AnswerLogps] | None
    moving: MovingReference | None = None

    def pack(self, indices: Sequence[int]) -> PackedBatch:
        """The pack of these groups."""
        references = None if self.references is None else [self.references[i] for i in indices]
        batch = pack([self.groups[i] for i in indices], references)
        return batch if self.moving is None else self.moving.score(batch)


class Trainer:
    """A prepared run; `run` trains to the end."""

    train_set: PairSet
    eval_set: PairSet
    eval_packs: list[list[int]]
    moving_reference: MovingReference | None
    signs: WarningSigns
    metrics_file: MetricsFile
    line: ProgressLine

    def __init__(
        self,
        config: DPOConfig,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        sampler: StepSampler,
        num_steps: int,
        reference_fingerprint: str | None,
        console: Console,
    ) -> None:
        self.config = config
        self.policy = policy
        self.tokenizer = tokenizer
        self.sampler = sampler
        self.num_steps = num_steps
        self.reference_fingerprint = reference_fingerprint
        self.console = console
        self.output_dir = Path(config.output_dir)
        self.optimizer = make_optimizer(policy.model, config)
        self.schedule = make_schedule(self.optimizer, config, num_steps)
        self.step = self.saved_step = 0
        self.watch = FiniteWatch()
        self.reward_shift = RewardShift() if "bco" in loss_names(config) else None
        self.window = Window(sampler.max_tokens)
        self.kernel_choices: dict[str, Any] = {}

    def run(self) -> TrainResult:
        """Steps until the last one or a signal, then the final model."""
        metrics_path = self.output_dir / METRICS_FILE
        with (
            MetricsFile(metrics_path, keep_up_to_step=self.step) as self.metrics_file,
            progress_line(self.console, "training", self.num_steps, self.step) as self.line,
            stop_signals() as stop,
        ):
            self.saved_step = self.step
            for row in read_metrics(metrics_path):
                self.signs.observe(row)
            while self.step < self.num_steps and not stop.is_set():
                self.after_step(self.train_step())
        self.watch.check()
        model_dir = None
        if self.step < self.num_steps:
            # A signal may come at any moment, so whether this step was saved is known here and not before.
            self.save()
            self.console.print(
                f"stopped by a signal after step {self.step}; go on with --resume auto", highlight=False, soft_wrap=True
            )
        else:
            model_dir = write_folder_atomically(self.output_dir / FINAL_FOLDER, self.write_model)
            self.console.print(f"trained model: {model_dir}", highlight=False, soft_wrap=True)
        return TrainResult(model_dir, read_metrics(metrics_path), self.step)

    def train_step(self) -> Tensor:
        """One optimizer step; returns the gradient's norm before clipping."""
        packs = next(self.sampler)
        groups = [self.train_set.groups[i] for packed in packs for i in packed]
        num_pairs = sum(len(group.pairs) for group in groups)
        average = PairAverage()
        for packed in packs:
            batch = self.train_set.pack(packed)
            metrics = backward(self.policy, batch, self.config, num_pairs, self.shift)
            average.add(metrics)
            self.watch.add(self.step + 1, batch.pair_rows, metrics[0].isfinite())
            self.window.add(batch, metrics, padding=self.policy.padding(batch))
        if self.step == 0 and self.config.ref_model is None and needs_reference(self.config):
            check_first_step(average.read(), groups, self.config, self.policy)
        max_norm = self.config.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), max_norm)
        self.watch.add(self.step + 1, [group.row for group in groups], grad_norm.isfinite())
        if self.policy.device.type == "cpu":
            self.watch.check()
        self.optimizer.step()
        self.window.learning_rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.reward_shift is not None:
            self.reward_shift.add(average.total("rewards/chosen") + average.total("rewards/rejected"), num_pairs)
        if self.moving_reference is not None:
            self.moving_reference.after_step(self.step, self.policy)
        return grad_norm

    @property
    def shift(self) -> Tensor | None:
        """The reward shift of this step, for the loss that has one."""
        return None if self.reward_shift is None else self.reward_shift.value

    def after_step(self, grad_norm: Tensor) -> None:
        """Report, evaluate and save where a step calls for it."""
        config, step = self.config, self.step
        self.line.advance()
        last = step == self.num_steps
        if last or step == 1 or is_due(step, config.logging_steps):
            self.log_training(self.read_window(grad_norm))
            self.window = Window(self.sampler.max_tokens)
        with self.window.paused():
            if self.eval_set.groups and (last or is_due(step, config.eval_steps)):
                self.log(self.evaluate())
            if is_due(step, config.save_steps):
                self.save()

    def read_window(self, grad_norm: Tensor) -> dict[str, float]:
        """Figures since the last report, checked: the one time between reports that a GPU is waited for."""
        if self.policy.device.type == "cpu":  # checked after every step
            return self.window.read({"grad_norm": grad_norm})
        row = self.window.read({"grad_norm": grad_norm, "all_finite": self.watch.all_finite})
        self.watch.check(all_finite=bool(row.pop("all_finite")))
        return row

    def save(self) -> None:
        """Write a checkpoint of this step, if there is none yet."""
        self.watch.check()
        if self.saved_step != self.step:
            save_checkpoint(self.output_dir, self.step, self.write_checkpoint, keep=self.config.save_total_limit)
        self.saved_step = self.step

    def log_training(self, row: dict[str, Any]) -> None:
        """Log a report with what it warns of."""
        warnings = self.signs.observe(row)
        self.log(row | {"warnings": warnings} if warnings else row)
        for text in warnings:
            line = f"warning (step {self.step}): {text}"
            self.console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def log(self, row: dict[str, Any]) -> None:
        """Write a row of metrics and show it."""
        self.watch.check()
        place = {"epoch": self.step / self.sampler.steps_per_epoch, "step": self.step}
        self.metrics_file.write(row | {"peak_memory_gib": peak_memory_gib(self.policy.device)} | place)
        self.write_kernel_choices()
        self.line.report(f"step {self.step}/{self.num_steps}", row)

    def write_kernel_choices(self) -> None:
        """Keep which kernels were chosen on this GPU, and how long each took, beside what they computed."""
        choices = self.kernel_choices | autotune.choices()
        if choices != self.kernel_choices:
            write_file_atomically(self.output_dir / CHOICES_FILE, json.dumps(choices, indent=1) + "\n")
        self.kernel_choices = choices

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and rewards on the held-out pairs, under names that begin with `eval_`."""
        average = PairAverage()
        for packed in self.eval_packs:
            batch = self.eval_set.pack(packed)
            average.add(loss_and_metrics(self.policy, batch, self.config, self.shift)[1])
        return {f"eval_{name}": value for name, value in average.read().items()}

    def write_model(self, folder: Path) -> None:
        """Write the Hugging Face folder."""
        self.policy.save(folder, self.tokenizer)

    def write_checkpoint(self, folder: Path) -> None:
        """Write the Hugging Face folder and what it takes to go on."""
        self.write_model(folder)
        save_state(folder / STATE_FILE, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights."""
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "sampler": self.sampler.state_dict(),
            "rng": torch.get_rng_state(),
            "reference": self.reference_fingerprint,
        }
        if self.reward_shift is not None:
            state["reward_shift"] = self.reward_shift.state_dict()
        if self.moving_reference is not None:
            state["moving_reference"] = self.moving_reference.reference.model.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        try:
            self.sampler.load_state_dict(state["sampler"])
        except ValueError as error:
            raise UserError(f"--resume: the checkpoint belongs to another run: {error}") from error
        self.step = state["step"]
        self.kernel_choices = read_choices(self.output_dir)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        try:
            if self.reward_shift is not None:
                self.reward_shift.load_state_dict(state["reward_shift"])
            if self.moving_reference is not None:
                self.moving_reference.reference.model.load_state_dict(state["moving_reference"])
        except KeyError as error:
            raise UserError(
                f"--resume: the checkpoint has no {error.args[0]}: it belongs to a run with another --loss_type or "
                "--sync_ref_model"
            ) from error
        torch.set_rng_state(state["rng"])


def load_splits(
    config: DPOConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> tuple[list[Group], list[Group]]:
    """Groups to train on and groups to evaluate on; a prompt is never on both sides of `eval_split`."""
    groups, report = load_groups(config, tokenizer)
    console.print(report.render(), highlight=False, markup=False, soft_wrap=True)
    if config.eval_data:
        eval_config = DPOConfig(**asdict(config) | {"data": config.eval_data, "max_rows": None})
        eval_groups, eval_report = load_groups(eval_config, tokenizer)
        console.print(eval_report.render(), highlight=False, markup=False, soft_wrap=True)
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
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def start_output(config: DPOConfig, output_dir: Path, step: int) -> None:
    """Make the run's folder and write its settings; a run that starts anew clears the old one's metrics."""
    import yaml

    output_dir.mkdir(parents=True, exist_ok=True)
    if step == 0:
        for name in (METRICS_FILE, CHOICES_FILE):
            (output_dir / name).unlink(missing_ok=True)
    (output_dir / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))


def read_choices(output_dir: Path) -> dict[str, Any]:
    """What an earlier part of the run wrote of its kernels; nothing where it wrote nothing that can be read."""
    try:
        found = json.loads((output_dir / CHOICES_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one; None and 0 mean never."""
    return bool(every) and step % every == 0  # type: ignore[operator]


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and the first Ctrl-C set, so that a run ends after its step with a checkpoint."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
