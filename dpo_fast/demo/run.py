"""`dpo-fast demo`: the whole loop of preference training in a few minutes, on a CPU, with no downloads.

A small Llama learns a task from scratch, half of it badly (`task`). From there on every stage is a command of this
program, shown with its settings: sample answers, label them by whether they parse as JSON, pair them, train, evaluate
on prompts that no stage has seen, report.
"""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from dpo_fast.analysis.evaluate import evaluate
from dpo_fast.analysis.inspection import inspect_rows
from dpo_fast.analysis.run_report import write_report
from dpo_fast.config import ReportConfig
from dpo_fast.console import progress_line, say
from dpo_fast.curate.label import run_label
from dpo_fast.curate.pair import run_pair
from dpo_fast.curate.rows import write_rows
from dpo_fast.curate.sample import run_sample
from dpo_fast.demo.folder import prepare_folder, read_lines
from dpo_fast.demo.show import INTRODUCTION, command_line, conclusion, figures_table, plot_demo, samples_table
from dpo_fast.demo.stages import FULL, PARSES, QUICK, RIGHT, Size, Stages
from dpo_fast.demo.task import (
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
from dpo_fast.model.placement import busy_cpu
from dpo_fast.training.loop import TrainResult
from dpo_fast.training.run import train

POOL = 4000
SHOWN_SAMPLES = 4
SHOWN_SETTINGS = ("loss_type", "beta", "learning_rate", "num_train_epochs", "per_device_train_batch_size")
SHOWN_PACKAGES = ("dpo-fast", "torch", "transformers")


def run_demo(out: Path, *, quick: bool = False, seed: int = 0, console: Console | None = None) -> dict[str, Any]:
    """Make a model, make pairs from its answers, train on them, evaluate; everything ends up in `out`.

    Args:
        out: folder; made if it does not exist, cleared first if it holds an earlier demo.
        quick: a smaller run, under a minute.
        seed: seeds everything random; the same seed gives the same figures on one machine.
        console: where the account is printed.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: `out` holds files that no demo wrote.
        KeyboardInterrupt: Ctrl-C or a signal.
    """
    prepare_folder(out)
    console = console or Console()
    if note := busy_cpu():
        say(console, note, style="yellow")
    with torch.random.fork_rng(devices=[]):
        return _Demo(out, QUICK if quick else FULL, seed, console).run()


class _Demo:
    """One run; `run` reads top to bottom, and the methods follow in its order."""

    def __init__(self, out: Path, size: Size, seed: int, console: Console) -> None:
        self.out = out
        self.size = size
        self.seed = seed
        self.console = console
        self.stages = Stages(out, size, seed)
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        size, rng = self.size, random.Random(self.seed)
        torch.manual_seed(self.seed)
        prompts = make_prompts(size.held_out + size.pair_prompts + POOL, rng)
        self.write_prompts("held_out_prompts.jsonl", prompts[: size.held_out])
        self.write_prompts("prompts.jsonl", prompts[size.held_out : -POOL])
        self.console.print(Text(INTRODUCTION))
        with self.stage("1. base model", "a small Llama learns to write JSON from scratch, some of it broken"):
            base = self.make_base(rng.choices(prompts[-POOL:], k=size.base.num_examples), rng)
        with self.stage("2. sample", "it answers each training prompt several times"):
            self.command("sample", run_sample, self.stages.sampling())
        with self.stage("3. label", "json.loads says which answers parse; whether they are right is only measured"):
            self.command("label", run_label, self.stages.labelling())
        with self.stage("4. pair", "an answer that parses against one to the same prompt that does not"):
            pairs = self.make_pairs()
        with self.stage("5. train", "the base model's log-probs are stored once, then DPO"):
            result = self.train()
        with self.stage("6. evaluate", f"both models answer {size.held_out} prompts that no training has seen"):
            figures = self.evaluate()
        with self.stage("7. report", "what was learned, and by which words"):
            self.report(result)
        summary = self.summary(base, pairs, result, figures)
        plot_demo(summary, result.metrics, self.path("plot.png"))
        self.path("summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self.conclude(summary)
        return summary

    def path(self, name: str) -> Path:
        return self.out / name

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        self.console.print(Text.assemble("\n", (name, "bold"), f"  {what}"))
        start = time.perf_counter()
        yield
        seconds = round(time.perf_counter() - start, 2)
        self.seconds[name.split(". ")[-1]] = seconds
        self.console.print(Text(f"{seconds:.1f} s", style="dim"))

    def command(self, name: str, run: Any, config: Any) -> Any:
        """Show a stage as the command that does the same, and run it."""
        say(self.console, command_line(name, config), style="dim")
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
        model.save_pretrained(self.path("base"))
        tokenizer.save_pretrained(self.path("base"))
        figures = {
            "parameters": model.num_parameters(),
            "examples": len(examples),
            "examples_that_parse": float(np.mean([parses(answer) for _, answer in examples])),
            "loss": loss,
        }
        say(
            self.console,
            f"{figures['parameters'] / 1e6:.2f}M parameters, {len(examples)} examples of which "
            f"{figures['examples_that_parse']:.0%} parse, final loss {loss:.3f}",
        )
        return figures

    def make_pairs(self) -> dict[str, int]:
        """Write `pairs.jsonl` and `held_out_pairs.jsonl`, and show a pair."""
        try:
            self.command("pair", run_pair, self.stages.pairing())
        except UserError as error:
            raise TrainingError(
                "the base model's answers all parse or all fail, so there is nothing to compare: try another --seed"
            ) from error
        rows = read_lines(self.path("pairs.jsonl"))
        for name in ("prompt", "chosen", "rejected"):
            say(self.console, f"  {name:<8} {rows[0][name].strip()}")
        return {
            "prompts": self.size.pair_prompts,
            "pairs": len(rows),
            "held_out": len(read_lines(self.path("held_out_pairs.jsonl"))),
        }

    def train(self) -> TrainResult:
        result: TrainResult = self.command("train", train, self.stages.training())
        if result.model_dir is None:
            raise KeyboardInterrupt
        return result

    def evaluate(self) -> dict[str, Any]:
        """Held-out pairs and sampled answers, then the likeliest answers."""
        sampled = self.command("eval", evaluate, self.stages.sampled_evaluation())
        likeliest = self.command("eval", evaluate, self.stages.greedy_evaluation())
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
        """Write `run/report.html` and `inspect.html`."""
        assert result.model_dir is not None
        self.command("inspect", inspect_rows, self.stages.inspection(result.model_dir))
        self.command("report", write_report, ReportConfig(run=str(self.path("run"))))

    def summary(
        self, base: dict[str, Any], pairs: dict[str, int], result: TrainResult, figures: dict[str, Any]
    ) -> dict[str, Any]:
        """What `summary.json` holds."""
        config = self.stages.training()
        return {
            "seed": self.seed,
            "size": asdict(self.size),
            "base": base,
            "pairs": pairs,
            "dpo": {"steps": result.step, **{name: getattr(config, name) for name in SHOWN_SETTINGS}},
            **figures,
            "seconds": self.seconds,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in SHOWN_PACKAGES}},
        }

    def conclude(self, summary: dict[str, Any]) -> None:
        """Print before and after."""
        self.console.print(figures_table(summary))
        self.console.print(samples_table(read_lines(self.path("eval.answers.jsonl"))[:SHOWN_SAMPLES]))
        self.console.print(Text(conclusion(summary)))
        shown = [str(self.path(name)) for name in ("plot.png", "run/report.html", "inspect.html", "summary.json")]
        say(self.console, f"{sum(self.seconds.values()):.0f} s in total. See {', '.join(shown[:-1])} and {shown[-1]}.")
