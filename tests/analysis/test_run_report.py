"""A run's page: its figures, and nothing injected by texts in its folder."""

import json
import re

import pytest
import yaml

from dpo_fast.cli import main
from dpo_fast.config import DPOConfig

ROWS = [
    {"step": 1, "loss": 0.6931, "rewards/accuracies": 0.0, "rewards/margins": 0.0, "tokens_per_second": 900.0},
    {"step": 2, "eval_loss": 0.61, "eval_rewards/accuracies": 0.7},
    {"step": 5, "loss": 0.51, "rewards/accuracies": 0.8, "warnings": ["both rewards fall: <b>see</b>"]},
    {"step": 9, "loss": 0.42, "rewards/accuracies": 0.9, "tokens_per_second": 1234.5, "peak_memory_gib": 1.5},
]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = vars(DPOConfig(model="<script>alert(1)</script>", beta=0.25))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-9").mkdir()
    return folder


def test_the_page_holds_the_run(run, capsys):
    assert main(["report", str(run)]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert "loss 0.6931 0.4200" in text
    assert "accuracy: chosen reward above rejected 0.0% 90.0%" in text
    assert "loss 0.6100 0.6100" in text
    assert "tokens per second 1,234" in text
    assert "beta 0.25" in text
    assert "learning_rate" not in text
    assert "no final model yet; checkpoint-9, checkpoint-10" in text
    assert "Step 5: both rewards fall: &lt;b&gt;see&lt;/b&gt;" in text
    assert "<script" not in page
    assert "data:image/png;base64," in page


def test_the_page_goes_where_it_is_wanted(run, tmp_path):
    assert main(["report", str(run), "--out", str(tmp_path / "elsewhere.html")]) == 0
    assert (tmp_path / "elsewhere.html").exists()
    assert not (run / "report.html").exists()
    (run / "final").mkdir()
    main(["report", "--run", str(run)])
    assert "9 steps, finished" in (run / "report.html").read_text()


def test_mistakes_give_one_line(run, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "no such folder"),
        ([], "no such folder"),
        ([str(tmp_path)], "has no metrics.jsonl with training steps"),
        ([str(run), "--out", "page.pdf"], "ends in .html"),
    ):
        assert main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    (run / "config.yaml").write_text("a: [")
    assert main(["report", str(run)]) == 2
    assert "config.yaml: not valid YAML" in capsys.readouterr().err
