"""Rows -> token groups -> packs."""

from dpo_fast.data.load import load_groups
from dpo_fast.data.packing import StepSampler, best_fit_decreasing
from dpo_fast.data.report import DataReport

__all__ = ["DataReport", "StepSampler", "best_fit_decreasing", "load_groups"]
