"""Train a model with fp32 AdamW and with 8-bit AdamW on bf16 weights, on the same rows in the same order.

    python benchmarks/optimizer_quality.py MODEL ROWS --out benchmarks/results/NAME.json

Forward and backward run in fp32, so that the optimizers are compared and not the precision of the model. bf16 weights
are bf16 copies of the parameters, stepped by gradients rounded to bf16. The model reads either the weights that the
optimizer holds (fp32; 24 bits of bf16 weights) or, "read as bf16", these rounded to bf16, as it does where its
parameters are bf16 and where fp32 parameters run under autocast. All runs start from the same weights, which bf16 holds
exactly. Each run is one `train` in a process with a single thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from environment import environment
from rich.console import Console
from torch import Tensor, nn

from dpo_fast.config import DPOConfig
from dpo_fast.model.load import load_model, load_tokenizer
from dpo_fast.model.policy import Policy
from dpo_fast.training.fused_adamw import AdamW8bitFused
from dpo_fast.training.optimizers import optimizer
from dpo_fast.training.run import train

FIGURES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")
WINDOW = 20
# What each optimizer is compared with.
BASELINES = {
    "adamw_8bit_fused, 24 bits": "adamw_torch",
    "adamw_8bit_fused, read as bf16": "adamw_torch, read as bf16",
}


class OnCopies(torch.optim.Optimizer):
    """An optimizer of copies of the parameters in another dtype; `read` says what the model sees of a copy."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        make: Callable[..., torch.optim.Optimizer],
        dtype: torch.dtype,
        read: Callable[[Any, Tensor], Tensor],
        **settings: Any,
    ) -> None:
        super().__init__(groups, settings)
        copies = [
            {**group, "params": [nn.Parameter(p.detach().to(dtype, copy=True)) for p in group["params"]]}
            for group in self.param_groups
        ]
        self.inner, self.read = make(copies, **settings), read

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step the copies by gradients of their dtype, and let the parameters read them."""
        pairs = []
        for group, copies in zip(self.param_groups, self.inner.param_groups, strict=True):
            copies["lr"] = group["lr"]
            pairs += zip(group["params"], copies["params"], strict=True)
        for parameter, copy in pairs:
            copy.grad = None if parameter.grad is None else parameter.grad.to(copy.dtype)
        self.inner.step()
        for parameter, copy in pairs:
            parameter.copy_(self.read(self.inner, copy))


def register(name: str, *arguments: Any) -> None:
    """Let `--optim` know an optimizer on copies."""
    optimizer(name)(lambda groups, **settings: OnCopies(groups, *arguments, **settings))


register("adamw_torch, read as bf16", torch.optim.AdamW, torch.float32, lambda inner, copy: copy.bfloat16())
register("adamw_8bit_fused, 24 bits", AdamW8bitFused, torch.bfloat16, AdamW8bitFused.exact_weight)
register("adamw_8bit_fused, read as bf16", AdamW8bitFused, torch.bfloat16, lambda inner, copy: copy)


def short_rows(source: Path, target: Path, max_prompt: int) -> int:
    """Copy the rows whose prompt has at most so many characters; returns their number."""
    lines = source.read_text().splitlines()
    rows = [line for line in lines if len(json.loads(line)["prompt"]) <= max_prompt]
    target.write_text("\n".join(rows) + "\n")
    return len(rows)


def rounded_model(source: str, target: Path) -> None:
    """Save the model with weights that bf16 holds exactly, as fp32."""
    model = load_model(source, torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(target)
    load_tokenizer(source).save_pretrained(target)


def freeze_all_but(layers: int) -> Callable[..., None]:
    """A `Policy.set_trainable` that trains the last layers alone."""

    def set_trainable(policy: Policy, *, gradient_checkpointing: bool) -> None:
        policy.model.train().requires_grad_(False)
        for layer in policy.model.model.layers[-layers:]:
            layer.requires_grad_(True)

    return set_trainable


def run(folder: str, optim: str, rate: float, args: argparse.Namespace) -> tuple[str, float, dict[str, Any]]:
    """One training run: figures of the last steps, and of the held-out rows at the end."""
    torch.set_num_threads(1)
    config = DPOConfig(
        **{"model": f"{folder}/model", "data": f"{folder}/rows.jsonl", "output_dir": f"{folder}/{optim} {rate}"},
        **{"device": "cpu", "reference_store": f"{folder}/{os.getpid()}.sqlite", "optim": optim},
        **{"learning_rate": rate, "max_steps": args.steps, "max_length": args.max_length},
        **{"per_device_train_batch_size": args.pairs, "eval_split": 0.1, "logging_steps": WINDOW},
        **{"save_steps": 0, "seed": 42},
    )
    with ExitStack() as stack:
        if args.trained_layers:
            replaced = mock.patch.object(Policy, "set_trainable", freeze_all_but(args.trained_layers))
            stack.enter_context(replaced)
        result = train(config, console=Console(quiet=True))
    rows = {name: [row[name] for row in result.metrics if name in row] for name in FIGURES}
    held_out = {name: next(row[key] for row in result.metrics if (key := f"eval_{name}") in row) for name in FIGURES}
    return optim, rate, {"training": {name: values[-1] for name, values in rows.items()}, "held out": held_out}


def compare(runs: dict[str, Any]) -> dict[str, Any]:
    """How far each optimizer's figures are off those of its baseline, in percent."""
    return {
        optim: {
            where: {name: 100 * (value / runs[baseline][where][name] - 1) for name, value in figures.items()}
            for where, figures in runs[optim].items()
        }
        for optim, baseline in BASELINES.items()
        if optim in runs and baseline in runs
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[5e-7, 5e-6])
    parser.add_argument("--optimizers", nargs="+", default=[x for pair in BASELINES.items() for x in pair])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=4, help="per step")
    parser.add_argument("--trained_layers", type=int, default=0, help="0 trains all weights")
    parser.add_argument("--max_length", type=int, default=80)
    parser.add_argument("--max_prompt", type=int, default=100, help="characters")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after each run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_rows = short_rows(args.rows, Path(folder, "rows.jsonl"), args.max_prompt)
        rounded_model(args.model, Path(folder, "model"))
        runs: dict[str, dict[str, Any]] = {f"{rate:g}": {} for rate in args.learning_rates}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.processes, context) as pool:
            futures = [
                pool.submit(run, folder, optim, rate, args) for optim in args.optimizers for rate in args.learning_rates
            ]
            for future in as_completed(futures):
                optim, rate, figures = future.result()
                runs[f"{rate:g}"][optim] = figures
                record = {
                    "environment": environment(("dpo-fast", "torch", "transformers")) | {"threads": 1},
                    "rows": num_rows,
                    "runs": runs,
                    "percent off fp32": {rate: compare(of_rate) for rate, of_rate in runs.items()},
                }
                args.out.write_text(json.dumps(record, indent=1) + "\n")
                print(rate, optim, json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
