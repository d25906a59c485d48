"""Does the project start on this machine? Parts of gpu_check.py that check everything and time nothing."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_head import gradients, logp_faults
from gpu_timing import DEVICE, head_goes, head_ways, relative
from step_contestants import Making, Report, make

from dpo_fast.analysis.score import score
from dpo_fast.config import DPOConfig, ScoreConfig
from dpo_fast.kernels import autotune, prefix_attention
from dpo_fast.kernels.linear_logprob import linear_logprob, linear_logprob_ref, linear_logprob_with_stats
from dpo_fast.kernels.token_stats import token_stats_ref
from dpo_fast.training.run import train

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias and softcap": {"bias": True, "softcap": 30.0},
    "far rows": {"spread": 40.0},
}


def check_head(rows: int, vocab: int, dim: int, dtype: str) -> dict[str, Any]:
    """Launch every kernel of the head: fused and sliced, bias, softcap, per-token stats, out-of-range rows."""
    failed = []
    for case, options in CASES.items():
        for way in head_ways():
            with head_goes(way):
                try:
                    failed += _head_faults(f"{case}, {way}", rows, vocab, dim, getattr(torch, dtype), options)
                except Exception as error:
                    failed.append(f"{case}, {way}: {type(error).__name__}: {str(error).strip()[:300]}")
    return {"failed": failed, "autotune": autotune.choices()}


def _head_faults(name: str, rows: int, vocab: int, dim: int, dtype: torch.dtype, options: dict[str, Any]) -> list[str]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    spread = options.get("spread", 2.0)
    hidden = torch.randn(rows, dim, device=DEVICE, generator=generator).to(dtype).requires_grad_()
    weight = (spread * torch.randn(vocab, dim, device=DEVICE, generator=generator) / dim**0.5).to(dtype)
    inputs = [hidden, weight.requires_grad_()]
    settings: dict[str, Any] = {"softcap": options.get("softcap")}
    if "bias" in options:
        inputs.append(torch.randn(vocab, device=DEVICE, generator=generator).to(dtype).requires_grad_())
    target = torch.randint(vocab, (rows,), device=DEVICE, generator=generator)

    def call(function: Any, tensors: list[torch.Tensor], **more: Any) -> Any:
        bias = tensors[2] if len(tensors) > 2 else None
        return function(*tensors[:2], target, bias=bias, **settings, **more)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = call(linear_logprob_ref, exact)
    true_grads = gradients(want, *exact)
    got = call(linear_logprob, inputs)
    with_stats, stats = call(linear_logprob_with_stats, inputs)
    faults = []
    for what, logp in (("log-probs", got), ("log-probs with stats", with_stats)):
        if not logp_faults(logp, want) <= 1:
            faults.append(f"{what} are {(logp.double() - want).abs().max():.1e} off")
    for grads, budget in ((gradients(got, *inputs), "all kept"), (_without_memory(call, inputs), "nothing kept")):
        errors = [relative(a, b) for a, b in zip(grads, true_grads, strict=True)]
        if not max(errors) < (5e-3 if dtype != torch.float32 else 1e-4):
            faults.append(f"{budget}: gradients are {errors} off")
    logits = exact[0] @ exact[1].t() + (exact[2] if len(exact) > 2 else 0)
    logits = logits if settings["softcap"] is None else settings["softcap"] * torch.tanh(logits / settings["softcap"])
    for what, figure, true in zip(stats._fields[:3], stats, token_stats_ref(logits.detach(), target), strict=False):
        if not torch.allclose(figure.double(), true, rtol=1e-3, atol=1e-3):
            faults.append(f"{what} is {(figure.double() - true).abs().max():.1e} off")
    return [f"{name}: {fault}" for fault in faults]


def _without_memory(call: Any, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return gradients(call(linear_logprob, inputs, memory_budget=0), *inputs)


def check_training(
    architecture: dict[str, Any], vocabulary: int, settings: dict[str, Any], *, pairs: int, steps: int, max_length: int
) -> dict[str, Any]:
    """Train a tiny model twice, from a file to a folder, and score it.

    The first margin must be 0 to the bit, two runs must give identical weights, and attention must take one call per
    layer if there is a kernel for it.
    """
    taken: set[str] = set()
    choose = prefix_attention.choose_attention

    def watched(*args: Any) -> Any:
        backend = choose(*args)
        taken.add(backend.run.__name__)
        return backend

    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(prefix_attention, "choose_attention", watched):
        folder = Path(scratch)
        rows = pairs * steps
        making = Making(scratch, architecture, vocabulary, None, [rows], max_length, f"{scratch}/made.json")
        make(making, Report(making.out))
        common = {
            "data": f"{scratch}/rows-{rows}.jsonl",
            "max_length": max_length,
            "reference_store": f"{scratch}/store",
        }
        runs = []
        for name in ("first", "second"):
            config = DPOConfig(
                model=f"{scratch}/model",
                output_dir=f"{scratch}/{name}",
                per_device_train_batch_size=pairs,
                max_steps=steps,
                logging_steps=1,
                **common,
                **settings,
            )
            runs.append((train(config), (folder / name / "final" / "model.safetensors").read_bytes()))
        kernels = folder / "first" / "autotune.json"
        score(ScoreConfig(model=f"{scratch}/first/final", out=f"{scratch}/scores.jsonl", **common))
        scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        first = runs[0][0].metrics[0]
        failed = []
        if first["rewards/margins"] != 0:
            failed.append(f"the first margin is {first['rewards/margins']:.1e}, not 0 to the bit")
        if runs[0][1] != runs[1][1]:
            failed.append("two runs leave different weights")
        if len(scores) != rows:
            failed.append(f"{len(scores)} scores of {rows} rows")
        if DEVICE.type == "cuda" and "segments" in taken:
            failed.append("attention took one call per segment")
        return {
            "losses": [row["loss"] for row in runs[0][0].metrics],
            "first loss": first["loss"],
            "attention": sorted(taken),
            "autotune": json.loads(kernels.read_text()) if kernels.exists() else {},
            "failed": failed,
        }
