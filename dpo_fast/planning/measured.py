"""What was measured, and on what: optimizers and efficiencies. Every figure that is not says so.

H200 figures are from `benchmarks/results/h200-*-2026-11-26.json`; docs/measurements.md has the commands.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer takes.

    Attributes:
        state_bytes_fp32: bytes a parameter besides weight and gradient, fp32 weights.
        state_bytes_bf16: the same, bf16 weights.
        ms_fp32: milliseconds for 10⁹ fp32 parameters on an H200.
        ms_bf16: the same, bf16.
        moves_bf16: whether small steps move bf16 weights.
    """

    state_bytes_fp32: float
    state_bytes_bf16: float
    ms_fp32: float
    ms_bf16: float
    moves_bf16: bool = False


# bitsandbytes keeps one fp32 scale per 256 numbers of each moment: 2 + 2·4/256. Its time with fp32 weights was not
# measured and is taken from bf16.
_TORCH = Optimizer(8.0, 4.0, 8.06, 5.10)
_BITSANDBYTES = Optimizer(2.031, 2.031, 28.2, 28.2)
_FUSED = Optimizer(2.009, 3.014, 3.98, 2.97, moves_bf16=True)
OPTIMIZERS = {
    "adamw_8bit_fused": _FUSED,
    "adamw_torch": _TORCH,
    "adamw_torch_fused": _TORCH,
    "adamw_8bit": _BITSANDBYTES,
    "adamw_bnb_8bit": _BITSANDBYTES,
    # The driver moves its state to the host's memory; its time was not measured.
    "paged_adamw_8bit": Optimizer(0.0, 0.0, 28.2, 28.2),
    "flash_adamw": Optimizer(2.0, 3.137, 8.58, 8.58, moves_bf16=True),
}


# Shares of what the hardware table promises. They are fitted to one profile, that of step 9 of
# `h200-step-2026-11-26.json` (Llama-3-8B, 4,537 tokens, 2,476 targets: products 263 ms, attention 26, elementwise 122
# of which clipping 18, idle 30 at 6,221 launches). The other steps of that run and the sharing benchmark test them.
PRODUCTS = 0.76
ATTENTION = 0.18
ELEMENTWISE = 0.52
SECONDS_PER_LAUNCH = 5e-6
LAUNCHES_PER_LAYER = 190
# Reads every gradient for its norm, then reads and writes it: 17.5 ms for 8.03e9 bf16 gradients, the same profile.
CLIPPING = 0.57
# A kernel of the optimizer is timed on an H200 and scales with bandwidth.
OPTIMIZER_CARD = "h200-141"
# Not measured: links between GPUs, and to the host's memory.
LINK = 0.8
