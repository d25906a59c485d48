"""What tests of several folders start from."""

import pytest
from oracle import save_tiny_checkpoint
from small_runs import write_rows

from dpo_fast.config import DPOConfig


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a tiny random model with its tokenizer; read it, do not write there."""
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("base")))


@pytest.fixture
def make_config(base, tmp_path):
    """Settings of a small run that reports every step; a test adds its rows and what it is about."""

    def make(**changes):
        settings = {
            "model": base,
            "output_dir": str(tmp_path / "run"),
            "reference_store": str(tmp_path / "reference.sqlite"),
            "max_length": 64,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 0,
        }
        return DPOConfig(**settings | changes)

    return make


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """File of 14 rows."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def config(make_config, rows):
    """Settings of a run of six steps; a test adds what it is about."""
    return lambda **changes: make_config(**{"data": rows, "max_steps": 6} | changes)
