"""What tests of engines start from."""

import pytest
from rich.console import Console

from dpo_fast.config import SampleConfig
from dpo_fast.curate.engines import servers
from dpo_fast.curate.sample import answer_rows


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    """Retries after milliseconds, and no API key of the machine's."""
    monkeypatch.setattr(servers, "FIRST_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def served():
    """Answers of a served model to prompts, duplicates included."""

    def answers(url, prompts, **settings):
        config = SampleConfig(**{"model": "m", "backend": "openai", "base_url": url, "num_samples": 1} | settings)
        rows = [{"prompt": prompt} for prompt in prompts]
        return answer_rows(rows, config, console=Console(quiet=True))

    return answers
