"""The head on a GPU, as parts of gpu_check.py: errors against fp64, times against bare products and other libraries.

Log-probs must be within max(1e-5, 1e-5·|logp|) nats of fp64: tensor cores accumulate in fp32, so a logit that is a sum
of large terms is not known any better. Gradients may be at most 1.3 times as far from fp64 as PyTorch's own bf16 path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import DEVICE, head_goes, head_ways, interleaved, peak_mib, relative
from torch import Tensor

from dpo_fast.integrations.liger import FusedLinearDPOLoss
from dpo_fast.kernels import autotune
from dpo_fast.kernels.linear_logprob import linear_logprob, linear_logprob_ref
from dpo_fast.kernels.logprob import logprob

BETA = 0.1
LOGP_ERROR = 1e-5
GRADIENT_RATIO = 1.3
TRUE_ROWS = 1024


def make(rows: int, vocab: int, dim: int, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 hidden (N, D) and weight (V, D) that need gradients, with logits of the given spread, and targets (N,)."""
    generator = torch.Generator(DEVICE).manual_seed(rows + vocab + dim)
    options: dict[str, Any] = {"device": DEVICE, "generator": generator}
    hidden = torch.randn(rows, dim, **options).bfloat16().requires_grad_()
    weight = (spread * torch.randn(vocab, dim, **options) / dim**0.5).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(vocab, (rows,), **options)


def gradients(logp: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a fixed weighting of the log-probs."""
    return torch.autograd.grad((logp * torch.linspace(-1, 2, len(logp), device=DEVICE)).sum(), inputs)


def logp_faults(got: Tensor, want: Tensor) -> float:
    """The largest error divided by the allowed error; above 1 is wrong."""
    return ((got.double() - want).abs() / (LOGP_ERROR * want.abs().clamp(min=1))).max().item()


def check_errors(sizes: list[tuple[int, int, int, float]]) -> dict[str, Any]:
    """Errors of each of our kernels and of PyTorch's bf16 path against fp64; `sizes`: N, V, D, spread of the logits."""
    table: dict[str, Any] = {}
    failed = []
    for rows, vocab, dim, spread in sizes:
        hidden, weight, target = make(rows, vocab, dim, spread)
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        want = linear_logprob_ref(*exact, target)
        true_grads = gradients(want, *exact)
        usual = linear_logprob_ref(hidden, weight, target)
        found = {"torch bf16": (usual, gradients(usual.float(), hidden, weight))}
        for way in head_ways():
            with head_goes(way):
                logp = linear_logprob(hidden, weight, target)
                found[way] = (logp, gradients(logp, hidden, weight))
        row: dict[str, Any] = {"lowest logp": want.min().item()}
        for name, (logp, grads) in found.items():
            distance = (logp.double() - want).abs()
            row[name] = {
                "logp": distance.max().item(),
                "logp relative": (distance / want.abs().clamp(min=1)).max().item(),
                "dH": relative(grads[0], true_grads[0]),
                "dW": relative(grads[1], true_grads[1]),
            }
        case = f"N {rows} V {vocab} D {dim} spread {spread:g}"
        table[case] = row
        for way in head_ways():
            if not logp_faults(found[way][0], want) <= 1:
                failed.append(f"{case}, {way}: log-probs are {row[way]['logp relative']:.1e} off, relatively")
            for gradient in ("dH", "dW"):
                if not row[way][gradient] <= GRADIENT_RATIO * row["torch bf16"][gradient]:
                    failed.append(f"{case}, {way}: {gradient} is {row[way][gradient]:.1e} off")
    return {"errors": table, "failed": failed}


def check_bits(rows: int, vocab: int, dim: int) -> dict[str, Any]:
    """Two runs, and scored, trained and frozen log-probs, are bit-identical; over budget only rounding changes."""
    failed = []
    for way in head_ways():
        with head_goes(way):
            hidden, weight, target = make(rows, vocab, dim)
            runs = []
            for budget in (2**40, 2**40, rows * vocab):
                logp = linear_logprob(hidden, weight, target, memory_budget=budget)
                runs.append((logp.detach(), *gradients(logp, hidden, weight)))
            frozen = linear_logprob(hidden, weight.detach(), target)
            with torch.no_grad():
                scored = linear_logprob(hidden, weight, target)
            if not all(map(torch.equal, runs[0], runs[1])):
                failed.append(f"{way}: two runs differ")
            if not torch.equal(scored, runs[0][0]):
                failed.append(f"{way}: scored and trained log-probs differ by {(scored - runs[0][0]).abs().max():.1e}")
            if DEVICE.type == "cuda" and not (torch.equal(frozen, scored) and torch.equal(runs[2][0], scored)):
                failed.append(f"{way}: log-probs depend on what is kept")
            if not relative(runs[2][2], runs[0][2]) < 4e-3:
                failed.append(f"{way}: a run over its budget differs by {relative(runs[2][2], runs[0][2]):.1e}")
    return {"ways": head_ways(), "failed": failed}


def dpo_loss(logp: Tensor) -> Tensor:
    """DPO without a reference on 8 sequences of equal length, chosen ones first."""
    chosen, rejected = logp.view(8, -1).sum(1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def check_large(rows: int, vocab: int, dim: int) -> dict[str, Any]:
    """Keep all exponentials in one tensor; compare with fp64 log-probs and with gradients that keep few of them."""
    hidden, weight, target = make(rows, vocab, dim)
    want = true_logps(hidden, weight, target)
    failed, found = [], {}
    for way in head_ways():
        with head_goes(way):
            runs = []
            for budget in (2**40, rows * vocab // 8):
                logp = linear_logprob(hidden, weight, target, memory_budget=budget)
                runs.append((logp.detach(), *gradients(logp, hidden, weight)))
        last = slice(-rows // 16, None)
        found[way] = {
            "logp": (runs[0][0].double() - want).abs().max().item(),
            "dH of the last rows": relative(runs[0][1][last], runs[1][1][last]),
            "dW": relative(runs[0][2], runs[1][2]),
        }
        if (
            not logp_faults(runs[0][0], want) <= 1
            or not max(found[way]["dH of the last rows"], found[way]["dW"]) < 4e-3
        ):
            failed.append(f"{way}: {found[way]}")
    return {"exponentials": rows * vocab, "errors": found, "failed": failed}


Contestants = dict[str, Callable[[], tuple[Tensor, ...]]]


def products(hidden: Tensor, weight: Tensor) -> Contestants:
    """The bare products: one to score, two with a frozen head, three to train."""
    z = torch.empty(len(hidden), len(weight), device=DEVICE, dtype=torch.bfloat16)

    @torch.no_grad()
    def multiply(count: int) -> tuple[Tensor, ...]:
        torch.mm(hidden, weight.t(), out=z)
        second = (z @ weight,) if count > 1 else ()
        third = (z.t() @ hidden,) if count > 2 else ()
        return (z, *second, *third)

    return {f"{count} products": lambda count=count: multiply(count) for count in (1, 2, 3)}


def own(hidden: Tensor, weight: Tensor, target: Tensor) -> Contestants:
    """All modes of our head, as the trainer calls it; each returns loss and gradients, or log-probs."""
    frozen = weight.detach()

    def train(head: Tensor, budget: int) -> tuple[Tensor, ...]:
        loss = dpo_loss(linear_logprob(hidden, head, target, memory_budget=budget, assume_valid=True))
        return loss, *torch.autograd.grad(loss, [x for x in (hidden, head) if x.requires_grad])

    @torch.no_grad()
    def score() -> tuple[Tensor, ...]:
        return (linear_logprob(hidden, weight, target, assume_valid=True),)

    module = FusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    half = half_masked(target)
    return {
        "train": lambda: train(weight, 2**40),
        "train, 2 GiB budget": lambda: train(weight, 2**31),
        "frozen head": lambda: train(frozen, 2**31),
        "score": score,
        "module": lambda: as_module(module, hidden, weight, target),
        "module, half masked": lambda: as_module(module, hidden, weight, half),
    }


def half_masked(target: Tensor) -> Tensor:
    """Mask half of each sequence, as the prompt and padding of a padded batch would be."""
    half = target.view(8, -1).clone()
    half[:, : half.shape[1] // 2] = -100
    return half.view(-1)


def as_module(loss_fn: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Liger's calling convention, for Liger's loss and ours."""
    loss = loss_fn(weight, hidden.view(8, -1, hidden.shape[1]), target.view(8, -1))[0]
    return loss, *torch.autograd.grad(loss, (hidden, weight))


def peers(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Contestants, dict[str, str]]:
    """The installed heads of other libraries, and why others are skipped."""
    found: Contestants = {}
    left_out = {}
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

        def trl() -> tuple[Tensor, ...]:
            logp = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, CHUNK, None, 1.0, ())[0]
            loss = dpo_loss(logp)
            return loss, *torch.autograd.grad(loss, (hidden, weight))

        found["trl"] = trl
    except ImportError as error:
        left_out["trl"] = str(error)
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        liger = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=DEVICE.type == "cuda")
        found["liger"] = lambda: as_module(liger, hidden, weight, target)
        half = half_masked(target)
        found["liger, half masked"] = lambda: as_module(liger, hidden, weight, half)
    except ImportError as error:
        left_out["liger"] = str(error)
    return found, left_out


@torch.no_grad()
def true_logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """(N,) fp64 log-probs, a block of rows at a time."""
    exact = weight.double()
    parts = zip(hidden.split(TRUE_ROWS), target.split(TRUE_ROWS), strict=True)
    return torch.cat([linear_logprob_ref(rows.double(), exact, some) for rows, some in parts])


def wrong_results(found: Contestants, want: Tensor) -> dict[str, str]:
    """Contestants whose log-probs or loss differ from fp64 by more than the accuracy of a bf16 head."""
    wrong = {}
    loss = dpo_loss(want).item()
    for name, function in found.items():
        if "half masked" in name:
            continue
        first = function()[0].detach()
        if first.ndim:
            error, limit = (first.double() - want).abs().max().item(), 1e-3
        else:
            error, limit = abs(first.item() - loss) / abs(loss), 1e-2
        if not error < limit:
            wrong[name] = f"wrong by {error:.1e}"
    return wrong


def time_head(rows: int, vocab: int, dim: int, rounds: int = 12) -> dict[str, Any]:
    """Milliseconds, shares of the bare products and extra memory, for each kernel and for autotune's choice.

    A contestant with a wrong result is named and not timed.
    """
    hidden, weight, target = make(rows, vocab, dim)
    want = true_logps(hidden, weight, target)
    others, left_out = peers(hidden, weight, target)
    shares = {"train": 3, "train, 2 GiB budget": 3, "frozen head": 2, "score": 1}
    pairs = {"trl": "train", "liger": "module", "liger, half masked": "module, half masked"}
    out: dict[str, Any] = {"left out": left_out, "failed": []}
    for way in head_ways():
        with head_goes(way):
            contestants = products(hidden, weight) | own(hidden, weight, target) | others
            wrong = wrong_results({n: f for n, f in contestants.items() if "products" not in n}, want)
            out["failed"] += [f"{way}, {name}: {fault}" for name, fault in wrong.items()]
            contestants = {name: function for name, function in contestants.items() if name not in wrong}
            ms = interleaved(contestants, rounds)
            out[way] = {
                "ms": ms,
                "times faster than": {p: ms[p] / ms[o] for p, o in pairs.items() if p in ms and o in ms},
                "share of bare products": {n: ms[f"{k} products"] / ms[n] for n, k in shares.items() if n in ms},
                "peak MiB": {name: peak_mib(contestants[name]) for name in shares if name in contestants},
            }
    out["autotune"] = autotune.choices()
    return out


def time_logprob(rows: int, vocab: int) -> dict[str, Any]:
    """GB/s of `logprob`, forward and in-place backward, and of a copy."""
    logits = torch.randn(rows, vocab, device=DEVICE, dtype=torch.bfloat16)
    other = torch.empty_like(logits)
    target = torch.randint(vocab, (rows,), device=DEVICE)
    some = slice(0, 256)
    want = logits[some].double().log_softmax(-1).gather(1, target[some, None])[:, 0]
    error = (logprob(logits[some], target[some]) - want).abs().max().item()
    base = logits.requires_grad_()

    @torch.no_grad()
    def forward() -> Tensor:
        return logprob(base, target)

    def backward() -> None:
        torch.autograd.grad(logprob(base.view_as(base), target, inplace_backward=True).sum(), base)

    ms = interleaved({"copy": lambda: other.copy_(logits.detach()), "forward": forward, "forward + backward": backward})
    size = logits.numel() * 2 / 1e6
    moved = {"copy": 2, "forward": 1, "forward + backward": 3}
    failed = [] if error < LOGP_ERROR * 2 else [f"log-probs are {error:.1e} off"]
    return {"error": error, "ms": ms, "GB/s": {name: moved[name] * size / ms[name] for name in ms}, "failed": failed}
