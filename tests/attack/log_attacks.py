"""Bits that change in the log of a person's judgements, and in those of `sample` and `label`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from unittest import mock

from attacks import attack, flip_a_bit
from by_hand_pages import ROWS
from oracle import save_tiny_checkpoint
from rich.console import Console

from dpo_fast.config import LabelConfig, SampleConfig
from dpo_fast.curate.by_hand.comparisons import make_queue
from dpo_fast.curate.by_hand.items import to_items
from dpo_fast.curate.by_hand.session import CHOICES, JudgingSession
from dpo_fast.curate.generate import Answer
from dpo_fast.curate.label import run_label
from dpo_fast.curate.sample import run_sample
from dpo_fast.curate.worklog import WorkLog, damaged_path, log_path
from dpo_fast.errors import UserError

QUIET = Console(quiet=True)


def judge_at_random(session: JudgingSession, rng: random.Random) -> dict[int, dict]:
    """Judge and undo a while; the judgements that stand, by place."""
    for _ in range(rng.randint(1, 20)):
        if session.can_undo and rng.random() < 0.3:
            session.undo(session.place)
        elif not session.is_finished:
            session.judge(session.place, rng.choice(CHOICES))
    return dict(session._judged)


quiet = mock.patch("dpo_fast.curate.worklog.logger", mock.Mock())


@attack
@quiet
def flipped_bit_in_judgements(rng: random.Random, folder: Path) -> None:
    """Of a person's judgements at most one is lost, which is counted, and none changes or returns."""
    config = LabelConfig(data="rows", pairs="all", repeat_share=0.5)
    items = to_items(ROWS, config, QUIET)
    queue = make_queue(items, config)
    out = folder / "out.jsonl"
    for _ in range(rng.randint(1, 3)):
        with WorkLog(out, {"queue": len(queue)}, overwrite=False) as log:
            said = judge_at_random(JudgingSession(items, queue, log), rng)
    flip_a_bit(log.path, rng)
    damaged = log.path.read_bytes()
    with WorkLog(out, {"queue": len(queue)}, overwrite=False) as log:
        session = JudgingSession(items, queue, log)
        found = dict(session._judged)
        assert found.items() <= said.items()
        assert len(said) - len(found) <= log.num_damaged <= 2
        assert log.num_damaged == (damaged_path(out).read_bytes().count(b"\n") if log.num_damaged else 0)
        assert log.path.read_bytes().startswith(damaged)
        while not session.is_finished:
            session.judge(session.place, "tie")
        assert session._judged.items() >= found.items()
        session.rows()


@attack
def flipped_bit_in_a_log_of_sample(rng: random.Random, folder: Path) -> None:
    """The same answers come out as without the flip."""

    def write(prompts: list[list[int]], temperature: float, seed: int) -> list[Answer]:
        return [Answer(f"{prompt} {seed}", [i, 2], -float(i), True) for i, prompt in enumerate(prompts)]

    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(rng.randint(1, 9))))
    common = {"model": tiny_model(), "data": str(data), "num_samples": 2, "generation_batch_size": rng.randint(1, 4)}
    with mock.patch("dpo_fast.curate.sample.load_writer", return_value=write):
        resume_after_a_flip(
            lambda out: run_sample(SampleConfig(**common, out=str(out)), console=QUIET),
            *("dpo_fast.curate.sample.write_rows", folder, rng),
        )


@attack
def flipped_bit_in_a_log_of_label(rng: random.Random, folder: Path) -> None:
    """The same scores come out as without the flip."""
    rows = [{"responses": ["a"] * 3, "votes": [rng.random() for _ in range(3)]} for _ in range(rng.randint(1, 30))]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"data": str(data), "signals": "field:votes"}
    resume_after_a_flip(
        lambda out: run_label(LabelConfig(**common, out=str(out)), QUIET),
        *("dpo_fast.curate.label.write_rows", folder, rng),
    )


@quiet
def resume_after_a_flip(run: Callable[[Path], Path], writer: str, folder: Path, rng: random.Random) -> None:
    """Run, interrupt another run at random, flip a bit of its log, resume, compare."""
    expected = run(folder / "whole.jsonl").read_bytes()
    out = folder / "out.jsonl"
    with mock.patch(writer, side_effect=KeyboardInterrupt), suppress(KeyboardInterrupt):
        run(out)
    lines = log_path(out).read_bytes().splitlines(keepends=True)
    log_path(out).write_bytes(b"".join(lines[: rng.randint(1, len(lines))]))
    flip_a_bit(log_path(out), rng)
    damaged = log_path(out).read_bytes()
    refusal = ""
    try:
        run(out)
    except UserError as error:
        refusal = str(error)
    if refusal:
        # With its only line damaged nobody knows whose log it is.
        assert "its first lines are damaged" in refusal
        assert log_path(out).read_bytes() == damaged
        assert damaged.count(b"\n") <= 1
    else:
        assert out.read_bytes() == expected


@cache
def tiny_model() -> str:
    """A folder that outlives the attacks of this process."""
    import tempfile

    folder = tempfile.mkdtemp(prefix="dpo-fast-attack-")
    return str(save_tiny_checkpoint(Path(folder) / "model"))
