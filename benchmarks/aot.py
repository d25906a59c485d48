"""Compile every Triton kernel as the launchers launch it, without needing the GPU; fail on what would be slow.

    python benchmarks/aot.py --arch sm_90a

The launchers run on meta tensors at the sizes of a real head; every launch is caught and compiled, so the list cannot
drift from what runs. Each row of the table is one such variant: registers per thread, spilled bytes, shared memory, and
the number of matrix (WGMMA, tcgen05, HMMA) and TMA instructions in the machine code. The exit code is 1 on a spill, on
shared memory over the GPU's limit, and on an sm_90a product without WGMMA.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from dpo_fast.kernels import adamw_triton, gather_rows_triton, linear_logprob_gpu, linear_logprob_triton, logprob_triton
from dpo_fast.kernels.adamw import Hyper, Slot
from dpo_fast.kernels.gather_rows import RowIndex
from dpo_fast.kernels.head import Head

# Architecture: compile target, compute capability reported to the launchers, limit of shared memory per block in bytes.
ARCHITECTURES = {
    "sm_80": (GPUTarget("cuda", 80, 32), 80, 166_912),
    "sm_89": (GPUTarget("cuda", 89, 32), 89, 101_376),
    "sm_90a": (GPUTarget("cuda", 90, 32), 90, 232_448),
    "sm_100a": (GPUTarget("cuda", 100, 32), 100, 232_448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 80, 65_536),
}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
}
ROWS, VOCAB = 8192, 128_256
LAUNCH_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Variant:
    """A kernel with the types, constants and options of one launch."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """The kernel's name and what distinguishes its variants."""
        constants = dict(self.constants)
        types = dict(self.signature)
        parts = [self.kernel.__name__.removesuffix("_kernel"), next(t for t in types.values() if t.startswith("*"))[1:]]
        if "MODE" in constants:
            parts.append(("fill", "peak", "redo")[constants["MODE"]])
        if "e_ptr" in types:
            parts.append("keep" if "e_ptr" not in constants else "")
        parts += [key[4:].lower() for key in ("HAS_BIAS", "HAS_CAP", "HAS_REMAINDER") if constants.get(key)]
        if constants.get("ALIGNED") is False:
            parts.append("unaligned")
        if constants.get("STATS") or types.get("square_ptr", "constexpr") != "constexpr":
            parts.append("stats")
        blocks = [str(constants[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK") if k in constants]
        stages = dict(self.options).get("num_stages")
        return " ".join(filter(None, [*parts, "x".join(blocks), f"s{stages}" if stages else ""]))


def typed(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
    """The variant that a launch needs."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values.update((k, v) for k, v in kwargs.items() if k in kernel.arg_names)
    signature, constants, divisible = {}, {}, []
    for index, parameter in enumerate(kernel.params):
        value = getattr(values[parameter.name], "value", values[parameter.name])
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            divisible.append(index)
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            divisible += [index] if value % 16 == 0 else []
    options = tuple((k, kwargs[k]) for k in LAUNCH_OPTIONS if k in kwargs)
    return Variant(kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible), options)


def launches(capability: int) -> list[Variant]:
    """Every variant that training and scoring launch on a GPU of this compute capability."""
    caught: dict[str, Variant] = {}

    def catch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        variant = typed(kernel, args, kwargs)
        # Launches that only differ in the divisibility of a size count as one variant.
        caught.setdefault(variant.name, variant)

    def every_way(head: Head, hidden: torch.Tensor, *arguments: Any) -> None:
        for way in linear_logprob_gpu._variants(head, hidden, want_stats=arguments[-1] is not None).values():
            way(head, hidden, *arguments)

    with (
        mock.patch.object(JITFunction, "run", catch),
        mock.patch.object(linear_logprob_gpu, "_exponentials", every_way),
        mock.patch.object(linear_logprob_triton, "_capability", return_value=capability),
        mock.patch.object(linear_logprob_triton, "_num_programs", return_value=132),
    ):
        for hidden, head in heads():
            target = torch.empty(ROWS, dtype=torch.int64, device="meta")
            for budget, frozen in ((2**40, False), (0, False), (0, True)):
                _, state, _ = linear_logprob_gpu.forward(head, hidden, target, budget, frozen=frozen)
                grad = torch.empty(ROWS, device="meta")
                linear_logprob_gpu.backward(head, hidden, target, state, grad, (True, not frozen, False))
            linear_logprob_gpu.forward(head, hidden, target, 2**40, want_stats=True)
        for dtype in (torch.bfloat16, torch.float32):
            logits = torch.empty(ROWS, VOCAB, dtype=dtype, device="meta")
            target = torch.empty(ROWS, dtype=torch.int64, device="meta")
            logp, lse = logprob_triton.forward(logits, target)
            logprob_triton.backward(logits, target, lse, logp, logp, logits)
            index = torch.empty(2 * ROWS, dtype=torch.int64, device="meta")
            rows = RowIndex(index, index, torch.empty(ROWS + 1, dtype=torch.int64, device="meta"))
            keys = torch.empty(8, ROWS, 128, dtype=dtype, device="meta").transpose(0, 1)
            gather_rows_triton.backward(gather_rows_triton.forward(keys, rows), rows)
            step_optimizer(dtype)
    return list(caught.values())


def step_optimizer(dtype: torch.dtype) -> None:
    """Steps of a matrix, of all tensors of a decoder's layer, and of sizes that are not multiples of 16."""
    factor = torch.empty((), device="meta")
    hyper = Hyper(1e-6, 0.9, 0.999, 1e-8, 0.0, 1)
    for shapes in ([(4096, 4096)], [(4096, 4096), (4096,)], [(1031,)], [(1031,), (3,)]):
        slots = [Slot.zeros(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]
        adamw_triton.step_(slots, [torch.empty_like(slot.weight) for slot in slots], hyper, factor)


def heads() -> Iterator[tuple[torch.Tensor, Head]]:
    """Heads of each dtype and two hidden sizes, with and without bias and softcap."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim in (2048, 4096):
            hidden = torch.empty(ROWS, dim, dtype=dtype, device="meta")
            weight = torch.empty(VOCAB, dim, dtype=dtype, device="meta")
            bias = torch.empty(VOCAB, dtype=dtype, device="meta")
            yield hidden, Head(weight, None, None, 1.0, torch.float32)
            yield hidden, Head(weight, bias, 30.0, 1.0, torch.float32)


def nvidia_figures(binary: bytes) -> dict[str, int]:
    """Registers, spilled bytes and instruction counts of a cubin, from the tools that ship with Triton."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, sass = (
            subprocess.run([tools / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", []))
        )

    def total(pattern: str) -> int:
        return sum(int(n) for n in re.findall(pattern, usage))

    return {
        "registers": total(r"REG:(\d+)"),
        "spills": total(r"STACK:(\d+)") + total(r"LOCAL:(\d+)"),
        "wgmma": len(re.findall(r"\bHGMMA", sass)),
        "mma": len(re.findall(r"\b(?:HMMA|UTC\w*MMA)", sass)),
        "tma": len(re.findall(r"\bUTMA(?:LDG|STG)", sass)),
    }


def amd_figures(assembly: str) -> dict[str, int]:
    """The same for AMD assembly, which has no WGMMA and no TMA."""
    found = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", assembly)}
    return {
        "registers": found.get("vgpr_count", 0),
        # Spilled scalar registers go to vector registers, not to memory.
        "spills": found.get("vgpr_spill_count", 0),
        "wgmma": 0,
        "mma": len(re.findall(r"v_mfma", assembly)),
        "tma": 0,
    }


def check(variant: Variant, arch: str) -> tuple[dict[str, int], list[str]]:
    """Compile one variant; returns its figures and its faults."""
    target, _, limit = ARCHITECTURES[arch]
    attributes = {(index,): [["tt.divisibility", 16]] for index in variant.divisible}
    source = ASTSource(variant.kernel, dict(variant.signature), dict(variant.constants), attributes)
    compiled = triton.compile(source, target=target, options=dict(variant.options))
    is_amd = target.backend == "hip"
    figures = amd_figures(compiled.asm["amdgcn"]) if is_amd else nvidia_figures(compiled.asm["cubin"])
    figures["shared"] = compiled.metadata.shared
    faults = []
    if figures["spills"]:
        faults.append("spills")
    if figures["shared"] > limit:
        faults.append(f"shared memory over {limit}")
    is_product = "tensordesc" in str(variant.signature)
    if arch == "sm_90a" and is_product and not figures["wgmma"]:
        faults.append("a product without WGMMA")
    return figures, faults


def main() -> int:
    """Print the table; returns 1 if any variant fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    nvidia = [arch for arch in ARCHITECTURES if arch.startswith("sm_")]
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=nvidia)
    columns = ("registers", "spills", "shared", "wgmma", "mma", "tma")
    wrong = 0
    for arch in parser.parse_args().arch:
        print(f"\n{arch:48}" + "".join(f"{column:>10}" for column in columns))
        for variant in launches(ARCHITECTURES[arch][1]):
            figures, faults = check(variant, arch)
            wrong += bool(faults)
            row = "".join(f"{figures[column]:>10}" for column in columns)
            print(f"{variant.name:48}{row}  {', '.join(faults)}", flush=True)
    print(f"\ntriton {triton.__version__}: " + (f"{wrong} variants fail" if wrong else "all variants pass"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
