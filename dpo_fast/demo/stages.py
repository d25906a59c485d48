"""The settings of each stage's command, and how large a demo is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from dpo_fast.config import DPOConfig, EvalConfig, InspectConfig, LabelConfig, PairConfig, SampleConfig
from dpo_fast.demo.folder import STORE
from dpo_fast.demo.task import MAX_LENGTH, MAX_NEW_TOKENS, BaseSize

# What answers are trained for, and what is only measured, with weight 0.
PARSES, RIGHT = "json:object", "python:dpo_fast.demo.task:is_right"
BETA = 0.5


@dataclass(frozen=True)
class Size:
    """How large a demo is.

    Attributes:
        base: the base model and its training.
        pair_prompts: training prompts that the base model answers.
        answers: sampled answers per training prompt.
        held_out: prompts of the evaluation.
        samples: sampled answers of each model per held-out prompt.
    """

    base: BaseSize
    pair_prompts: int
    answers: int
    held_out: int
    samples: int


FULL = Size(BaseSize(160, 4, steps=400, batch=32), pair_prompts=600, answers=4, held_out=200, samples=4)
QUICK = Size(BaseSize(96, 2, steps=220, batch=32), pair_prompts=300, answers=4, held_out=100, samples=4)


@dataclass(frozen=True)
class Stages:
    """The settings of every stage, in order.

    Attributes:
        out: folder of the demo.
        size: how large it is.
        seed: seeds everything random.
    """

    out: Path
    size: Size
    seed: int

    def _path(self, name: str) -> str:
        return str(self.out / name)

    def sampling(self) -> SampleConfig:
        """Temperature 1 is the default: the model's own distribution."""
        return SampleConfig(
            model=self._path("base"),
            data=self._path("prompts.jsonl"),
            out=self._path("samples.jsonl"),
            num_samples=self.size.answers,
            max_new_tokens=MAX_NEW_TOKENS,
            generation_batch_size=256,
            device="cpu",
            seed=self.seed,
        )

    def labelling(self) -> LabelConfig:
        """Two signals, of which one counts."""
        return LabelConfig(
            data=self._path("samples.jsonl"),
            out=self._path("labelled.jsonl"),
            signals=[PARSES, RIGHT],
            signal_weights=[1.0, 0.0],
        )

    def pairing(self) -> PairConfig:
        """A tenth of the prompts is held out."""
        return PairConfig(
            data=self._path("labelled.jsonl"),
            out=self._path("pairs.jsonl"),
            eval_out=self._path("held_out_pairs.jsonl"),
            eval_split=0.1,
            seed=self.seed,
        )

    def training(self) -> DPOConfig:
        """DPO, four epochs."""
        return DPOConfig(
            model=self._path("base"),
            data=self._path("pairs.jsonl"),
            eval_data=self._path("held_out_pairs.jsonl"),
            output_dir=self._path("run"),
            reference_store=self._path(STORE),
            device="cpu",
            max_length=MAX_LENGTH,
            beta=BETA,
            # Twice this rate sinks broken answers so far that some seeds move their mass to new breakages.
            learning_rate=3e-5,
            warmup_steps=0.1,
            num_train_epochs=4,
            per_device_train_batch_size=8,
            eval_steps=20,
            save_steps=0,
            seed=self.seed,
        )

    def sampled_evaluation(self) -> EvalConfig:
        """Held-out pairs, and sampled answers to held-out prompts."""
        return EvalConfig(
            model=self._path("run/final"),
            reference=self._path("base"),
            data=self._path("held_out_pairs.jsonl"),
            prompts=self._path("held_out_prompts.jsonl"),
            out=self._path("eval.json"),
            signals=[PARSES, RIGHT],
            signal_weights=[1.0, 0.0],
            beta=BETA,
            num_samples=self.size.samples,
            max_new_tokens=MAX_NEW_TOKENS,
            generation_batch_size=256,
            reference_store=self._path(STORE),
            max_length=MAX_LENGTH,
            device="cpu",
            seed=self.seed + 1,
        )

    def greedy_evaluation(self) -> EvalConfig:
        """The likeliest answer to each held-out prompt."""
        greedy = {"data": "", "temperature": 0.0, "num_samples": 1, "out": self._path("eval_greedy.json")}
        return EvalConfig(**asdict(self.sampled_evaluation()) | greedy)

    def inspection(self, model: Path) -> InspectConfig:
        """The first held-out pair, token by token."""
        return InspectConfig(
            model=str(model),
            reference=self._path("base"),
            data=self._path("held_out_pairs.jsonl"),
            out=self._path("inspect.html"),
            rows=[0],
            beta=BETA,
            reference_store=self._path(STORE),
            max_length=MAX_LENGTH,
            device="cpu",
        )
