"""What runs a step: memory, products, bandwidth.

GPU figures are the makers' (datasheets of H100, H200, B200, A100, L40S and MI300X, and the whitepaper of the Ada
generation for the RTX 4090): dense bf16 products with fp32 sums, without sparsity. Memory is what the driver reports.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_fast.errors import UserError
from dpo_fast.machine import available_cores

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A device.

    Attributes:
        name: as `--gpu` takes it.
        memory: bytes.
        tflops: dense bf16 products; fp32 ones on a CPU.
        bandwidth: GB/s of its memory, read and written.
        link: GB/s to the other GPUs of its node, one way.
        host_link: GB/s to the host's memory, one way.
        words: of the name that torch reports.
    """

    name: str
    memory: float
    tflops: float
    bandwidth: float
    link: float = 32
    host_link: float = 32
    words: tuple[str, ...] = ()

    @property
    def is_cpu(self) -> bool:
        """Whether this is not a GPU."""
        return self.name == "cpu"


CARDS = {
    card.name: card
    for card in (
        Card("b200-180", 178.4 * GIB, 2250, 8000, 900, 64, ("B200",)),
        Card("h200-141", 140.4 * GIB, 989, 4800, 450, 64, ("H200",)),
        Card("h100-80", 79.6 * GIB, 989, 3350, 450, 64, ("H100",)),
        Card("a100-80", 79.3 * GIB, 312, 2039, 300, 32, ("A100", "80GB")),
        Card("a100-40", 39.6 * GIB, 312, 1555, 300, 32, ("A100",)),
        Card("l40s-48", 44.4 * GIB, 362, 864, 32, 32, ("L40S",)),
        Card("4090-24", 23.6 * GIB, 165, 1008, 32, 32, ("4090",)),
        Card("mi300x-192", 191.7 * GIB, 1307, 5300, 448, 64, ("MI300X",)),
    )
}
# fp32 products of one core, everything around them included: 200 tokens/s of SmolLM2-135M on two cores
# (docs/measurements.md, "A run on real data").
TFLOPS_PER_CORE = 0.08


def card(name: str) -> Card:
    """The card of that name; `cpu` is this machine's.

    Raises:
        UserError: there is none.
    """
    if name == "cpu":
        cores = available_cores()
        return Card("cpu", host_memory(), TFLOPS_PER_CORE * cores, 20)
    if name not in CARDS:
        raise UserError(f"--gpu {name}: unknown; choose one of cpu, {', '.join(CARDS)}")
    return CARDS[name]


def this_card(device: torch.device) -> Card:
    """The card that is here: its own memory, the speeds of the table; those of an unknown GPU are an A100's."""
    if device.type != "cuda":
        return card("cpu")
    properties = torch.cuda.get_device_properties(device)
    known = next((c for c in CARDS.values() if all(word in properties.name for word in c.words)), CARDS["a100-40"])
    return Card(known.name, properties.total_memory, known.tflops, known.bandwidth, known.link, known.host_link)


def host_memory() -> float:
    """Bytes of this machine, or of the control group that the process is confined to."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    try:
        return min(total, float(limit.read_text()))
    except (OSError, ValueError):  # no control groups, or "max"
        return total
