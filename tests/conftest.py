"""What tests of several folders start from."""

import pytest
from oracle import save_tiny_checkpoint


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a tiny random model with its tokenizer; read it, do not write there."""
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("base")))
