"""`dpo-fast demo`: the whole loop of preference training in a few minutes, on a CPU, with nothing downloaded.

A small Llama learns a task from scratch, half of it badly (`task`). From there on every stage is a command of this
program with the settings that its line shows: sample answers, label them by what parses as JSON, pair them, train,
evaluate on prompts that no stage has seen, report.
"""

from __future__ import annotations

import json
import platform
import random
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.analysis.evaluate import evaluate
from dpo_fast.analysis.inspection import inspect_rows
from dpo_fast.analysis.intervals import Estimate
from dpo_fast.analysis.plots import draw_bars, draw_panels, make_figure
from dpo_fast.analysis.run_report import write_report
from dpo_fast.config import DPOConfig, EvalConfig, InspectConfig, LabelConfig, PairConfig, ReportConfig, SampleConfig
from dpo_fast.console import progress_line
from dpo_fast.curate.label import run_label
from dpo_fast.curate.pair import run_pair
from dpo_fast.curate.rows import write_rows
from dpo_fast.curate.sample import run_sample
from dpo_fast.demo.task import (
    MAX_LENGTH,
    MAX_NEW_TOKENS,
    BaseSize,
    Fields,
    example_answer,
    make_model,
    make_prompts,
    make_tokenizer,
    parses,
    prompt_text,
    train_base,
)
from dpo_fast.errors import TrainingError, UserError
from dpo_fast.training.loop import TrainResult
from dpo_fast.training.run import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MARKER = ".dpo-fast-demo"
STORE = "reference.sqlite"
OUTPUTS = (
    *("base", "prompts.jsonl", "held_out_prompts.jsonl", "samples.jsonl", "labelled.jsonl", "pairs.jsonl"),
    *("held_out_pairs.jsonl", STORE, f"{STORE}-shm", f"{STORE}-wal", "run", "inspect.html", "plot.png", "summary.json"),
    *(f"{name}.{kind}" for name in ("eval", "eval_greedy") for kind in ("json", "answers.jsonl")),
)
POOL = 4000
SHOWN_SAMPLES = 4
SHOWN_SETTINGS = ("loss_type", "beta", "learning_rate", "num_train_epochs", "per_device_train_batch_size")
SHOWN_PACKAGES = ("dpo-fast", "torch", "transformers")
# What answers are trained for, and what is measured beside it, with weight 0.
PARSES, RIGHT = "json:object", "python:dpo_fast.demo.task:is_right"
RATE_LABELS = {
    "sampled_parse": "sampled answers that parse",
    "greedy_parse": "greedy answers that parse",
    "sampled_right": "sampled answers with the right contents",
}
INTRODUCTION = (
    "A preference pair is one prompt with two answers, one better than the other: here, one parses as JSON, one does "
    "not. DPO moves probability from the worse to the better, and holds the model near the one that it started from."
)


@dataclass(frozen=True)
class Size:
    """How much of everything a demo takes.

    Attributes:
        base: the base model and its training.
        pair_prompts: training prompts that the base model answers.
        answers: sampled answers of each of them.
        held_out: prompts of the measurement.
        samples: sampled answers of each of them, by each model.
    """

    base: BaseSize
    pair_prompts: int
    answers: int
    held_out: int
    samples: int


FULL = Size(BaseSize(160, 4, steps=400, batch=32), pair_prompts=600, answers=4, held_out=200, samples=4)
QUICK = Size(BaseSize(96, 2, steps=220, batch=32), pair_prompts=300, answers=4, held_out=100, samples=4)


def prepare_folder(out: Path) -> None:
    """Make `out`, or remove what an earlier demo left there; files that no demo wrote are never touched."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; expected a folder")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    foreign = sorted(names - {MARKER, *OUTPUTS}) if MARKER in names else sorted(names)
    if foreign:
        raise UserError(f"--out {out}: holds {foreign[0]!r}, which no demo wrote; choose a new or an empty folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).touch()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to: {error.strerror}") from error
    for name in names - {MARKER}:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def run_demo(out: Path, *, quick: bool = False, seed: int = 0, console: Console | None = None) -> dict[str, Any]:
    """Make a model, make pairs from its answers, train on them, measure; all of it ends up in `out`.

    Args:
        out: folder; made if it is not there, and cleared first if it holds an earlier demo.
        quick: a smaller run, under a minute.
        seed: of everything random; the same seed gives the same figures on one machine.
        console: where the account is printed.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: `out` holds files that no demo wrote.
        KeyboardInterrupt: Ctrl-C or a signal.
    """
    prepare_folder(out)
    with torch.random.fork_rng(devices=[]):
        return _Demo(out, QUICK if quick else FULL, seed, console or Console()).run()


class _Demo:
    """One run; `run` reads top to bottom, the methods follow in its order."""

    def __init__(self, out: Path, size: Size, seed: int, console: Console) -> None:
        self.out = out
        self.size = size
        self.seed = seed
        self.console = console
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        size, rng = self.size, random.Random(self.seed)
        torch.manual_seed(self.seed)
        prompts = make_prompts(size.held_out + size.pair_prompts + POOL, rng)
        self.write_prompts("held_out_prompts.jsonl", prompts[: size.held_out])
        self.write_prompts("prompts.jsonl", prompts[size.held_out : -POOL])
        self.say(INTRODUCTION)
        with self.stage(
            "1. base model", "a small Llama learns, from scratch, to write JSON - from broken examples, too"
        ):
            base = self.make_base(rng.choices(prompts[-POOL:], k=size.base.num_examples), rng)
        with self.stage("2. sample", "it answers training prompts, several times each"):
            self.command("sample", run_sample, self.sampling())
        with self.stage("3. label", "json.loads says which answers parse; whether they are right is measured as well"):
            self.command("label", run_label, self.labelling())
        with self.stage("4. pair", "an answer that parses against one of the same prompt that does not"):
            pairs = self.make_pairs()
        with self.stage("5. train", "the base model's log-probs are stored once, then DPO"):
            config, result = self.train()
        with self.stage("6. evaluate", f"both models answer {size.held_out} prompts that no training has seen"):
            figures = self.evaluate()
        with self.stage("7. report", "what was learned, and by which words"):
            self.report(result)
        summary = {
            "seed": self.seed,
            "size": asdict(size),
            "base": base,
            "pairs": pairs,
            "dpo": {"steps": result.step, **{name: getattr(config, name) for name in SHOWN_SETTINGS}},
            **figures,
            "seconds": self.seconds,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in SHOWN_PACKAGES}},
        }
        plot_demo(summary, result.metrics, self.path("plot.png"))
        self.path("summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self.conclude(summary)
        return summary

    def path(self, name: str) -> Path:
        return self.out / name

    def say(self, text: str) -> None:
        """Print plain text: answers are full of brackets, which rich would read as markup."""
        self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        self.console.print(Text.assemble("\n", (name, "bold"), f"  {what}"))
        start = time.perf_counter()
        yield
        self.seconds[name.split(". ")[-1]] = round(time.perf_counter() - start, 2)
        self.console.print(Text(f"{self.seconds[name.split('. ')[-1]]:.1f} s", style="dim"))

    def command(self, name: str, run: Any, config: Any) -> Any:
        """Show a stage as the command that does the same, and run it."""
        self.console.print(Text(command_line(name, config), style="dim"), soft_wrap=True)
        return run(config, console=self.console)

    def write_prompts(self, name: str, prompts: Sequence[Fields]) -> None:
        write_rows(self.path(name), [{"prompt": prompt_text(one), "fields": one} for one in prompts])

    def make_base(self, prompts: Sequence[Fields], rng: random.Random) -> dict[str, Any]:
        """Train the base model and write `base/`."""
        examples = [(prompt_text(one), example_answer(one, rng)) for one in prompts]
        tokenizer = make_tokenizer([prompt + answer for prompt, answer in examples])
        model = make_model(tokenizer, self.size.base)
        with progress_line(self.console, "base model", self.size.base.steps) as line:
            loss = train_base(model, tokenizer, examples, self.size.base, line.advance)
        save_model(model, tokenizer, self.path("base"))
        figures = {
            "parameters": model.num_parameters(),
            "examples": len(examples),
            "examples_that_parse": float(np.mean([parses(answer) for _, answer in examples])),
            "loss": loss,
        }
        self.say(
            f"{figures['parameters'] / 1e6:.2f}M parameters, {len(examples)} examples of which "
            f"{figures['examples_that_parse']:.0%} parse, final loss {loss:.3f}"
        )
        return figures

    def sampling(self) -> SampleConfig:
        """Temperature 1 is the default: the model's own distribution."""
        return SampleConfig(
            model=str(self.path("base")),
            data=str(self.path("prompts.jsonl")),
            out=str(self.path("samples.jsonl")),
            num_samples=self.size.answers,
            max_new_tokens=MAX_NEW_TOKENS,
            generation_batch_size=256,
            device="cpu",
            seed=self.seed,
        )

    def labelling(self) -> LabelConfig:
        return LabelConfig(
            data=str(self.path("samples.jsonl")),
            out=str(self.path("labelled.jsonl")),
            signals=[PARSES, RIGHT],
            signal_weights=[1.0, 0.0],
        )

    def make_pairs(self) -> dict[str, int]:
        """Write `pairs.jsonl` and `held_out_pairs.jsonl`, and show a pair."""
        config = PairConfig(
            data=str(self.path("labelled.jsonl")),
            out=str(self.path("pairs.jsonl")),
            eval_out=str(self.path("held_out_pairs.jsonl")),
            eval_split=0.1,
            seed=self.seed,
        )
        try:
            self.command("pair", run_pair, config)
        except UserError as error:
            raise TrainingError(
                "the base model's answers all parse or all fail, so there is nothing to compare: try another --seed"
            ) from error
        rows = read_lines(self.path("pairs.jsonl"))
        self.say("\n".join(f"  {name:<8} {rows[0][name].strip()}" for name in ("prompt", "chosen", "rejected")))
        return {
            "prompts": self.size.pair_prompts,
            "pairs": len(rows),
            "held_out": len(read_lines(self.path("held_out_pairs.jsonl"))),
        }

    def train(self) -> tuple[DPOConfig, TrainResult]:
        config = DPOConfig(
            model=str(self.path("base")),
            data=str(self.path("pairs.jsonl")),
            eval_data=str(self.path("held_out_pairs.jsonl")),
            output_dir=str(self.path("run")),
            reference_store=str(self.path(STORE)),
            device="cpu",
            max_length=MAX_LENGTH,
            beta=0.5,
            # Twice this rate sinks broken answers so far that some seeds move their mass to new breakages.
            learning_rate=3e-5,
            warmup_steps=0.1,
            num_train_epochs=4,
            per_device_train_batch_size=8,
            eval_steps=20,
            save_steps=0,
            seed=self.seed,
        )
        result = self.command("train", train, config)
        if result.model_dir is None:
            raise KeyboardInterrupt
        return config, result

    def evaluate(self) -> dict[str, Any]:
        """Sampled answers and held-out pairs, then the likeliest answers."""
        config = EvalConfig(
            model=str(self.path("run/final")),
            reference=str(self.path("base")),
            data=str(self.path("held_out_pairs.jsonl")),
            prompts=str(self.path("held_out_prompts.jsonl")),
            out=str(self.path("eval.json")),
            signals=[PARSES, RIGHT],
            signal_weights=[1.0, 0.0],
            beta=0.5,
            num_samples=self.size.samples,
            max_new_tokens=MAX_NEW_TOKENS,
            generation_batch_size=256,
            reference_store=str(self.path(STORE)),
            max_length=MAX_LENGTH,
            device="cpu",
            seed=self.seed + 1,
        )
        sampled = self.command("eval", evaluate, config)
        greedy = EvalConfig(
            **asdict(config)
            | {"data": "", "temperature": 0.0, "num_samples": 1, "out": str(self.path("eval_greedy.json"))}
        )
        likeliest = self.command("eval", evaluate, greedy)
        found = {
            "sampled_parse": sampled["answers"]["signals"][PARSES],
            "greedy_parse": likeliest["answers"]["signals"][PARSES],
            "sampled_right": sampled["answers"]["signals"][RIGHT],
        }
        return {
            "before": {name: one["reference"] for name, one in found.items()},
            "after": {name: one["model"] for name, one in found.items()},
            "rise": found["sampled_parse"]["rise"],
            "win_rate": sampled["answers"]["win_rate"],
            "kl_to_base": sampled["answers"]["kl"],
            "held_out_pairs": sampled["pairs"],
        }

    def report(self, result: TrainResult) -> None:
        """`run/report.html` and `inspect.html`."""
        config = InspectConfig(
            model=str(result.model_dir),
            reference=str(self.path("base")),
            data=str(self.path("held_out_pairs.jsonl")),
            out=str(self.path("inspect.html")),
            rows=[0],
            beta=0.5,
            reference_store=str(self.path(STORE)),
            max_length=MAX_LENGTH,
            device="cpu",
        )
        self.command("inspect", inspect_rows, config)
        self.command("report", write_report, ReportConfig(run=str(self.path("run"))))

    def conclude(self, summary: dict[str, Any]) -> None:
        """Print before and after."""
        self.console.print(figures_table(summary))
        self.console.print(samples_table(read_lines(self.path("eval.answers.jsonl"))[:SHOWN_SAMPLES]))
        beta, pairs = summary["dpo"]["beta"], summary["held_out_pairs"]
        chosen, rejected = (pairs[f"reward_{side}"]["value"] / beta for side in ("chosen", "rejected"))
        self.say(
            f"What changed: of the base model's own answers in held-out pairs, DPO moved the parsing ones by "
            f"{chosen:+.2f} nats and the broken ones by {rejected:+.2f}. What it cost: the model is "
            f"{summary['kl_to_base']['value']:.2f} nats an answer away from the base model (KL)."
        )
        self.say(
            f"{sum(self.seconds.values()):.0f} s in all. See {self.path('plot.png')}, {self.path('run/report.html')}, "
            f"{self.path('inspect.html')} and {self.path('summary.json')}."
        )


def command_line(name: str, config: Any) -> str:
    """The command that does what `config` says; settings at their defaults are left out."""
    words = [f"dpo-fast {name}"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            words += [f"--{field.name}", shlex.quote(json.dumps(value) if isinstance(value, list) else str(value))]
    return " ".join(words)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures_table(summary: dict[str, Any]) -> Table:
    """Shares before and after."""
    table = Table(title="on held-out prompts, with 95% intervals", title_justify="left", box=box.SIMPLE)
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if name == "" else "right")
    for name, label in RATE_LABELS.items():
        table.add_row(label, *(Estimate(**summary[when][name]).percent() for when in ("before", "after")))
    return table


def samples_table(rows: list[dict[str, Any]]) -> Table:
    """Some prompts' first sampled answers side by side."""
    table = Table(title="sampled answers", title_justify="left", box=box.SIMPLE)
    for name in ("prompt", "before", "after"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row["prompt"], *(mark(row[side][0]["text"]) for side in ("reference", "model")))
    return table


def mark(answer: str) -> Text:
    """The answer, green with a tick if it parses, else red with a cross."""
    return Text(f"✓{answer}", style="green") if parses(answer) else Text(f"✗{answer}", style="red")


def plot_demo(summary: dict[str, Any], metrics: list[dict[str, Any]], path: Path) -> None:
    """The run's curves and the rates before and after."""
    figure, axes = make_figure(2, 2)
    draw_panels(axes[:3], metrics)
    series = {
        when: [tuple(summary[when][name][key] for key in ("value", "low", "high")) for name in RATE_LABELS]
        for when in ("before", "after")
    }
    draw_bars(
        axes[3],
        "Answers to held-out prompts",
        "share of answers",
        [label.replace(" that ", "\nthat ").replace(" with ", "\nwith ") for label in RATE_LABELS.values()],
        series,
    )
    figure.savefig(path)
