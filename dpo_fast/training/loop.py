"""The loop: steps, reports, checkpoints, the final model.

One optimizer step takes `per_device_train_batch_size x gradient_accumulation_steps` pairs, lays them out in as few
packs as the token budget allows, and divides every pack's summed loss by the step's number of pairs: how a step is
cut into packs changes neither loss nor gradient.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from dpo_fast.config import DPOConfig
from dpo_fast.console import ProgressLine, progress_line, say
from dpo_fast.errors import UserError
from dpo_fast.files import write_file_atomically, write_folder_atomically
from dpo_fast.kernels import autotune
from dpo_fast.losses.objective import loss_names, needs_reference
from dpo_fast.model.policy import Policy
from dpo_fast.packs.bins import StepSampler
from dpo_fast.packs.layout import Group, PackedBatch, pack
from dpo_fast.reference.moving import MovingReference
from dpo_fast.reference.scores import AnswerLogps
from dpo_fast.training.checkpoint import save_checkpoint, save_state
from dpo_fast.training.guards import FiniteWatch, check_first_step
from dpo_fast.training.metrics import METRICS_FILE, MetricsFile, PairAverage, Window, peak_memory_gib, read_metrics
from dpo_fast.training.optimizers import make_optimizer, make_schedule
from dpo_fast.training.step import RewardShift, backward, loss_and_metrics
from dpo_fast.training.warning_signs import WarningSigns

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
            say(self.console, f"stopped by a signal after step {self.step}; go on with --resume auto")
        else:
            model_dir = write_folder_atomically(self.output_dir / FINAL_FOLDER, self.write_model)
            say(self.console, f"trained model: {model_dir}")
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
            say(self.console, line, style="yellow")

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
