"""Check and time everything that needs a GPU, in parts; write one JSON file.

    python benchmarks/gpu_check.py --out benchmarks/results/NAME.json
    python benchmarks/gpu_check.py --out benchmarks/results/NAME.json --resume --only b c
    python benchmarks/gpu_check.py --out FILE             # without a GPU: every part at a tiny size, on the CPU

The most valuable parts come first:

    a  it starts: each head kernel and attention backend; training in the default precision, and in bf16 with 8-bit Adam
    b  a whole step of an 8B shape, by gpu_step.py, which by itself runs more contestants
    c  the head: errors against fp64, bit-identical reruns, times against the bare products and other libraries
    d  shared prompts, and what a fixed order of additions costs
    e  the rest: `logprob` against a copy, a head that keeps more than 2^31 exponentials

Each part is a process with its own time limit; the parts of (a), which report no times, run in parallel. A part that
fails or has no time left is reported, and the others still run. `--resume` keeps parts that passed with the same
source, card and versions. The exit code is 0 only if every part passes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environment import environment
from gpu_step import SHAPES
from parts import card, check_can_write, earlier_results, end_with_children, run_limited, source_digest

from dpo_fast.files import write_file_atomically

PACKAGES = ("dpo-fast", "torch", "triton", "transformers", "accelerate", "bitsandbytes", "trl", "liger-kernel", "numpy")
VOCAB = 128_256
TINY_LLAMA = SHAPES["tiny"].architecture
# Large enough that full blocks of target rows, which autotune times, reach the head.
SMALL_LLAMA = TINY_LLAMA | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 32_000}
TINY_QWEN = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
TINY_QWEN |= {"num_attention_heads": 4, "num_key_value_heads": 2}
HALF_PRECISION_WEIGHTS = {"dtype": "bfloat16", "optim": "adamw_8bit"}


def training(settings: dict[str, Any], *, is_tiny: bool) -> dict[str, Any]:
    """Arguments of `gpu_start.check_training`."""
    if is_tiny:
        sizes = {"architecture": TINY_LLAMA, "vocabulary": 1024, "pairs": 2, "steps": 2, "max_length": 128}
    else:
        sizes = {"architecture": SMALL_LLAMA, "vocabulary": 8192, "pairs": 16, "steps": 4, "max_length": 1024}
    return sizes | {"settings": {"learning_rate": 1e-4, **settings}}


@dataclass(frozen=True)
class Part:
    """A function of a module in this folder.

    Attributes:
        group: letter in this module's docstring.
        name: name in the results.
        function: `module:name`; returns its figures, with faults under "failed".
        seconds: time limit.
        arguments: arguments of the function on a GPU.
        tiny: arguments on a CPU.
    """

    group: str
    name: str
    function: str
    seconds: float
    arguments: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)


PARTS = [
    *(
        Part(
            "a",
            f"the head starts, {dtype}",
            "gpu_start:check_head",
            60,
            {"rows": 1100, "vocab": 32_000, "dim": 512, "dtype": dtype},
            {"rows": 20, "vocab": 97, "dim": 16, "dtype": dtype},
        )
        for dtype in ("bfloat16", "float16", "float32")
    ),
    Part("a", "attention starts", "gpu_packs:check_attention", 60, {"ways": ["varlen", "segments", "flash_attn"]}),
    Part("a", "attention by packages starts", "gpu_packs:check_attention", 90, {"ways": ["flex", "flash_attn_3"]}),
    Part(
        "a",
        "train starts, default precision",
        "gpu_start:check_training",
        90,
        training({}, is_tiny=False),
        training({}, is_tiny=True),
    ),
    Part(
        "a",
        "train starts, bf16 weights and 8-bit Adam",
        "gpu_start:check_training",
        90,
        training(HALF_PRECISION_WEIGHTS, is_tiny=False),
        training(HALF_PRECISION_WEIGHTS, is_tiny=True),
    ),
    Part("b", "step", "gpu_check:run_step", 240, {"shape": "8b"}, {"shape": "tiny"}),
    Part(
        "c",
        "errors",
        "gpu_head:check_errors",
        60,
        {
            "sizes": [
                (256, 32_000, 512, 2.0),
                (256, VOCAB, 2048, 20.0),
                (1024, 32_000, 4096, 2.0),
                (256, VOCAB, 2048, 60.0),
            ]
        },
        {"sizes": [(16, 97, 16, 2.0), (16, 97, 16, 20.0)]},
    ),
    Part(
        "c",
        "bits",
        "gpu_head:check_bits",
        60,
        {"rows": 2500, "vocab": VOCAB, "dim": 2048},
        {"rows": 24, "vocab": 97, "dim": 16},
    ),
    Part(
        "c",
        "head N 8192 D 4096",
        "gpu_head:time_head",
        90,
        {"rows": 8192, "vocab": VOCAB, "dim": 4096},
        {"rows": 32, "vocab": 512, "dim": 32, "rounds": 2},
    ),
    Part(
        "c",
        "head N 8192 D 2048",
        "gpu_head:time_head",
        90,
        {"rows": 8192, "vocab": VOCAB, "dim": 2048},
        {"rows": 32, "vocab": 512, "dim": 16, "rounds": 2},
    ),
    Part(
        "d",
        "sharing",
        "gpu_packs:time_sharing",
        90,
        {"sizes": {}, "lengths": [(512, 512), (2048, 512), (4096, 64)]},
        {"sizes": TINY_QWEN, "lengths": [(16, 8)], "rounds": 2},
    ),
    Part(
        "d",
        "determinism",
        "gpu_packs:time_determinism",
        60,
        {"sizes": {}, "prompt": 512, "answer": 384, "pairs": 6},
        {"sizes": TINY_QWEN, "prompt": 16, "answer": 8, "pairs": 2, "rounds": 2},
    ),
    Part("e", "logprob", "gpu_head:time_logprob", 40, {"rows": 8192, "vocab": VOCAB}, {"rows": 16, "vocab": 97}),
    Part(
        "e",
        "more than 2^31 exponentials",
        "gpu_head:check_large",
        60,
        {"rows": 17_408, "vocab": VOCAB, "dim": 512},
        {"rows": 40, "vocab": 97, "dim": 32},
    ),
]


def run_step(shape: str, seconds: float = 230) -> dict[str, Any]:
    """Only dpo-fast, at the smaller number of pairs, by gpu_step.py."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "step.json"
        script = str(Path(__file__).with_name("gpu_step.py"))
        options = ["--shape", shape, "--only", f"dpo-fast:{SHAPES[shape].pairs[0]}", "--budget", str(seconds)]
        error, lines = run_limited([sys.executable, script, *options, "--out", str(out)], seconds)
        found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    return found | {"failed": [error, *lines] if error else []}


def run_part(part: Part, out: Path, *, is_tiny: bool, fail: bool) -> int:
    """Run a part in this process and write its results to `out`."""
    module, name = part.function.split(":")
    try:
        if fail:
            raise RuntimeError("made to fail")
        found = getattr(importlib.import_module(module), name)(**(part.tiny if is_tiny else part.arguments))
    except Exception as error:
        traceback.print_exc()
        found = {"failed": [f"{type(error).__name__}: {str(error).strip()[:300]}"]}
    out.write_text(json.dumps(found))
    return 1 if found["failed"] else 0


class Runner:
    """Runs parts within the time budget and keeps their results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.monotonic()
        self.stamp = {"card": card(), "source": source_digest(), "versions": environment(PACKAGES)["versions"]}
        self.record: dict[str, Any] = {}
        if args.resume:
            self.record = earlier_results(args.out)
        self.record |= {"machine": {**environment(PACKAGES), **self.stamp}}
        self.record.setdefault("parts", {})
        self.lock = threading.Lock()

    def is_done(self, part: Part) -> bool:
        """Whether it has passed before with the same source, card and versions."""
        found = self.record["parts"].get(part.name, {})
        return not found.get("failed", True) and found.get("stamp") == self.stamp

    def run(self, part: Part) -> None:
        """Run a part and write its results."""
        left = self.args.budget - (time.monotonic() - self.started)
        start = time.monotonic()
        found = {"failed": ["no time left"]} if left < min(part.seconds / 2, 20) else self.call(part, left)
        found |= {"stamp": self.stamp, "seconds": time.monotonic() - start}
        with self.lock:
            self.record["parts"][part.name] = found
            self.record["seconds"] = time.monotonic() - self.started
            write_file_atomically(self.args.out, json.dumps(self.record, indent=1) + "\n")
        verdict = "; ".join(found["failed"]) or "passed"
        print(f"({part.group}) {part.name}: {verdict} ({found['seconds']:.0f} s)", flush=True)

    def call(self, part: Part, left: float) -> dict[str, Any]:
        """A part's results, or why it did not finish."""
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "found.json"
            command = [sys.executable, __file__, "--out", str(out), "--part", part.name]
            command += ["--tiny"] if self.args.tiny else []
            command += ["--fail", part.name] if part.name in self.args.fail else []
            # Other parts run at the same time, so autotune's choices must not end up in the user's cache.
            error, lines = run_limited(command, min(part.seconds, left), os.environ | {"XDG_CACHE_HOME": scratch})
            found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"failed": [error]}
        if error is None:
            return found
        return found | {"log": lines}


def parse_args() -> argparse.Namespace:
    """Command line."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    names = [part.name for part in PARTS]
    groups = sorted({part.group for part in PARTS})
    parser.add_argument("--only", nargs="+", choices=[*groups, *names], help="only these groups or parts")
    parser.add_argument("--budget", type=float, default=560, help="seconds for all parts")
    parser.add_argument("--resume", action="store_true", help="keep parts in --out that passed")
    parser.add_argument("--tiny", action="store_true", default=not torch.cuda.is_available(), help="tiny sizes")
    parser.add_argument("--fail", nargs="+", default=[], choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the parts."""
    end_with_children()
    args = parse_args()
    if args.part:
        part = next(part for part in PARTS if part.name == args.part)
        return run_part(part, args.out, is_tiny=args.tiny, fail=bool(args.fail))
    check_can_write(args.out)
    runner = Runner(args)
    wanted = [part for part in PARTS if not args.only or {part.group, part.name} & set(args.only)]
    due = [part for part in wanted if not runner.is_done(part)]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        list(pool.map(runner.run, [part for part in due if part.group == "a"]))
    for part in due:
        if part.group != "a":
            runner.run(part)
    failed = [part.name for part in wanted if runner.record["parts"][part.name]["failed"]]
    print(f"{len(wanted) - len(failed)} of {len(wanted)} parts passed in {runner.record['seconds']:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
