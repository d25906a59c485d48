"""Time whole DPO steps of an 8B and a 1B shape on one GPU, dpo-fast against TRL; each part has its own time limit.

    python benchmarks/gpu_step.py --data rows.jsonl --out benchmarks/results/NAME.json
    python benchmarks/gpu_step.py --data rows.jsonl --out benchmarks/results/NAME.json --resume --only trl-default:32
    python benchmarks/gpu_step.py --shape tiny --out FILE                                             # on a CPU

A model with random bf16 weights is written once to memory-backed disk. Each contestant loads it in its own process and
trains it with bitsandbytes' 8-bit AdamW on the same rows, 8 or 32 pairs per step in micro-batches of 8:

- `dpo-fast`: packs of at most 4 x max_length tokens;
- `trl-tuned`: TRL with the reference scored before training;
- `trl-default`: TRL's defaults, which keep a reference model in memory. Both use gradient checkpointing (its default).

"Until step 1" runs from the first call of the library (imports excluded) to the end of the first step: it includes
loading, tokenization, reference scoring and, unless an earlier run filled Triton's cache, compilation. Steps are timed
end to end with the device synchronized; one extra step runs under the profiler. A model is its own reference before
training, so the first loss must be ln 2; a contestant with another first loss gets no speed.

A part that fails or has no time left is reported, and the others still run. Results are written after each part. The
default --budget is too short for all parts of both shapes: rerun with `--resume` for those that are missing. The exit
code is 0 only if every part passes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import step_contestants
import torch
from environment import environment
from parts import card, check_can_write, earlier_results, end_with_children, run_limited, source_digest
from step_contestants import ANSWER_WORDS, CONTESTANTS, LONGEST, PROMPT_WORDS, SETTINGS, Contest, Making

from dpo_fast.files import write_file_atomically

PACKAGES = ("dpo-fast", "torch", "triton", "transformers", "trl", "accelerate", "bitsandbytes", "datasets")
NEEDED = {name: ("bitsandbytes", "trl", "datasets") if "trl" in name else ("bitsandbytes",) for name in CONTESTANTS}
# How far the first loss may be from ln 2. TRL's bf16 forwards with and without gradients may round differently.
OWN_TOLERANCE, PEERS_TOLERANCE = 1e-3, 2e-2
MEMORY_DISK = Path("/dev/shm")


@dataclass(frozen=True)
class Shape:
    """A model's size and how to run it.

    Attributes:
        architecture: arguments of `LlamaConfig`.
        vocabulary: vocabulary size of the tokenizer trained on the rows.
        gigabytes: size of the weights.
        pairs: pairs per optimizer step, for the small batch and the large one.
        micro: pairs per micro-batch.
        steps: timed steps, for the small batch and the large one.
        warmup: how many of the timed steps to discard.
        max_length: tokens of a prompt with one answer.
        least_seconds: do not start a part with less time left.
    """

    architecture: dict[str, Any]
    vocabulary: int
    gigabytes: float
    pairs: tuple[int, int]
    micro: int
    steps: tuple[int, int]
    warmup: int
    max_length: int
    least_seconds: float

    @property
    def max_tokens_per_batch(self) -> int:
        """Tokens of a pack: room for about 8 pairs of average length, like a micro-batch of TRL's."""
        return 4 * self.max_length


LLAMA = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}
BIG = {"vocabulary": 8192, "pairs": (8, 32), "micro": 8, "steps": (9, 5), "warmup": 3, "max_length": 2048}
SHAPES = {
    "8b": Shape(  # Llama-3-8B
        LLAMA
        | {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "intermediate_size": 14_336,
            "tie_word_embeddings": False,
        },
        gigabytes=16.1,
        least_seconds=40,
        **BIG,
    ),
    "1b": Shape(  # Llama-3.2-1B
        LLAMA | {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "tie_word_embeddings": True},
        gigabytes=2.5,
        least_seconds=25,
        **BIG,
    ),
    "tiny": Shape(  # for a CPU
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 1024,
            "tie_word_embeddings": True,
        },
        vocabulary=1024,
        gigabytes=0.001,
        pairs=(2, 4),
        micro=2,
        steps=(2, 2),
        warmup=1,
        max_length=128,
        least_seconds=5,
    ),
}


@dataclass(frozen=True)
class Part:
    """A contestant at a shape and a number of pairs per step."""

    shape: str
    contestant: str
    pairs: int

    @property
    def name(self) -> str:
        """Name in the results and on the terminal."""
        return f"{self.shape} {self.contestant} {self.pairs}"

    def is_named(self, choices: list[str]) -> bool:
        """Whether one of `choices`, each NAME or NAME:PAIRS, selects this part."""
        return self.contestant in choices or f"{self.contestant}:{self.pairs}" in choices

    @property
    def steps(self) -> int:
        """Timed steps by default."""
        shape = SHAPES[self.shape]
        return shape.steps[shape.pairs.index(self.pairs)]


def choose_parts(shapes: list[str], only: list[str]) -> list[Part]:
    """Parts in order of value: the small batch first."""
    parts = [
        Part(name, contestant, pairs) for name in shapes for pairs in SHAPES[name].pairs for contestant in CONTESTANTS
    ]
    for choice in only:
        if not any(part.is_named([choice]) for part in parts):
            sys.exit(f"--only {choice}: no such part; there are {', '.join(part.name for part in parts)}")
    return [part for part in parts if not only or part.is_named(only)]


class Runner:
    """Runs parts within the time budget and keeps the results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.monotonic()
        self.machine = {"card": card(), **environment(PACKAGES)}
        self.data = describe_data(args.data)
        self.record: dict[str, Any] = {}
        if args.resume:
            self.record = earlier_results(args.out)
        self.record["machine"] = self.machine
        self.record.setdefault("models", {})
        self.record.setdefault("parts", {})

    @property
    def left(self) -> float:
        """Seconds left."""
        return float(self.args.budget - (time.monotonic() - self.started))

    def steps(self, part: Part) -> int:
        """Timed steps of a part."""
        return int(self.args.steps or part.steps)

    def settings(self, part: Part) -> dict[str, Any]:
        """Everything a part's figures depend on; `--resume` does not rerun a part whose settings are unchanged."""
        shape = SHAPES[part.shape]
        settings = SETTINGS | CONTESTANTS[part.contestant]
        settings |= {"architecture": shape.architecture, "max_length": shape.max_length, "data": self.data}
        settings |= {"pairs": part.pairs, "micro": shape.micro, "steps": self.steps(part), "warmup": shape.warmup}
        if part.contestant == "dpo-fast":
            settings |= {"max_tokens_per_batch": shape.max_tokens_per_batch, "source": source_digest()}
        settings["allocator"] = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        return settings | {"card": self.machine["card"], "versions": self.machine["versions"]}

    def is_done(self, part: Part) -> bool:
        """Whether the results hold this part already."""
        found = self.record["parts"].get(part.name, {})
        return "error" not in found and found.get("settings") == self.settings(part)

    def keep(self, part: Part, found: dict[str, Any]) -> None:
        """Record a part's figures or error, and print them."""
        self.record["parts"][part.name] = {"settings": self.settings(part)} | found
        self.record["seconds"] = time.monotonic() - self.started
        self.write()
        print(f"{part.name}: {summary(found)} ({self.record['seconds']:.0f} s)", flush=True)

    def write(self) -> None:
        """Write the results file."""
        write_file_atomically(self.args.out, json.dumps(self.record, indent=1) + "\n")

    def run_shape(self, name: str, parts: list[Part]) -> None:
        """The parts of one shape that are not done yet: its model first."""
        reason = {part: missing(part) for part in parts}
        for part in parts:
            if reason[part]:
                self.keep(part, {"error": reason[part]})
        parts = [part for part in parts if not reason[part]]
        if not parts:
            return
        with model_folder(self.args.keep, name, SHAPES[name].gigabytes) as folder:
            error = self.make(name, folder, {self.steps(part) * part.pairs + part.pairs for part in parts})
            for part in parts:
                self.keep(part, {"error": error} if error else self.run(part, folder))

    def make(self, name: str, folder: Path, rows: set[int]) -> str | None:
        """Write model and rows, in another process so that this one holds no GPU memory; returns an error or None."""
        shape = SHAPES[name]
        if self.left < shape.least_seconds:
            return "no time left"
        data = str(self.args.data.resolve()) if self.args.data else None
        making = Making(
            str(folder),
            shape.architecture,
            shape.vocabulary,
            data,
            sorted(rows),
            shape.max_length,
            str(folder / "made.json"),
        )
        found = run_process("make", making, self.left)
        if "error" in found:
            return f"no model: {found['error']}"
        self.record["models"].setdefault(name, {}).update(found)
        print(f"{name}: model and rows are made ({time.monotonic() - self.started:.0f} s)", flush=True)
        return None

    def run(self, part: Part, folder: Path) -> dict[str, Any]:
        """Run a part; returns its figures or its error."""
        shape, steps = SHAPES[part.shape], self.steps(part)
        if self.left < shape.least_seconds:
            return {"error": "no time left"}
        rows = (steps + 1) * part.pairs
        contest = Contest(
            contestant=part.contestant,
            model=str(folder / "model"),
            data=str(folder / f"rows-{rows}.jsonl"),
            pairs=part.pairs,
            micro=shape.micro,
            steps=steps,
            warmup=min(shape.warmup, steps - 1),
            max_length=shape.max_length,
            max_tokens_per_batch=shape.max_tokens_per_batch,
            tokens_per_pair=self.record["models"][part.shape][f"tokens a pair, {rows} rows"],
            fail=part.is_named(self.args.fail),
            out=str(folder / "contest.json"),
        )
        return checked(run_process("contest", contest, min(self.args.limit, self.left)), part.contestant)


def checked(found: dict[str, Any], contestant: str) -> dict[str, Any]:
    """`found`, with an error if a figure is missing, and without figures if the first loss is not ln 2."""
    if "profile" not in found:
        found.setdefault("error", "it ended before its last step")
    tolerance = OWN_TOLERANCE if contestant == "dpo-fast" else PEERS_TOLERANCE
    loss = found.get("first loss")
    if loss is None or abs(loss - math.log(2)) <= tolerance:
        return found
    error = f"the first loss is {loss:.5f}, not ln 2 = {math.log(2):.5f} within {tolerance}"
    return {"first loss": loss, "error": error, "log": found.get("log", [])}


def run_process(what: str, job: Making | Contest, limit: float) -> dict[str, Any]:
    """Run a job of step_contestants.py in its own process group, killed at the end or after `limit` seconds.

    Returns:
        What it reported, complete or not; if it failed, also `error` and the last lines of its `log`.
    """
    out = Path(job.out)
    out.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        # Tokens and reference scores must not come from a cache filled by another part.
        surroundings = os.environ | {"HF_HOME": scratch, "HF_HUB_OFFLINE": "1", "TMPDIR": scratch}
        surroundings["XDG_CACHE_HOME"] = scratch
        if not torch.cuda.is_available():
            surroundings["OMP_NUM_THREADS"] = "1"  # on a tiny model, threads only wait for each other
        command = [sys.executable, step_contestants.__file__, what, json.dumps(asdict(job))]
        error, lines = run_limited(command, limit, surroundings)
    found = json.loads(out.read_text()) if out.exists() else {}
    if error is None:
        return found
    if error.startswith("over its limit"):
        found["error"] = error
    elif re.search(r"out of memory|OutOfMemory|ALLOC_FAILED", found.get("error", "")):
        found["error"] = f"out of memory: {found['error']}"
    found.setdefault("error", error)
    found["log"] = lines
    print("\n".join(f"    | {line}" for line in lines))
    return found


def missing(part: Part) -> str | None:
    """Why a contestant cannot run: packages that are not installed; None if it can."""
    absent = [package for package in NEEDED[part.contestant] if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


@contextmanager
def model_folder(kept: Path | None, shape: str, gigabytes: float) -> Iterator[Path]:
    """A temporary folder for a model, in memory if there is room; or a permanent folder under `kept`."""
    if kept is not None:
        folder = kept / shape
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    in_memory = MEMORY_DISK.is_dir() and shutil.disk_usage(MEMORY_DISK).free > 1.2e9 * gigabytes
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK if in_memory else None, prefix="gpu_step_") as folder:
        yield Path(folder)


def describe_data(path: Path | None) -> str:
    """Name and hash of the rows' file, or how synthetic rows are generated."""
    if path is None:
        return (
            f"made up, seed 0: exp(N{PROMPT_WORDS}) words a prompt, exp(N{ANSWER_WORDS}) an answer, at most {LONGEST}, "
            "as fitted to UltraFeedback"
        )
    return f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def summary(found: dict[str, Any]) -> str:
    """One line about a part."""
    figures = ""
    if "ms" in found:
        figures = f"{found['ms']['median']:.0f} ms a step, {found['pairs/s']:.2f} pairs/s, {found['peak GiB']:.1f} GiB"
    return "; ".join(filter(None, (figures, found.get("error"))))


def table(parts: list[Part], results: dict[str, Any]) -> str:
    """Markdown: a line per timed part."""
    kinds = (*step_contestants.CLASSES, step_contestants.REST)
    head = ["part", "ms a step (from-to)", "pairs/s", "tokens/s", "peak GiB", "until step 1, s", "first loss"]
    lines = [[*head, *kinds, "idle"], ["---"] * (len(head) + len(kinds) + 1)]
    for part in parts:
        found = results[part.name]
        if "ms" not in found:
            continue
        ms = found["ms"]
        line = [part.name, f"{ms['median']:.0f} ({ms['min']:.0f}-{ms['max']:.0f})", f"{found['pairs/s']:.2f}"]
        line += [f"{found['unique tokens/s']:.0f}", f"{found['peak GiB']:.1f}", f"{found['until step 1, s']:.1f}"]
        line.append(f"{found['first loss']:.4f}")
        if "profile" in found:
            profile = found["profile"]
            line += [f"{profile['classes'][kind]['ms']:.0f}" for kind in kinds] + [f"{profile['idle ms']:.0f}"]
        else:
            line += ["-"] * (len(kinds) + 1)
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--data", type=Path, help=".jsonl with prompt, chosen, rejected; synthetic rows if omitted")
    shapes = ["8b", "1b"] if torch.cuda.is_available() else ["tiny"]
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=shapes)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME[:PAIRS]", help="only these parts")
    parser.add_argument("--steps", type=int, help="timed steps per part, including warm-up")
    parser.add_argument("--limit", type=float, default=150, help="seconds per part")
    parser.add_argument("--budget", type=float, default=290, help="seconds for all parts")
    parser.add_argument("--resume", action="store_true", help="keep parts in --out that ran with the same settings")
    parser.add_argument("--keep", type=Path, help="keep the models in this folder for a later call")
    parser.add_argument("--fail", nargs="+", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data {args.data}: no such file")
    if args.steps is not None and args.steps < 2:
        parser.error("--steps: expected 2 or more")
    return args


def main() -> int:
    """Run the parts in turn."""
    end_with_children()
    args = parse_args()
    check_can_write(args.out)
    runner = Runner(args)
    parts = choose_parts(args.shape, args.only)
    for name in args.shape:
        due = [part for part in parts if part.shape == name and not runner.is_done(part)]
        runner.run_shape(name, due)
    results = runner.record["parts"]
    print(table(parts, results))
    failed = [f"{part.name}: {results[part.name]['error']}" for part in parts if "error" in results[part.name]]
    print("".join(f"{line}\n" for line in failed), end="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
