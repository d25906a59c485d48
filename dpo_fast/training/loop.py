"""The loop: steps, evaluation, checkpoints, the final model.

One optimizer step takes `per_device_train_batch_size x gradient_accumulation_steps` rows, lays them out in as few packs
as the token budget allows, and divides every pack's summed loss by the step's number of pairs: how a step is cut into
packs changes neither loss nor gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from dpo_fast.config import DPOConfig
from dpo_fast.console import say
from dpo_fast.errors import UserError
from dpo_fast.files import write_folder_atomically
from dpo_fast.losses.objective import loss_names, needs_reference
from dpo_fast.model.policy import Policy
from dpo_fast.training.checkpoint import save_checkpoint, save_state
from dpo_fast.training.guards import FiniteWatch, check_first_step
from dpo_fast.training.metrics import METRICS_FILE, PairAverage, Window, read_metrics
from dpo_fast.training.optimizers import make_optimizer, make_schedule
from dpo_fast.training.plan import Plan
from dpo_fast.training.references import RunReference
from dpo_fast.training.reporter import Reporter, open_reporter
from dpo_fast.training.signals import stop_signals
from dpo_fast.training.step import PairSet, RewardShift, StepLoss
from dpo_fast.training.warning_signs import WarningSigns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE_FILE = "training_state.pt"
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


class Trainer:
    """A prepared run; `run` trains to the end."""

    def __init__(
        self,
        config: DPOConfig,
        plan: Plan,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        train_set: PairSet,
        held_out: PairSet,
        reference: RunReference,
        signs: WarningSigns,
        console: Console,
    ) -> None:
        """Take what `train` has made of the settings."""
        self.config = config
        self.plan = plan
        self.policy = policy
        self.tokenizer = tokenizer
        self.train_set = train_set
        self.held_out = held_out
        self.reference = reference
        self.signs = signs
        self.console = console
        self.output_dir = Path(config.output_dir)
        self.sampler = plan.sampler(train_set.groups)
        self.held_out_packs = plan.packs(held_out.groups)
        self.optimizer = make_optimizer(policy.model, config)
        self.schedule = make_schedule(self.optimizer, config, plan.num_steps)
        self.step = self.saved_step = 0
        self.watch = FiniteWatch()
        self.reward_shift = RewardShift() if "bco" in loss_names(config) else None
        self.window = Window(plan.max_tokens)

    def run(self) -> TrainResult:
        """Train to the last step or a signal, then write the final model."""
        self.saved_step = self.step
        with (
            open_reporter(self.output_dir, self.signs, self.console, self.plan, step=self.step) as reporter,
            stop_signals() as stop,
        ):
            while self.step < self.plan.num_steps and not stop.is_set():
                self.after_step(self.train_step(), reporter)
        self.watch.check()
        model_dir = None
        if self.step < self.plan.num_steps:
            # A signal may come at any moment, so whether this step was saved is known here and not before.
            self.save()
            say(self.console, f"stopped by a signal after step {self.step}; continue with --resume auto")
        else:
            model_dir = write_folder_atomically(self.output_dir / FINAL_FOLDER, self.write_model)
            say(self.console, f"trained model: {model_dir}")
        return TrainResult(model_dir, read_metrics(self.output_dir / METRICS_FILE), self.step)

    def train_step(self) -> Tensor:
        """One optimizer step; returns the gradient's norm before clipping."""
        step = next(self.sampler)
        groups = [self.train_set.groups[i] for i in step.groups]
        num_pairs = sum(len(group.pairs) for group in groups)
        average = PairAverage()
        batches = (self.train_set.pack(packed) for packed in step.packs)
        for batch, metrics in self.loss.backward(batches, num_pairs):
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
        if self.reference.moving is not None:
            self.reference.moving.after_step(self.step, self.policy)
        return grad_norm

    @property
    def loss(self) -> StepLoss:
        """Of this step."""
        shift = None if self.reward_shift is None else self.reward_shift.value
        return StepLoss(self.policy, self.config, shift)

    def after_step(self, grad_norm: Tensor, reporter: Reporter) -> None:
        """Report, evaluate and save if they are due."""
        config, step = self.config, self.step
        reporter.advance()
        is_last = step == self.plan.num_steps
        if is_last or step == 1 or is_due(step, config.logging_steps):
            row = self.read_window(grad_norm)
            self.watch.check()
            reporter.training(step, row)
            self.window = Window(self.plan.max_tokens)
        with self.window.paused():
            if self.held_out.groups and (is_last or is_due(step, config.eval_steps)):
                row = self.evaluate()
                self.watch.check()
                reporter.write(step, row)
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

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and rewards on the held-out pairs, under names that begin with `eval_`."""
        average = PairAverage()
        for metrics in self.loss.metrics(self.held_out.pack(packed) for packed in self.held_out_packs):
            average.add(metrics)
        return {f"eval_{name}": value for name, value in average.read().items()}

    def write_model(self, folder: Path) -> None:
        """Write the Hugging Face folder."""
        self.policy.save(folder, self.tokenizer)

    def write_checkpoint(self, folder: Path) -> None:
        """Write the Hugging Face folder and what it takes to resume."""
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
            "reference": self.reference.fingerprint,
        }
        if self.reward_shift is not None:
            state["reward_shift"] = self.reward_shift.state_dict()
        if self.reference.moving is not None:
            state["moving_reference"] = self.reference.moving.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`.

        Raises:
            UserError: the state belongs to another run.
        """
        try:
            self.sampler.load_state_dict(state["sampler"])
        except ValueError as error:
            raise UserError(f"--resume: the checkpoint belongs to another run: {error}") from error
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        try:
            if self.reward_shift is not None:
                self.reward_shift.load_state_dict(state["reward_shift"])
            if self.reference.moving is not None:
                self.reference.moving.load_state_dict(state["moving_reference"])
        except KeyError as error:
            raise UserError(
                f"--resume: the checkpoint has no {error.args[0]}: it belongs to a run with another --loss_type or "
                "--sync_ref_model"
            ) from error
        torch.set_rng_state(state["rng"])


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one; None and 0 mean never."""
    return bool(every) and step % every == 0  # type: ignore[operator]
