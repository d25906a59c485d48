"""Train on the same rows with the same batch size and precision in dpo-fast and TRL, on one machine.

    python benchmarks/compare_trl.py --model FOLDER --data rows.jsonl --steps 4 --out benchmarks/results/NAME.json

Each contestant runs in its own process, so that peak memory is its own, and they take turns. Speed is pairs trained
divided by the seconds from the first call of the library to the last step: model loading, tokenization and reference
scoring count for all, imports for none. The losses of the first step must agree, or nothing is reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import environment

SETTINGS = {"max_length": 512, "learning_rate": 1e-6, "beta": 0.1, "seed": 42, "lr_scheduler_type": "linear"}
TUNED = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
# Changes from TRL's defaults. `drop-in` is our trainer in TRL's loop, `trl-patched` is TRL's with our log-probs.
CONTESTANTS: dict[str, dict[str, Any]] = {
    "dpo-fast": {},
    "drop-in": TUNED,
    "trl-patched": TUNED,
    "trl-tuned": TUNED,
    "trl-default": {},
}


@dataclass(frozen=True)
class Task:
    """What every contestant trains on."""

    model: str
    data: str
    steps: int
    pairs_per_micro_batch: int
    accumulation: int

    def settings(self, output_dir: str) -> dict[str, Any]:
        """Arguments that TRL's DPOConfig and ours share."""
        return SETTINGS | {
            "output_dir": output_dir,
            "max_steps": self.steps,
            "per_device_train_batch_size": self.pairs_per_micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "logging_steps": 1,
            "bf16": False,
        }


def run_dpo_fast(task: Task, scratch: str) -> dict[str, Any]:
    """Our trainer, with an empty reference store and no final model, like TRL with `save_strategy="no"`."""
    from dpo_fast.config import DPOConfig
    from dpo_fast.training import run

    class NoFinalModel(run.Trainer):
        def write_model(self, folder: Path) -> None:
            pass

    run.Trainer = NoFinalModel  # type: ignore[misc]
    config = DPOConfig(
        model=task.model,
        data=task.data,
        reference_store=f"{scratch}/reference.sqlite",
        save_steps=0,
        **task.settings(f"{scratch}/run"),
    )
    start = time.perf_counter()
    result = run.train(config)
    return {"seconds": time.perf_counter() - start, "losses": [row["loss"] for row in result.metrics]}


def run_trl(task: Task, scratch: str, name: str) -> dict[str, Any]:
    """TRL's loop, with TRL's trainer or ours."""
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer

    from dpo_fast.integrations.patch import patched
    from dpo_fast.integrations.trl import DPOTrainer

    config = trl.DPOConfig(
        **task.settings(f"{scratch}/run"), **CONTESTANTS[name], save_strategy="no", report_to="none", disable_tqdm=True
    )
    extra = {"reference_store": f"{scratch}/reference.sqlite"} if name == "drop-in" else {}
    dataset = load_dataset("json", data_files=task.data, split="train", cache_dir=f"{scratch}/cache")
    start = time.perf_counter()
    with patched() if name == "trl-patched" else nullcontext():
        trainer = (DPOTrainer if name == "drop-in" else trl.DPOTrainer)(
            task.model,
            args=config,
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(task.model),
            **extra,
        )
        trainer.train()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row]}


def contest(name: str, task: Task) -> dict[str, Any]:
    """Run one contestant in this process."""
    import torch

    # Imported lazily on first use, which would otherwise be timed.
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, get_scheduler  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from dpo_fast.training.metrics import peak_memory_gib

    with tempfile.TemporaryDirectory() as scratch:
        result = run_dpo_fast(task, scratch) if name == "dpo-fast" else run_trl(task, scratch, name)
    pairs = task.steps * task.pairs_per_micro_batch * task.accumulation
    return result | {
        "pairs_per_second": pairs / result["seconds"],
        "peak_memory_gib": peak_memory_gib(torch.device("cpu")),
    }


def take_turns(task: Task, names: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run each contestant `rounds` times, interleaved, each time in a fresh process."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names:
            command = [sys.executable, __file__, "--contestant", name, "--task", json.dumps(task.__dict__)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn + 1} {name}: {results[name][-1]}", file=sys.stderr)
    return results


def check_agreement(results: dict[str, list[dict[str, Any]]]) -> None:
    """Refuse to compare contestants that computed different things: the loss of step 1 is ln 2 for all."""
    first = {name: runs[0]["losses"][0] for name, runs in results.items()}
    if max(first.values()) - min(first.values()) > 1e-3:
        sys.exit(f"the losses of the first step differ, so no speed is reported: {first}")


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: medians over rounds, and ratios to ours."""

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in results[name])

    lines = ["| | pairs/s | dpo-fast is | peak memory, GiB |", "|---|---|---|---|"]
    ours = median("dpo-fast", "pairs_per_second")
    for name in results:
        speed = median(name, "pairs_per_second")
        lines.append(f"| {name} | {speed:.3f} | {ours / speed:.2f}x | {median(name, 'peak_memory_gib'):.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; benchmarks/smollm2.py creates one")
    parser.add_argument("--data", help=".jsonl with prompt, chosen, rejected; only the first rows are used")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=8, help="pairs per optimizer step")
    parser.add_argument("--micro", type=int, default=2, help="pairs per micro-batch")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--names", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--out", help="JSON file for the results")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        print(json.dumps(contest(arguments.contestant, Task(**json.loads(arguments.task)))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(arguments.data).read_text().splitlines()[: arguments.steps * arguments.pairs]
        data = Path(scratch) / "rows.jsonl"
        data.write_text("\n".join(rows) + "\n")
        task = Task(arguments.model, str(data), arguments.steps, arguments.micro, arguments.pairs // arguments.micro)
        results = take_turns(task, arguments.names, arguments.rounds)
    check_agreement(results)
    print(table(results))
    if arguments.out:
        record = {
            "environment": environment(("dpo-fast", "torch", "transformers", "trl")),
            "settings": SETTINGS | {"steps": arguments.steps, "pairs": arguments.pairs, "micro": arguments.micro},
            "results": results,
        }
        Path(arguments.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
