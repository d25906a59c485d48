"""What tests of training start from."""

import pytest
from small_runs import write_rows


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """File of 14 rows."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def config(make_config, rows):
    """Settings of a run of six steps; a test adds what it is about."""
    return lambda **changes: make_config(**{"data": rows, "max_steps": 6} | changes)
