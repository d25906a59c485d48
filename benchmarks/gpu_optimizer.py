"""Time AdamW optimizers on the parameters of Llama-3-8B, or a fraction of them; writes one JSON file.

    python benchmarks/gpu_optimizer.py --out benchmarks/results/NAME.json
    python benchmarks/gpu_optimizer.py --tiny --out FILE       # on a CPU, to try the script itself

Parts, most valuable first; one that fails leaves the others, and results are written after each:

    correct   our kernel against the CPU implementation: moments to the bit, weights to the last of their 24 bits; every
              contestant's first step against fp64. A contestant that is wrong, or fails, is not timed.
    time      milliseconds per 1e9 parameters, contestants taking turns; bytes held and at the highest per parameter
    tune      our kernel's launch options
    first     seconds from the first call of `step` to its end in a new process with an empty Triton cache
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from environment import environment
from gpu_timing import DEVICE, interleaved, synchronize
from parts import card, check_can_write, run_limited, source_digest
from torch import Tensor, nn

from dpo_fast.files import write_file_atomically
from dpo_fast.kernels.adamw import Hyper, Slot, adamw_ref, adamw_step_, join_weight
from dpo_fast.kernels.backends import Backend

PACKAGES = ("dpo-fast", "torch", "triton", "bitsandbytes", "flashoptim")
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.999), 1e-8, 0.1
# Llama-3-8B: a layer's matrices and norms, and the rows of embedding and head.
LAYERS, HIDDEN, KEYS, INTERMEDIATE, VOCAB = 32, 4096, 1024, 14_336, 128_256
# Odd sizes: a scalar, primes, less and more than a block, and one that is aligned but ends within a block.
ODD_SHAPES = [(1,), (2,), (257,), (1031,), (3, 701), (16, 17), (64, 65), (4096,), (128, 300)]


def llama_shapes(fraction: float, hidden: int = HIDDEN) -> list[tuple[int, ...]]:
    """Shapes of that fraction of the layers, with as large a part of embedding and head."""
    keys, inner = (size * hidden // HIDDEN for size in (KEYS, INTERMEDIATE))
    layer = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    rows = max(1, round(VOCAB * fraction))
    return layer * max(1, round(LAYERS * fraction)) + [(rows, hidden), (rows, hidden), (hidden,)]


def random_parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    """Parameters with gradients."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    parameters = []
    for shape in shapes:
        weight = torch.empty(shape, dtype=dtype, device=DEVICE).normal_(0, 0.02, generator=generator)
        parameter = nn.Parameter(weight)
        parameter.grad = torch.empty_like(weight).normal_(0, 1e-3, generator=generator)
        parameters.append(parameter)
    return parameters


class Ours:
    """The kernel over all parameters, clipped by a factor on the device."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.slots = [Slot.zeros(p.detach()) for p in parameters]
        self.factor = torch.ones((), device=DEVICE)
        self.num_steps = 0

    def step(self) -> None:
        """One optimizer step."""
        self.num_steps += 1
        grads = [p.grad for p in self.parameters if p.grad is not None]
        adamw_step_(self.slots, grads, Hyper(LR, *BETAS, EPS, DECAY, self.num_steps), self.factor)


def torch_fused(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """PyTorch's own."""
    return torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)


def bitsandbytes_8bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Blockwise 8-bit states."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


def flashoptim_24bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """8-bit states and 24-bit weights."""
    import flashoptim

    options = {"master_weight_bits": 24} if parameters[0].dtype == torch.bfloat16 else {}
    return flashoptim.FlashAdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, **options)


CONTESTANTS: dict[str, tuple[Callable[[list[nn.Parameter]], Any], torch.dtype]] = {
    "ours bf16+8": (Ours, torch.bfloat16),
    "ours fp32": (Ours, torch.float32),
    "torch fused bf16": (torch_fused, torch.bfloat16),
    "torch fused fp32": (torch_fused, torch.float32),
    "bitsandbytes AdamW8bit bf16": (bitsandbytes_8bit, torch.bfloat16),
    "flashoptim FlashAdamW bf16+8": (flashoptim_24bit, torch.bfloat16),
}
NEEDS = {"bitsandbytes": "bitsandbytes", "flashoptim": "flashoptim"}


def installed() -> list[str]:
    """Contestants that can run here."""
    names = []
    for name in CONTESTANTS:
        package = NEEDS.get(name.split()[0])
        if (package is None or find_spec(package)) and not (package == "flashoptim" and DEVICE.type == "cpu"):
            names.append(name)
    return names


def first_step_error(name: str) -> float:
    """Norm of (step - true step) over that of the true step, where a rounding of bf16 weights is some 1e-3."""
    make, dtype = CONTESTANTS[name]
    parameters = random_parameters([(128, 300), (4096,), (1031,)], dtype, seed=1)
    before = [p.detach().double() for p in parameters]
    hyper = Hyper(LR, *BETAS, EPS, DECAY, 1)
    zeros = [torch.zeros_like(x) for x in before]
    want = [
        adamw_ref(w, z, z, p.grad.double(), hyper)[0] - w for w, z, p in zip(before, zeros, parameters, strict=True)
    ]
    make(parameters).step()
    got = [p.detach().double() - w for p, w in zip(parameters, before, strict=True)]
    miss = torch.cat([(a - b).flatten() for a, b in zip(got, want, strict=True)]).norm()
    return (miss / torch.cat([x.flatten() for x in want]).norm()).item()


def kernel_against_cpu(dtype: torch.dtype, *, shift: int, one_by_one: bool) -> list[str]:
    """What differs after four steps of odd sizes; `shift` moves tensors by so many elements off their alignment."""
    generator = torch.Generator().manual_seed(2)
    here, there = [], []
    for shape in ODD_SHAPES:
        size = torch.Size(shape).numel()
        weight = torch.randn(size + shift, generator=generator).mul_(0.02).to(dtype)
        here.append(Slot.zeros(weight[shift:].view(shape)))
        there.append(Slot.zeros(weight.clone().to(DEVICE)[shift:].view(shape)))
    factor = torch.tensor(0.37)
    backend: Backend = "triton" if DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "torch"
    for step in range(1, 5):
        grads = [torch.randn(s, generator=generator).mul_(1e-3 * step).to(dtype) for s in ODD_SHAPES]
        hyper = Hyper(1e-5, *BETAS, EPS, DECAY, step)
        adamw_step_(here, grads, hyper, factor, backend="torch")
        moved = [grad.to(DEVICE) for grad in grads]
        if one_by_one:
            for slot, grad in zip(there, moved, strict=True):
                adamw_step_([slot], [grad], hyper, factor.to(DEVICE), backend)
        else:
            adamw_step_(there, moved, hyper, factor.to(DEVICE), backend)
    faults = []
    for shape, a, b in zip(ODD_SHAPES, here, there, strict=True):
        for field in ("moments", "exponents"):
            num = (getattr(a, field) != getattr(b, field).cpu()).sum().item()
            faults += [f"{shape} {field}: {num} differ"] if num else []
        want, got = (join_weight(slot.weight.cpu(), _cpu(slot.remainder)).double() for slot in (a, b))
        # Two steps of a 24-bit number, four of an fp32 one; and what cancellation leaves of an update of 1e-5.
        limit = want.abs() * (2**-14 if dtype == torch.bfloat16 else 2**-21) + 4e-11
        num = ((want - got).abs() > limit).sum().item()
        faults += [f"{shape} weights: {num} differ by more than their spacing"] if num else []
    return faults


def _cpu(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.cpu()


def correct(options: argparse.Namespace) -> dict[str, Any]:
    """Differences from the CPU, and errors of first steps."""
    differs = []
    for dtype in (torch.bfloat16, torch.float32):
        for shift in (0, 1):
            for one_by_one in (False, True):
                name = f"{dtype}, shifted by {shift}, {'one by one' if one_by_one else 'one launch'}"
                try:
                    faults = kernel_against_cpu(dtype, shift=shift, one_by_one=one_by_one)
                except Exception as error:
                    faults = [_told(error)]
                differs += [f"{name}: {fault}" for fault in faults]
    errors: dict[str, Any] = {}
    for name in installed():
        try:
            errors[name] = first_step_error(name)
        except Exception as error:
            errors[name] = _told(error)
    wrong = [name for name, error in errors.items() if not (isinstance(error, float) and error < 0.02)]
    failed = [*differs, *(f"{name}: {errors[name]}" for name in wrong)]
    if differs:
        wrong += [name for name in CONTESTANTS if name.startswith("ours")]
    return {"first step": errors, "not timed": wrong, "failed": failed}


def time_all(options: argparse.Namespace, exclude: list[str]) -> dict[str, Any]:
    """Milliseconds and bytes of each contestant."""
    shapes = llama_shapes(options.fraction, options.hidden)
    num = sum(torch.Size(shape).numel() for shape in shapes)
    out: dict[str, Any] = {"parameters": num, "tensors": len(shapes), "failed": []}
    steps: dict[str, Callable[[], Any]] = {}
    held, peak = {}, {}
    for name in installed():
        if name in exclude:
            continue
        make, dtype = CONTESTANTS[name]
        before = _allocated()
        try:
            optimizer = make(random_parameters(shapes, dtype))
            _reset_peak()
            optimizer.step()
            synchronize()
        except Exception as error:
            out["failed"].append(f"{name}: {_told(error)}")
            continue
        steps[name] = optimizer.step
        held[name] = (_allocated() - before) / num
        peak[name] = (_peak() - before) / num
    ms = interleaved(steps, options.rounds)
    out["ms per 1e9 parameters"] = {name: value * 1e9 / num for name, value in ms.items()}
    if DEVICE.type == "cuda":
        out["bytes per parameter with gradient"] = held
        out["bytes per parameter at the highest"] = peak
        out["copy GB/s"] = _copy_speed()
        moved = {"ours bf16+8": 12 + 4 / 256, "ours fp32": 16 + 4 / 256}
        out["GB/s"] = {
            name: moved[name] / value * 1e3 for name, value in out["ms per 1e9 parameters"].items() if name in moved
        }
    return out


def tune(options: argparse.Namespace) -> dict[str, Any]:
    """Our kernel with other launch options, which change no result."""
    from dpo_fast.kernels import adamw_triton

    optimizer = Ours(random_parameters(llama_shapes(options.fraction, options.hidden), torch.bfloat16))
    num = sum(p.numel() for p in optimizer.parameters)
    times: dict[str, float] = {}
    failed = []
    variants = [
        {"BLOCKS": blocks, "PREFETCH": prefetch} for prefetch in (False, True) for blocks in (1, 4, 8, 16, 32, 64)
    ]
    if options.tiny:
        variants = variants[1:2]

    def run(variant: dict[str, Any]) -> None:
        with mock.patch.dict(adamw_triton.OPTIONS, variant):
            optimizer.step()

    functions = {}
    for variant in variants:
        try:
            run(variant)
            synchronize()
            functions[str(variant)] = lambda variant=variant: run(variant)
        except Exception as error:
            failed.append(f"{variant}: {_told(error)}")
    times = interleaved(functions, options.rounds)
    return {"ms per 1e9 parameters": {name: ms * 1e9 / num for name, ms in times.items()}, "failed": failed}


def first(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a first step, each in a process of its own."""
    seconds, failed = {}, []
    for name in installed():
        with tempfile.TemporaryDirectory() as scratch:
            result = Path(scratch) / "result.json"
            command = [sys.executable, __file__, "--out", str(result), "--first-step", name]
            environ = {**os.environ, "TRITON_CACHE_DIR": f"{scratch}/triton"}
            error, lines = run_limited([*command, *(["--tiny"] if options.tiny else [])], 60, environ)
            if error:
                failed.append(f"{name}: {error}: {' | '.join(lines[-3:])}")
            else:
                seconds[name] = json.loads(result.read_text())
    return {"seconds": seconds, "failed": failed}


def measure_first_step(name: str, options: argparse.Namespace) -> float:
    """Seconds of the first step, after CUDA itself has started."""
    make, dtype = CONTESTANTS[name]
    parameters = random_parameters(llama_shapes(1 / LAYERS, options.hidden), dtype)
    synchronize()
    start = time.perf_counter()
    make(parameters).step()
    synchronize()
    return time.perf_counter() - start


def _copy_speed() -> float:
    source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    ms = interleaved({"copy": lambda: target.copy_(source)}, 6)["copy"]
    return 2 * source.numel() / ms / 1e6


def _allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0


def _reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:400]}"


def main() -> int:
    """Run the parts; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=["correct", "time", "tune", "first"])
    parser.add_argument("--fraction", type=float, default=1 / 8, help="of Llama-3-8B's layers and vocabulary")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--first-step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.hidden = 64 if options.tiny else HIDDEN
    if options.tiny:
        options.fraction, options.rounds = 1 / LAYERS, 2
    check_can_write(options.out)
    if options.first_step:
        options.out.write_text(json.dumps(measure_first_step(options.first_step, options)))
        return 0
    results: dict[str, Any] = {"card": card(), "source": source_digest(), **environment(PACKAGES), "parts": {}}
    excluded: list[str] = []
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "correct": lambda: correct(options),
        "time": lambda: time_all(options, excluded),
        "tune": lambda: tune(options),
        "first": lambda: first(options),
    }
    num_failed = 0
    for name, part in parts.items():
        if options.only and name not in options.only:
            continue
        if name == "tune" and DEVICE.type == "cpu":
            continue
        start = time.perf_counter()
        try:
            found = part()
        except Exception as error:
            traceback.print_exc()
            found = {"failed": [_told(error)]}
        if name == "correct":
            excluded += found.get("not timed", list(CONTESTANTS))
        found["part took, s"] = round(time.perf_counter() - start, 1)
        num_failed += bool(found["failed"])
        results["parts"][name] = found
        write_file_atomically(options.out, json.dumps(results, indent=1) + "\n")
        print(f"{name}:", json.dumps(found, indent=1), flush=True)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
