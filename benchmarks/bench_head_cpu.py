"""The LM head on a CPU: forward + backward against its three bare products and other libraries, as ratios.

    python benchmarks/bench_head_cpu.py --out benchmarks/results/head-cpu.json

All contestants put the same N target rows through the same DPO loss (eq. 7 of arXiv:2305.18290, no reference model).
"bare" is the three fp32 products of 2·N·V·D flop that no head can avoid: H·Wᵀ, E·W and Eᵀ·H. Contestants take turns in
one process; the result is the median over rounds of the ratio to "bare" in the same round. Loss and gradients are first
compared with fp64; a contestant that is wrong gets no speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import environment
from gpu_timing import relative
from torch import Tensor

from dpo_fast.kernels.linear_logprob import linear_logprob, linear_logprob_ref

PACKAGES = ("dpo-fast", "torch", "triton", "trl", "liger-kernel")
BETA = 0.1
TOLERANCE = 1e-4
Contestant = Callable[[Tensor, Tensor, Tensor], Tensor]


def dpo_loss(logps: Tensor, num_sequences: int) -> Tensor:
    """Mean over pairs; the first half of the sequences is chosen, the second half rejected."""
    chosen, rejected = logps.view(num_sequences, -1).sum(1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def contestants(num_sequences: int) -> dict[str, Contestant]:
    """Functions of hidden (N, D), weight (V, D) and target (N,) that return the loss; peers only if installed."""
    found: dict[str, Contestant] = {
        "dpo-fast": lambda h, w, t: dpo_loss(linear_logprob(h, w, t), num_sequences),
        "log_softmax": lambda h, w, t: dpo_loss(linear_logprob_ref(h, w, t), num_sequences),
    }
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

        found["trl"] = lambda h, w, t: dpo_loss(
            ChunkedLogProbFunction.apply(h, w, None, t, 1.0, CHUNK, None, 1.0, ())[0], num_sequences
        )
    except ImportError as error:
        print(f"skipping trl: {error}")
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        for name, compiled in (("liger", True), ("liger-eager", False)):
            loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=compiled)

            def liger(h: Tensor, w: Tensor, t: Tensor, loss: Any = loss) -> Tensor:
                return loss(w, h.view(num_sequences, -1, h.shape[1]), t.view(num_sequences, -1))[0]

            found[name] = liger
    except ImportError as error:
        print(f"skipping liger-kernel: {error}")
    return found


def step(contestant: Contestant, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients."""
    loss = contestant(hidden, weight, target)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def bare(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    """Only the three products."""
    with torch.no_grad():
        z = hidden @ weight.t()
        _ = z @ weight
        _ = z.t() @ hidden


def errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    """Relative errors of loss, dH and dW in the 2-norm."""
    return [relative(a, b) for a, b in zip(got, want, strict=True)]


def measure(names: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every function, one call per round; the first round is discarded."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name, function in names.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def main() -> int:
    """Check, time, print and write; returns 1 if ours is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("vocab", 49_152), ("dim", 576), ("rows", 1024), ("sequences", 8), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write a JSON file here")
    args = parser.parse_args()
    torch.manual_seed(0)
    hidden = torch.randn(args.rows, args.dim).requires_grad_()
    weight = (2 * torch.randn(args.vocab, args.dim) / args.dim**0.5).requires_grad_()
    target = torch.randint(args.vocab, (args.rows,))
    doubles = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = step(lambda h, w, t: dpo_loss(linear_logprob_ref(h, w, t), args.sequences), *doubles, target)
    del doubles
    results: dict[str, dict[str, Any]] = {}
    timed: dict[str, Callable[[], Any]] = {"bare": lambda: bare(hidden, weight, target)}
    for name, contestant in contestants(args.sequences).items():
        found = errors(step(contestant, hidden, weight, target), want)
        results[name] = {"errors": dict(zip(("loss", "dH", "dW"), found, strict=True))}
        if max(results[name]["errors"].values()) > TOLERANCE:
            print(f"{name}: wrong, no speed: relative errors {results[name]['errors']}")
            continue
        timed[name] = lambda contestant=contestant: step(contestant, hidden, weight, target)
    seconds = measure(timed, args.rounds)
    print(f"V {args.vocab}, D {args.dim}, N {args.rows}, fp32, {torch.get_num_threads()} threads, {args.rounds} rounds")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["bare"], strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        results.setdefault(name, {}).update(seconds=statistics.median(times), ratio=middle, range=[low, high])
        worst = max(results[name].get("errors", {"": 0.0}).values())
        speed = f"{statistics.median(times):7.3f} s   {middle:5.2f} x bare ({low:.2f} .. {high:.2f})"
        print(f"{name:12} {speed}   error {worst:.0e}")
    if args.out:
        shape = {"vocab": args.vocab, "dim": args.dim, "rows": args.rows, "rounds": args.rounds}
        args.out.write_text(
            json.dumps({"environment": environment(PACKAGES), **shape, "results": results}, indent=2) + "\n"
        )
    return 0 if "dpo-fast" in timed else 1


if __name__ == "__main__":
    sys.exit(main())
