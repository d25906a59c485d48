"""`dpo-fast demo`: the whole loop of preference training in a few minutes, on a CPU, with nothing downloaded.

A small Llama learns a task from scratch, half of it badly (`demo_task`). It answers training prompts, `json.loads`
says which answers parse, a parsing and a broken answer of one prompt make a preference pair, and DPO trains on the
pairs. Before and after are measured on prompts that neither stage has seen, from answers that the two models write.
"""

from __future__ import annotations

import json
import platform
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.config import DPOConfig, TrainingError, UserError
from dpo_fast.demo_measure import Written, compare, parse_shares
from dpo_fast.demo_task import (
    MAX_LENGTH,
    Answer,
    BaseSize,
    Fields,
    example_answer,
    generate,
    make_model,
    make_prompts,
    make_tokenizer,
    parses,
    prompt_text,
    train_base,
)
from dpo_fast.intervals import Estimate, bootstrap_interval
from dpo_fast.plots import draw_bars, draw_panels, make_figure
from dpo_fast.progress import progress_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpo_fast.trainer import TrainResult

MARKER = ".dpo-fast-demo"
STORE = "reference.sqlite"
OUTPUTS = (
    *("base", "pairs.jsonl", STORE, f"{STORE}-shm", f"{STORE}-wal", "run"),
    *("samples.jsonl", "plot.png", "summary.json"),
)
TEMPERATURE = 1.0
POOL = 4000
SHOWN_SAMPLES = 4
SHOWN_SETTINGS = ("loss_type", "beta", "learning_rate", "num_train_epochs", "per_device_train_batch_size")
SHOWN_PACKAGES = ("dpo-fast", "torch", "transformers")
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
        samples: sampled answers of each of them, before and after.
    """

    base: BaseSize
    pair_prompts: int
    answers: int
    held_out: int
    samples: int


FULL = Size(BaseSize(160, 4, steps=400, batch=32), pair_prompts=600, answers=4, held_out=200, samples=4)
QUICK = Size(BaseSize(96, 2, steps=220, batch=32), pair_prompts=300, answers=4, held_out=100, samples=4)


def pair_answers(prompts: Sequence[str], answers: Sequence[Sequence[Answer]]) -> tuple[list[dict[str, str]], int]:
    """Preference rows: for each prompt its first answer that parses against its first that does not.

    Returns:
        The rows in the form of `dpo-fast train --data`, and how many prompts gave none because all their answers
        parse or none does.
    """
    rows = []
    for prompt, written in zip(prompts, answers, strict=True):
        texts = [answer.text for answer in written]
        chosen = next((text for text in texts if parses(text)), None)
        rejected = next((text for text in texts if not parses(text)), None)
        if chosen is not None and rejected is not None:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows, len(prompts) - len(rows)


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
        from transformers import AutoModelForCausalLM

        size, rng = self.size, random.Random(self.seed)
        torch.manual_seed(self.seed)
        prompts = make_prompts(size.held_out + size.pair_prompts + POOL, rng)
        held_out = prompts[: size.held_out]
        pair_prompts = prompts[size.held_out : -POOL]
        self.say(INTRODUCTION)
        with self.stage(
            "1. base model", "a small Llama learns, from scratch, to write JSON - from examples often broken"
        ):
            base, tokenizer, base_figures = self.make_base(rng.choices(prompts[-POOL:], k=size.base.num_examples), rng)
        with self.stage("2. preference pairs", "it answers training prompts, and json.loads says which answers parse"):
            pair_figures = self.make_pairs(base, tokenizer, [prompt_text(fields) for fields in pair_prompts])
        with self.stage("3. before", f"it answers {size.held_out} prompts that no training sees"):
            before = self.write(base, tokenizer, held_out)
        with self.stage("4. DPO", "as `dpo-fast train --model base --data pairs.jsonl` does it"):
            config, result, model_dir = self.train()
        with self.stage("5. after", "the trained model answers the same prompts with the same seed"):
            trained = AutoModelForCausalLM.from_pretrained(model_dir).eval()
            after = self.write(trained, tokenizer, held_out)
            figures = compare(base, trained, tokenizer, held_out, before, after)
        summary = {
            "seed": self.seed,
            "size": asdict(size),
            "base": base_figures,
            "pairs": pair_figures,
            "dpo": {"steps": result.step, **{name: getattr(config, name) for name in SHOWN_SETTINGS}},
            **figures,
            "seconds": self.seconds,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in SHOWN_PACKAGES}},
        }
        self.save(summary, result.metrics, held_out, before, after)
        self.report(summary, held_out, before, after)
        return summary

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

    def make_base(
        self, prompts: Sequence[Fields], rng: random.Random
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
        """Train the base model and write `base/`."""
        examples = [(prompt_text(fields), example_answer(fields, rng)) for fields in prompts]
        tokenizer = make_tokenizer([prompt + answer for prompt, answer in examples])
        model = make_model(tokenizer, self.size.base)
        with progress_line(self.console, "base model", self.size.base.steps) as line:
            loss = train_base(model, tokenizer, examples, self.size.base, line.advance)
        model.save_pretrained(self.out / "base")
        tokenizer.save_pretrained(self.out / "base")
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
        return model, tokenizer, figures

    def make_pairs(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
    ) -> dict[str, Any]:
        """Sample, label, pair, and write `pairs.jsonl`."""
        size = self.size
        answers = generate(model, tokenizer, prompts, samples=size.answers, temperature=TEMPERATURE, seed=self.seed)
        rows, num_alike = pair_answers(prompts, answers)
        if not rows:
            raise TrainingError(
                "the base model's answers all parse or all fail, so there is nothing to compare: try another --seed"
            )
        (self.out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.say(
            f"{len(prompts)} prompts x {size.answers} answers: {len(rows)} pairs; {num_alike} prompts whose answers "
            "all parse or all fail give none. For example"
        )
        self.say("\n".join(f"  {name:<8} {text.strip()}" for name, text in rows[0].items()))
        return {"prompts": len(prompts), "answers": len(prompts) * size.answers, "pairs": len(rows), "alike": num_alike}

    def write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: Sequence[Fields]) -> Written:
        """Answer the held-out prompts, by sampling and greedily."""
        prompts = [prompt_text(fields) for fields in held_out]
        # Another seed than the pairs', the same before and after.
        sampled = generate(
            model, tokenizer, prompts, samples=self.size.samples, temperature=TEMPERATURE, seed=self.seed + 1
        )
        greedy = [answers[0] for answers in generate(model, tokenizer, prompts, temperature=0)]
        written = Written(sampled, greedy)
        self.say(f"{bootstrap_interval(parse_shares(written)).percent()} of the sampled answers parse")
        return written

    def train(self) -> tuple[DPOConfig, TrainResult, Path]:
        """Train on `pairs.jsonl`, a tenth held out, exactly as a user would."""
        from dpo_fast.trainer import train

        config = DPOConfig(
            model=str(self.out / "base"),
            data=str(self.out / "pairs.jsonl"),
            output_dir=str(self.out / "run"),
            reference_store=str(self.out / STORE),
            device="cpu",
            max_length=MAX_LENGTH,
            beta=0.5,
            # Twice this rate sinks broken answers so far that some seeds move their mass to new breakages.
            learning_rate=3e-5,
            warmup_steps=0.1,
            num_train_epochs=4,
            per_device_train_batch_size=8,
            eval_split=0.1,
            eval_steps=20,
            save_steps=0,
            seed=self.seed,
        )
        result = train(config, console=self.console)
        if result.model_dir is None:
            raise KeyboardInterrupt
        return config, result, result.model_dir

    def save(
        self,
        summary: dict[str, Any],
        metrics: list[dict[str, Any]],
        held_out: Sequence[Fields],
        before: Written,
        after: Written,
    ) -> None:
        """Write `samples.jsonl`, `plot.png` and, last, `summary.json`."""
        samples = [
            {
                "prompt": prompt_text(fields),
                **{
                    name: {"greedy": written.greedy[i].text, "sampled": [answer.text for answer in written.sampled[i]]}
                    for name, written in (("before", before), ("after", after))
                },
            }
            for i, fields in enumerate(held_out)
        ]
        (self.out / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
        plot_demo(summary, metrics, self.out / "plot.png")
        (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def report(self, summary: dict[str, Any], held_out: Sequence[Fields], before: Written, after: Written) -> None:
        """Print before and after."""
        self.console.print(figures_table(summary))
        self.console.print(samples_table(held_out, before, after))
        kl = Estimate(**summary["kl_to_base"])
        logps = summary["logps"]
        change = {kind: logps["after"][kind] - logps["before"][kind] for kind in ("parsing", "broken")}
        self.say(
            f"What changed: of the answers that the base model had written, DPO moved the parsing ones by "
            f"{change['parsing']:+.2f} nats and the broken ones by {change['broken']:+.2f}. What it cost: the model is "
            f"{kl.value:.2f} nats an answer away from the base model (KL)."
        )
        self.say(
            f"{sum(self.seconds.values()):.0f} s in all. See {self.out / 'plot.png'} and {self.out / 'summary.json'}."
        )


def figures_table(summary: dict[str, Any]) -> Table:
    """Shares and log-probs before and after."""
    table = Table(title="on held-out prompts, with 95% intervals", title_justify="left", box=box.SIMPLE)
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if name == "" else "right")
    for name, label in RATE_LABELS.items():
        table.add_row(label, *(Estimate(**summary[when][name]).percent() for when in ("before", "after")))
    for kind in ("parsing", "broken"):
        row = [summary["logps"][when] for when in ("before", "after")]
        table.add_row(
            f"log-prob of the base model's {kind} answers (a token)",
            *(f"{logps[kind]:.2f} ({logps[kind + '_per_token']:.3f})" for logps in row),
        )
    return table


def samples_table(held_out: Sequence[Fields], before: Written, after: Written) -> Table:
    """Some prompts' first sampled answers side by side."""
    table = Table(title="sampled answers", title_justify="left", box=box.SIMPLE)
    for name in ("prompt", "before", "after"):
        table.add_column(name, overflow="fold")
    for i in range(SHOWN_SAMPLES):
        answers = (written.sampled[i][0].text for written in (before, after))
        table.add_row(prompt_text(held_out[i]), *(mark(text) for text in answers))
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
