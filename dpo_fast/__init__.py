"""Preference training at the speed of the bare matrix products.

`import dpo_fast` is light: names are resolved when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_fast.analysis.evaluate import evaluate
    from dpo_fast.config import DPOConfig, EvalConfig
    from dpo_fast.curate.label import label
    from dpo_fast.curate.pair import pair
    from dpo_fast.curate.sample import sample
    from dpo_fast.integrations.liger import (
        FusedLinearCPOLoss,
        FusedLinearDPOLoss,
        FusedLinearORPOLoss,
        FusedLinearSimPOLoss,
    )
    from dpo_fast.integrations.liger_kto import FusedLinearKTOLoss
    from dpo_fast.kernels.linear_logprob import linear_logprob, linear_logprob_with_stats
    from dpo_fast.kernels.logprob import logprob, sequence_logprob
    from dpo_fast.kernels.segment_sum import segment_mean, segment_sum
    from dpo_fast.training.loop import TrainResult
    from dpo_fast.training.run import train

__all__ = [
    "DPOConfig",
    "EvalConfig",
    "FusedLinearCPOLoss",
    "FusedLinearDPOLoss",
    "FusedLinearKTOLoss",
    "FusedLinearORPOLoss",
    "FusedLinearSimPOLoss",
    "TrainResult",
    "evaluate",
    "label",
    "linear_logprob",
    "linear_logprob_with_stats",
    "logprob",
    "pair",
    "sample",
    "segment_mean",
    "segment_sum",
    "sequence_logprob",
    "train",
]

_HOME = {
    "DPOConfig": "config",
    "EvalConfig": "config",
    "FusedLinearDPOLoss": "integrations.liger",
    "FusedLinearSimPOLoss": "integrations.liger",
    "FusedLinearORPOLoss": "integrations.liger",
    "FusedLinearKTOLoss": "integrations.liger_kto",
    "FusedLinearCPOLoss": "integrations.liger",
    "TrainResult": "training.loop",
    "linear_logprob": "kernels.linear_logprob",
    "linear_logprob_with_stats": "kernels.linear_logprob",
    "logprob": "kernels.logprob",
    "segment_mean": "kernels.segment_sum",
    "segment_sum": "kernels.segment_sum",
    "sequence_logprob": "kernels.logprob",
    "sample": "curate.sample",
    "label": "curate.label",
    "pair": "curate.pair",
    "evaluate": "analysis.evaluate",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dpo_fast' has no attribute {name!r}")
    return getattr(import_module(f"dpo_fast.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
