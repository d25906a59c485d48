"""Compile, check and time the head and packs on one GPU in one call, in under 8 minutes; writes one JSON file.

    python benchmarks/gpu_check.py --out benchmarks/results/h200-2026-11-23.json

1. Errors against fp64 at bf16 inputs (V 32000 and 128256, D 512 and 2048), with PyTorch's own bf16 path beside them.
2. Times: forward + backward, frozen head and scoring against the bare cuBLAS products, TRL's head and Liger's DPO loss,
   interleaved in one process, medians of CUDA event times; `logprob` against the card's copy bandwidth.
3. Peak memory of each mode beyond its results, and the same bits from two runs.
4. Attention over packs, each way that is there, against fp64; steps in shared packs beside packs without sharing.

A part that fails is reported with its error, and the others go on; a mode whose result is wrong gets no time. Exit code
0 only if every part passes. No figure of it is published before it has run on that card.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import environment
from gpu_packs import check_attention, time_sharing
from torch import Tensor

from dpo_fast.fused_loss import FusedLinearDPOLoss
from dpo_fast.kernels import autotune, linear_logprob_gpu
from dpo_fast.kernels.linear_logprob import linear_logprob, linear_logprob_ref
from dpo_fast.kernels.logprob import logprob

SECONDS = 450
BETA = 0.1


def make(rows: int, vocab: int, dim: int, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 hidden (N, D) and weight (V, D) with gradients, and targets (N,)."""
    generator = torch.Generator("cuda").manual_seed(rows + vocab + dim)
    options: dict[str, Any] = {"device": "cuda", "generator": generator}
    hidden = torch.randn(rows, dim, **options).bfloat16().requires_grad_()
    weight = (spread * torch.randn(vocab, dim, **options) / dim**0.5).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(vocab, (rows,), **options)


def gradients(logp: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a fixed weighting of the log-probs."""
    return torch.autograd.grad((logp * torch.linspace(-1, 2, len(logp), device="cuda")).sum(), inputs)


def relative(got: Tensor, want: Tensor) -> float:
    """Relative error in the 2-norm."""
    return ((got.double() - want).norm() / want.norm()).item()


def check_errors() -> dict[str, Any]:
    """Errors of ours, by both paths, and of PyTorch's bf16 path, against fp64."""
    table: dict[str, Any] = {}
    autotune.enabled = False
    for vocab, dim, spread in ((32_000, 512, 2.0), (32_000, 2048, 20.0), (128_256, 512, 2.0), (128_256, 2048, 60.0)):
        hidden, weight, target = make(256, vocab, dim, spread)
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        want = linear_logprob_ref(*exact, target)
        true_grads = gradients(want, *exact)
        usual = linear_logprob_ref(hidden, weight, target)
        row: dict[str, Any] = {"lowest logp": want.min().item()}
        found = {"torch bf16": (usual, gradients(usual.float(), hidden, weight))}
        for path, limit in (("fused", 10**9), ("sliced", 0)):
            linear_logprob_gpu.FUSED_MAX_DIM = limit
            logp = linear_logprob(hidden, weight, target)
            found[path] = (logp, gradients(logp, hidden, weight))
        for name, (logp, grads) in found.items():
            distance = (logp.double() - want).abs()
            row[name] = {
                "logp": distance.max().item(),
                "logp relative": (distance / want.abs().clamp(min=1)).max().item(),
                "dH": relative(grads[0], true_grads[0]),
                "dW": relative(grads[1], true_grads[1]),
            }
        table[f"V {vocab} D {dim} spread {spread:g}"] = row
        for path in ("fused", "sliced"):
            ours = row[path]
            assert ours["logp relative"] < 2e-6, f"{path}: log-probs are wrong: {row}"
            for gradient in ("dH", "dW"):
                assert ours[gradient] < 3e-3, f"{path}: {gradient} is wrong: {row}"
                assert ours[gradient] <= row["torch bf16"][gradient], f"{path}: PyTorch is more exact: {row}"
    return table


def check_bits() -> dict[str, bool]:
    """Two runs, and a run over its memory budget: the first must agree to the bit, the second to rounding."""
    hidden, weight, target = make(1024, 128_256, 2048)
    runs = []
    for budget in (2**31, 2**31, 2**27):
        logp = linear_logprob(hidden, weight, target, memory_budget=budget)
        runs.append((logp.detach(), *gradients(logp, hidden, weight)))
    assert all(map(torch.equal, runs[0], runs[1])), "two runs differ"
    assert relative(runs[2][2], runs[0][2].double()) < 4e-3, "a run over its budget differs"
    return {"same bits": True}


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int = 12) -> dict[str, float]:
    """Median milliseconds by CUDA events; contestants take turns, and the first two rounds are thrown away."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    for _ in range(rounds + 2):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs[2:]) for name, pairs in events.items()}


def peak_mib(function: Callable[[], Any]) -> float:
    """MiB at the highest beyond what was allocated before; gradients that are returned count."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def dpo_loss(logp: Tensor) -> Tensor:
    """DPO without a reference on 8 sequences of equal length, chosen first."""
    chosen, rejected = logp.view(8, -1).sum(1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def head_contestants(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, Callable[[], Any]]:
    """The bare products, ours in its modes, and the peers that are installed."""
    frozen, z = weight.detach(), torch.empty(len(hidden), len(weight), device="cuda", dtype=torch.bfloat16)

    def products(count: int) -> None:
        with torch.no_grad():
            torch.mm(hidden, weight.t(), out=z)
            results = [z @ weight] if count > 1 else []
            results += [z.t() @ hidden] if count > 2 else []

    def train(head: Tensor, budget: int) -> None:
        loss = dpo_loss(linear_logprob(hidden, head, target, memory_budget=budget))
        torch.autograd.grad(loss, [x for x in (hidden, head) if x.requires_grad])

    def score() -> None:
        with torch.no_grad():
            linear_logprob(hidden, weight, target)

    found: dict[str, Callable[[], Any]] = {f"{n} products": lambda n=n: products(n) for n in (1, 2, 3)}
    found["train"] = lambda: train(weight, 2**36)
    found["train, 2 GiB budget"] = lambda: train(weight, 2**31)
    found["frozen head"] = lambda: train(frozen, 2**31)
    found["score"] = score
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

        def trl() -> None:
            logp = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, CHUNK, None, 1.0, ())[0]
            torch.autograd.grad(dpo_loss(logp), (hidden, weight))

        found["trl"] = trl
    except ImportError as error:
        print(f"trl is left out: {error}")
    # Half of the rows of each sequence are prompt or padding, as in a padded batch.
    half = target.view(8, -1).clone()
    half[:, : half.shape[1] // 2] = -100

    def module(loss_fn: Any, labels: Tensor) -> None:
        loss = loss_fn(weight, hidden.view(8, -1, hidden.shape[1]), labels.view(8, -1))[0]
        torch.autograd.grad(loss, (hidden, weight))

    own_loss = FusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    found["module"] = lambda: module(own_loss, target)
    found["module, half masked"] = lambda: module(own_loss, half)
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        liger_loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
        found["liger"] = lambda: module(liger_loss, target)
        found["liger, half masked"] = lambda: module(liger_loss, half)
    except ImportError as error:
        print(f"liger-kernel is left out: {error}")
    return found


def time_head(rows: int, vocab: int, dim: int) -> dict[str, Any]:
    """Milliseconds, shares of the bare products and extra memory, by each path and by the one that is chosen."""
    hidden, weight, target = make(rows, vocab, dim)
    contestants = head_contestants(hidden, weight, target)
    out: dict[str, Any] = {}
    for path, limit in (("fused", 10**9), ("sliced", 0), ("chosen by autotune", 0)):
        linear_logprob_gpu.FUSED_MAX_DIM = limit
        autotune.enabled = path.startswith("chosen")
        ms = interleaved(contestants)
        shares = {"train": 3, "train, 2 GiB budget": 3, "frozen head": 2, "score": 1}
        peers = {"trl": "train", "liger": "module", "liger, half masked": "module, half masked"}
        out[path] = {
            "ms": ms,
            "times faster than": {peer: ms[peer] / ms[ours] for peer, ours in peers.items() if peer in ms},
            "share of bare products": {name: ms[f"{n} products"] / ms[name] for name, n in shares.items()},
            "peak MiB": {name: peak_mib(contestants[name]) for name in shares},
        }
    return out


def time_logprob() -> dict[str, Any]:
    """GB/s of `logprob`, forward and in-place backward, beside a copy's."""
    logits = torch.randn(8192, 128_256, device="cuda", dtype=torch.bfloat16)
    other = torch.empty_like(logits)
    target = torch.randint(128_256, (8192,), device="cuda")
    base = logits.requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            logprob(base, target)

    def backward() -> None:
        torch.autograd.grad(logprob(base.view_as(base), target, inplace_backward=True).sum(), base)

    rows = slice(0, 256)
    want = base[rows].detach().double().log_softmax(-1).gather(1, target[rows, None])[:, 0]
    assert (logprob(base.detach()[rows], target[rows]) - want).abs().max() < 1e-5, "logprob is wrong"
    ms = interleaved({"copy": lambda: other.copy_(logits.detach()), "forward": forward, "forward + backward": backward})
    size = logits.numel() * 2 / 1e6
    moved = {"copy": 2, "forward": 1, "forward + backward": 3}
    return {"ms": ms, "GB/s": {name: moved[name] * size / ms[name] for name in ms}}


def machine() -> dict[str, Any]:
    """The card, its clocks and the versions."""
    query = "name,driver_version,clocks.sm,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        card = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        card = f"{torch.cuda.get_device_name()} (nvidia-smi: {error})"
    packages = ("dpo-fast", "torch", "triton", "trl", "liger-kernel")
    return {"card": card, "cuda": torch.version.cuda, **environment(packages)}


def main() -> int:
    """Run the parts in turn; those that no time is left for are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run. benchmarks/aot.py compiles the kernels without one.")
        return 2
    started = time.monotonic()
    parts: dict[str, Callable[[], Any]] = {"errors": check_errors, "bits": check_bits, "logprob": time_logprob}
    for rows, dim in ((8192, 4096), (8192, 2048), (16_384, 4096)):
        parts[f"head N {rows} D {dim}"] = lambda rows=rows, dim=dim: time_head(rows, 128_256, dim)
    parts |= {"attention": check_attention, "sharing": lambda: time_sharing(interleaved)}
    report: dict[str, Any] = {"machine": machine(), "parts": {}, "failed": []}
    for name, part in parts.items():
        if time.monotonic() - started > SECONDS - 90:
            report["failed"].append(f"{name}: no time left")
            continue
        try:
            report["parts"][name] = part()
        except Exception:
            report["failed"].append(f"{name}: {traceback.format_exc()}")
        torch.cuda.empty_cache()
        report["seconds"] = time.monotonic() - started
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"== {name} ({report['seconds']:.0f} s)\n{json.dumps(report['parts'].get(name, 'failed'), indent=1)}")
    print("\n".join(report["failed"]))
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
