"""Where a model runs and in which numbers."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from dpo_fast.config import ModelConfig
from dpo_fast.errors import UserError
from dpo_fast.machine import available_cores
from dpo_fast.model.adapter_folder import is_adapter


@dataclass(frozen=True)
class Placement:
    """Device and dtypes, resolved from the settings before anything is loaded.

    Attributes:
        device: of the weights and of every pack.
        dtype: of the weights.
        bf16: whether the forward and backward run in bfloat16 autocast.
        adapts: whether the weights are frozen beneath an adapter in fp32.
    """

    device: torch.device
    dtype: torch.dtype
    bf16: bool
    adapts: bool = False

    @classmethod
    def of(cls, config: ModelConfig) -> Placement:
        """What `config` asks for on this machine.

        Raises:
            UserError: the device cannot be used here.
        """
        return cls.on(pick_device(config.device), config)

    @classmethod
    def on(cls, device: torch.device, config: ModelConfig) -> Placement:
        """The dtypes that `config` asks for on a device, which need not be here."""
        adapts = _has_adapter(config)
        is_gpu = device.type == "cuda"
        # A frozen weight gains nothing from bits that its file does not have.
        is_bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and adapts and is_gpu)
        dtype = torch.bfloat16 if is_bf16 else torch.float32
        bf16 = is_gpu if config.bf16 is None else config.bf16
        # On bf16 weights, autocast is for the products of the adapter.
        return cls(device, dtype, bf16 and (dtype is torch.float32 or adapts), adapts)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return torch.bfloat16 if self.bf16 else self.dtype

    @property
    def default_optimizer(self) -> str:
        """What `--optim auto` means: for bf16 weights on a GPU, which others hardly move, the fused one."""
        trains_bf16 = self.dtype is torch.bfloat16 and not self.adapts
        return "adamw_8bit_fused" if self.device.type == "cuda" and trains_bf16 else "adamw_torch"

    def __str__(self) -> str:
        weights, products = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.compute_dtype))
        return f"{self.device}, {weights} weights" + ("" if weights == products else f", {products} autocast")


def _has_adapter(config: ModelConfig) -> bool:
    """Whether the model runs with an adapter in it; `train` says so, elsewhere it is the model that is named."""
    peft = getattr(config, "peft", None)
    return is_adapter(config.model) or config.load_in_4bit if peft is None else peft != "none"


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA if there is a GPU, else the CPU.

    Raises:
        UserError: there is none, or nothing here runs on it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            # Libraries that launch their own kernels (Triton, bitsandbytes) launch them on the current device.
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here: {str(error).strip().splitlines()[0]}") from error
    _refuse_old_gpus(device)
    return device


def busy_cpu() -> str:
    """What to know if other work takes the cores: PyTorch's threads then wait for each other; empty if none does."""
    cores = available_cores()
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    if load <= cores / 2 or threads == 1:
        return ""
    return (
        f"this machine is busy (load {load:.1f} on {cores} cores), and PyTorch's {threads} threads wait for each "
        "other: OMP_NUM_THREADS=1 may be several times faster"
    )


def _refuse_old_gpus(device: torch.device) -> None:
    """Neither flash attention nor bf16 products exist before compute capability 8.0."""
    if device.type != "cuda" or torch.version.hip is not None:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        raise UserError(
            f"{name}: compute capability {major}.{minor}, expected 8.0 (Ampere) or above; or pass --device cpu"
        )
