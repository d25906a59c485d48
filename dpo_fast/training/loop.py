"""The loop: steps, evaluation, checkpoints, the final model.

One optimizer step takes `per_device_train_batch_size x gradient_accumulation_steps` rows, lays them out in as few packs
as the token budget allows, and divides every pack's summed loss by the step's number of pairs: how a step is cut into
packs changes neither loss nor gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from dpo_fast.config import DPOConfig
from dpo_fast.console import say
from dpo_fast.errors import UserError
from dpo_fast.files import write_errors, write_folder_atomically
from dpo_fast.losses.objective import loss_names, needs_reference
from dpo_fast.model.policy import Policy
from dpo_fast.model.precision import saved_dtype
from dpo_fast.packs.layout import PackedBatch, pack
from dpo_fast.ranks import ONE_PROCESS
from dpo_fast.training.adapters import write_merged
from dpo_fast.training.checkpoint import load_state, save_checkpoint, save_state
from dpo_fast.training.gradients import prepare_gradients
from dpo_fast.training.guards import FiniteWatch, check_first_step, check_tensors, way_back
from dpo_fast.training.metrics import METRICS_FILE, PairAverage, Window, peak_memory_gib, read_metrics
from dpo_fast.training.optimizer_parts import load_parts, part_file
from dpo_fast.training.optimizer_states import load_optimizer_state
from dpo_fast.training.optimizers import OPTIMIZERS, make_optimizer, make_schedule, optimizer_name
from dpo_fast.training.own_weights import OwnWeights
from dpo_fast.training.plan import Plan
from dpo_fast.training.references import RunReference
from dpo_fast.training.reporter import Reporter, SilentReporter, open_reporter
from dpo_fast.training.resume import (
    check_moments,
    check_state,
    own_settings,
    restore_schedule,
    restoring,
    settings_text,
    tensors_of,
)
from dpo_fast.training.run_folder import FINAL_FOLDER, RunFolder
from dpo_fast.training.signals import StopSignals
from dpo_fast.training.step import PairSet, RewardShift, StepLoss
from dpo_fast.training.warning_signs import WarningSigns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE_FILE = "training_state.pt"
# The parts of a checkpoint's state that every run has.
STATE_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("run", "settings", "compute_dtype"), str),
    **dict.fromkeys(("optimizer", "schedule", "sampler", "rows"), dict),
    **dict.fromkeys(("rng", "reference_digests"), Tensor),
    "reference": (str, type(None)),
    **dict.fromkeys(("step", "parts"), int),
}


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind.

    Attributes:
        model_dir: Hugging Face folder of the trained model; None after a dry run or a stop by a signal.
        metrics: rows of `metrics.jsonl`.
        step: optimizer steps done.
        stopped: whether a signal ended the run. The same command with `--resume auto` continues it.
    """

    model_dir: Path | None
    metrics: list[dict[str, Any]]
    step: int
    stopped: bool = False


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
        folder: RunFolder,
        stop: StopSignals,
        rows: dict[str, str],
        console: Console,
    ) -> None:
        """Take what `train` has made of the settings; `rows` are the fingerprints of both sets of rows."""
        self.config = config
        self.plan = plan
        self.policy = policy
        self.tokenizer = tokenizer
        self.train_set = train_set
        self.held_out = held_out
        self.reference = reference
        self.signs = signs
        self.folder = folder
        self.stop = stop
        self.rows = rows
        self.console = console
        self.output_dir = folder.path
        self.ranks = plan.ranks
        self.sampler = plan.sampler(train_set.groups)
        self.held_out_packs = plan.packs(held_out.groups)
        self.weights = OwnWeights(policy.model)
        self.optimizer = make_optimizer(self.weights.parameters, config)
        self.gradients = prepare_gradients(config, self.optimizer, policy.model.parameters())
        self.schedule = make_schedule(self.optimizer, config, plan.num_steps)
        self.run_id: str | None = None
        self.step = self.saved_step = 0
        self.watch = FiniteWatch(lambda: way_back(self.output_dir), self.ranks)
        self.reward_shift = RewardShift() if "bco" in loss_names(config) else None
        self.window = Window(plan.max_tokens)

    def run(self) -> TrainResult:
        """Train to the last step or a signal, then write the final model."""
        self.saved_step = self.step
        with open_reporter(self.output_dir, self.signs, self.console, self.plan, step=self.step) as reporter:
            while self.step < self.plan.num_steps and not self.ranks.any(self.stop.is_set()):
                self.after_step(self.train_step(), reporter)
        self.watch.check()
        model_dir = None
        if self.step < self.plan.num_steps:
            # A signal may come at any moment, so whether this step was saved is known here and not before.
            self.save()
            say(self.console, f"stopped by a signal after step {self.step}; continue with --resume auto")
        else:
            model_dir = self.save_final()
            say(self.console, f"trained model: {model_dir}")
        return TrainResult(model_dir, read_metrics(self.output_dir / METRICS_FILE), self.step, model_dir is None)

    def train_step(self) -> Tensor:
        """One optimizer step; returns the gradient's norm before clipping."""
        step = next(self.sampler)
        groups = [self.train_set.groups[i] for i in step.groups]
        num_pairs = sum(len(group.pairs) for group in groups)
        average = PairAverage()
        batches = (self.train_set.pack(packed) if packed else None for packed in step.packs)
        for batch, metrics in self.loss.backward(batches, num_pairs):
            average.add(metrics)
            self.watch.add(self.step + 1, batch.pair_rows, metrics[0].isfinite())
            self.window.add(batch, metrics, padding=self.policy.padding(batch))
        if self.step == 0 and self.config.ref_model is None and needs_reference(self.config):
            check_first_step(self.over_ranks(average).read(), groups, self.config, self.policy)
        if self.policy.parallel is None:
            self.weights.sum_gradients(self.ranks)
        grad_norm = self.gradients.clip()
        self.watch.add(self.step + 1, [group.row for group in groups], grad_norm.isfinite())
        if self.policy.device.type == "cpu":
            self.watch.check()
        self.weights.take_gradients()
        self.optimizer.step()
        self.window.learning_rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        self.weights.drop_gradients()
        self.step += 1
        if self.reward_shift is not None:
            average = self.over_ranks(average)
            self.reward_shift.add(average.total("rewards/chosen") + average.total("rewards/rejected"), num_pairs)
        if self.reference.moving is not None:
            self.reference.moving.after_step(self.step, self.policy)
        return grad_norm

    @property
    def loss(self) -> StepLoss:
        """Of this step."""
        shift = None if self.reward_shift is None else self.reward_shift.value
        return StepLoss(self.policy, self.config, shift, self.ranks, self.filler)

    @cached_property
    def filler(self) -> PackedBatch | None:
        """What a process computes for nothing while the others work on a pack; None if there are no others."""
        if self.ranks.world_size == 1:
            return None
        return pack([min(self.train_set.groups, key=lambda group: group.num_tokens)])

    def over_ranks(self, average: PairAverage) -> PairAverage:
        """The average over all processes."""
        return average.over(self.ranks, self.policy.device)

    def after_step(self, grad_norm: Tensor, reporter: Reporter | SilentReporter) -> None:
        """Report, evaluate and save if they are due."""
        config, step = self.config, self.step
        reporter.advance()
        is_last = step == self.plan.num_steps
        if is_last or step == 1 or is_due(step, config.logging_steps):
            row = self.read_window(grad_norm)
            self.watch.check()
            reporter.training(step, row)
            if step == 1 and self.plan.forecast is not None:
                say(self.console, self.plan.forecast.compare(peak_memory_gib(self.policy.device)))
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
            return self.window.read({"grad_norm": grad_norm}, ranks=self.ranks)
        also = {"grad_norm": grad_norm, "all_finite": self.watch.all_finite}
        row = self.window.read(also, ranks=self.ranks, device=self.policy.device)
        self.watch.check(all_finite=bool(row.pop("all_finite")))
        return row

    def save(self) -> None:
        """Write a checkpoint of this step, if there is none yet.

        Raises:
            TrainingError: something in it is not finite; nothing was written.
        """
        self.watch.check()
        if self.saved_step != self.step:
            state, part = self.state_dict(), self.part()
            needed = self.check_finite(state | part)
            weights = self.policy.whole_weights()

            def write(folder: Path) -> None:
                """Called in the first process; the others write their parts meanwhile."""
                self.ranks.first(str(folder))
                self.write_part(folder, part)
                self.policy.save(folder, self.tokenizer, weights=weights)
                save_state(folder / STATE_FILE, state)
                self.ranks.wait()

            if self.ranks.is_writer:
                save_checkpoint(self.output_dir, self.step, write, keep=self.config.save_total_limit, needed=needed)
            else:
                self.write_part(Path(self.ranks.first("")), part)
                self.ranks.wait()
            self.ranks.wait()
        self.saved_step = self.step

    def part(self) -> dict[str, Any]:
        """What each process writes into a file of its own, if it holds a part of the weights; else empty."""
        if not self.policy.is_split:
            return {}
        part = {"optimizer": self.optimizer.state_dict()}
        if self.reference.moving is not None:
            part["moving_reference"] = self.reference.moving.state_dict()
        return part

    def write_part(self, folder: Path, part: dict[str, Any]) -> None:
        """Write what this process alone holds."""
        if part:
            path = folder / part_file(self.ranks.rank, self.ranks.world_size)
            with write_errors(path):
                save_state(path, part)

    def save_final(self) -> Path:
        """Write the trained model.

        Raises:
            TrainingError: a weight is not finite; nothing was written.
        """
        needed = self.check_finite({})
        weights = self.policy.whole_weights()
        model_dir = self.output_dir / FINAL_FOLDER
        if self.ranks.is_writer:
            write_folder_atomically(model_dir, partial(self.write_final, weights), needed=needed)
            if self.config.merge_final:
                say(self.console, write_merged(self.config, model_dir, self.tokenizer))
            self.folder.finish()
        self.ranks.wait()
        return model_dir

    def check_finite(self, state: dict[str, Any]) -> int:
        """The bytes of the weights and of a state, all of whose numbers are finite.

        Raises:
            TrainingError: one is not.
        """
        tensors = [*self.policy.saved_weights().items(), *tensors_of(state, "state")]
        check_tensors(tensors, self.step, self.output_dir, self.ranks)
        return sum(tensor.nbytes for _, tensor in tensors)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and rewards on the held-out pairs, under names that begin with `eval_`."""
        average = PairAverage()
        batches = (self.held_out.pack(packed) if packed else None for packed in self.held_out_packs)
        with self.policy.without_dropout():
            for metrics in self.loss.metrics(batches):
                average.add(metrics)
        return {f"eval_{name}": value for name, value in self.over_ranks(average).read().items()}

    def write_final(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the Hugging Face folder of the trained model, in the dtype that it is to be used in."""
        config = self.config
        if self.policy.adapter is not None:
            self.policy.save(folder, self.tokenizer)
            return
        saved = saved_dtype(
            *(weights, config.model, config.save_dtype),
            adapter_base=config.adapter_base,
            trust_remote_code=config.trust_remote_code,
        )
        if saved.reason:
            say(self.console, saved.reason)
        self.policy.save(folder, self.tokenizer, saved.dtype, weights=weights)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, and what is in the processes' parts."""
        parts = self.ranks.world_size if self.policy.is_split else 0
        state = {
            "step": self.step,
            "run": self.folder.run,
            "settings": settings_text(self.config),
            "rows": self.rows,
            "compute_dtype": str(self.policy.compute_dtype),
            "parts": parts,
            "optimizer": {} if parts else self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "sampler": self.sampler.state_dict(),
            "rng": torch.get_rng_state(),
            "reference": self.reference.fingerprint,
            "reference_digests": self.reference.digests,
        }
        if self.policy.adapter is not None:
            state["base"] = self.policy.adapter.base_fingerprint
        if self.draws_on_device:
            state["device_rng"] = {"state": torch.cuda.get_rng_state(self.policy.device)}
        if self.reward_shift is not None:
            state["reward_shift"] = self.reward_shift.state_dict()
        if self.reference.moving is not None and not parts:
            state["moving_reference"] = self.reference.moving.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], checkpoint: Path) -> None:
        """Restore from `state_dict`, which may come from other settings as far as `resume.RULES` allow.

        Raises:
            UserError: a part is missing or does not fit.
        """
        self.step, self.run_id = state["step"], state["run"]
        state = self._with_parts(state, checkpoint)
        restorers = dict(self._restorers())
        check_state(state, dict.fromkeys(restorers.keys() - STATE_TYPES.keys(), dict))
        for part, restore in restorers.items():
            with restoring(part):
                restore(state[part])
        with restoring("schedule"):
            restore_schedule(self.schedule, state["schedule"], self.step)

    def _with_parts(self, state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
        """The state, with what this process needs of the files that processes wrote for themselves."""
        is_shared, num_parts = self.policy.is_split, state["parts"]
        is_own = num_parts == (self.ranks.world_size if is_shared else 0)
        if not num_parts:
            return state | {"optimizer": {"parts": [state["optimizer"]], "is_own": is_own}}
        wanted = [self.ranks.rank] if is_own else range(num_parts)
        parts = [load_state(checkpoint / part_file(rank, num_parts)) for rank in wanted]
        for part in parts:
            check_state(part, {"optimizer": dict})
        if self.reference.moving is not None:
            if not is_own:
                raise UserError(
                    "--resume: a reference that follows the policy is read by as many processes as wrote it, "
                    f"which was {num_parts}"
                )
            state = state | {"moving_reference": parts[0].get("moving_reference")}
        return state | {"optimizer": {"parts": [part["optimizer"] for part in parts], "is_own": is_own}}

    def _restorers(self) -> Iterator[tuple[str, Callable[[Any], object]]]:
        yield "sampler", self._restore_sampler
        yield "optimizer", self._restore_optimizer
        if self.reward_shift is not None:
            yield "reward_shift", self._restore_reward_shift
        if self.reference.moving is not None:
            yield "moving_reference", self.reference.moving.load_state_dict
        yield "rng", torch.set_rng_state
        if self.draws_on_device:
            yield "device_rng", lambda state: torch.cuda.set_rng_state(state["state"], self.policy.device)

    @property
    def draws_on_device(self) -> bool:
        """Whether a GPU's random numbers count: an adapter's dropout draws them."""
        return self.policy.has_dropout and self.policy.device.type == "cuda"

    def _restore_sampler(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)
        if state["step"] != self.step:
            raise ValueError(f"it is at step {state['step']}, the run at {self.step}")

    def _restore_reward_shift(self, state: dict[str, Any]) -> None:
        assert self.reward_shift is not None, "only asked for where there is one"
        self.reward_shift.load_state_dict(state)
        _ = self.reward_shift.value  # fails on what is no number

    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        own = OPTIMIZERS[optimizer_name(self.config)]
        ranks = self.ranks if self.policy.is_split else ONE_PROCESS
        with own_settings(self.optimizer):
            if state["is_own"]:
                converted = load_optimizer_state(self.optimizer, state["parts"][0], own.state_format)
            else:
                converted = load_parts(self.optimizer, state["parts"], own.state_format, ranks)
        if converted:
            say(self.console, f"converted the optimizer's state from the format of {converted}")
        check_moments(self.optimizer)


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one; None and 0 mean never."""
    return bool(every) and step % every == 0  # type: ignore[operator]
