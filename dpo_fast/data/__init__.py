"""Rows -> token groups -> packs."""

from dpo_fast.data.load import load_groups
from dpo_fast.data.row_report import DataReport
from dpo_fast.packs.bins import best_fit_decreasing
from dpo_fast.packs.steps import StepSampler

__all__ = ["DataReport", "StepSampler", "best_fit_decreasing", "load_groups"]
