"""Judgements, against a plain list of what was said."""

import errno
import os
import random
from itertools import combinations

import pytest
from by_hand_pages import ROWS, ask, page_of, session_of

from dpo_fast.curate.by_hand.session import CHOICES, StaleError, is_entry
from dpo_fast.errors import WriteError


@pytest.mark.parametrize("seed", range(8))
def test_random_judgements_with_undo_and_restarts_come_to_what_a_person_would_count(tmp_path, seed):
    """Beside it runs a plain list of what was said."""
    rng = random.Random(seed)
    said = []  # (row, shown left, shown right, choice)
    settings = {"pairs": "all", "repeat_share": 0.5, "seed": 3}
    finished = False
    while not finished:
        with session_of(ROWS, tmp_path, **settings) as session:
            for _ in range(rng.randint(1, 7)):
                finished = session.is_finished
                if finished:
                    break
                if said and rng.random() < 0.3:
                    session.undo(session.place)
                    said.pop()
                    continue
                item, left, right = session.show()
                choice = rng.choice(CHOICES)
                session.judge(session.place, choice)
                said.append((ROWS.index(item.row), left, right, choice))
                assert session.progress().done == len(said)
            rows = session.rows()
    pairs = [(row, frozenset((left, right))) for row, left, right, _ in said]
    assert set(pairs) == {
        (n, frozenset(two)) for n, row in enumerate(ROWS) for two in combinations(row["responses"], 2)
    }
    for n, row in enumerate(ROWS):
        points = {answer: [] for answer in row["responses"]}
        for _, left, right, choice in [one for one in said if one[0] == n and one[3] != "skip"]:
            points[left].append({"left": 1, "right": 0, "tie": 0.5}[choice])
            points[right].append({"left": 0, "right": 1, "tie": 0.5}[choice])
        expected = [sum(p) / len(p) if p else None for p in points.values()]
        assert rows[n]["scores"] == pytest.approx(expected)
        assert rows[n]["signals"] == {"by_hand": rows[n]["scores"]}
        assert {name: rows[n][name] for name in row} == row
        assert [
            (n, row["responses"][c["left"]], row["responses"][c["right"]], c["choice"]) for c in rows[n]["comparisons"]
        ] == [one for one in said if one[0] == n and one[3] != "skip"]
    better = {}
    for pair, (_, left, right, choice) in zip(pairs, said, strict=True):
        better.setdefault(pair, []).append({"left": left, "right": right}.get(choice, choice))
    twice = [found for found in better.values() if len(found) == 2 and "skip" not in found]
    with session_of(ROWS, tmp_path, **settings) as session:
        progress = session.progress()
    assert progress.repeated == len(twice)
    assert progress.agreed == sum(a == b for a, b in twice)
    assert progress.total == progress.done == len(said)
    assert progress.skipped == sum(choice == "skip" for *_, choice in said)


def damage(folder, place):
    """Flip a bit of the line that holds the judgement of a place."""
    path = folder / "out.jsonl.partial"
    line = next(line for line in path.read_bytes().splitlines() if line.startswith(b'{"key": "%d"' % place))
    path.write_bytes(path.read_bytes().replace(line, line.replace(b"choice", b"bhoice")))


def test_a_lost_judgement_is_asked_again_and_the_last_one_made_is_undone_first(tmp_path):
    with session_of(ROWS, tmp_path, repeat_share=1.0) as session:
        for choice in ("left", "right", "tie", "left", "right", "left"):
            session.judge(session.place, choice)
    damage(tmp_path, 1)
    with session_of(ROWS, tmp_path, repeat_share=1.0) as session:
        assert session.place == 1
        assert session.progress().done == 5
        first = session._queue[5].first
        assert session.progress().repeated == sum(session._queue[place].first not in (None, 1) for place in (4, 5))
        session.judge(1, "skip")
        assert session.place == 6
        session.undo(6)
        assert session.place == 1
        session.undo(1)
        assert session.place == 1  # the one before was that of place 5
        assert 5 not in session._judged
        session.judge(1, "tie")
        assert session.place == 5
        while not session.is_finished:
            session.judge(session.place, "tie")
        assert session.progress().done == session.progress().total == 8
        assert session._queue[5].first == first


@pytest.mark.parametrize("line", range(2))
def test_a_judgement_taken_back_does_not_return(tmp_path, line):
    with session_of(ROWS, tmp_path) as session:
        session.judge(0, "left")
        session.undo(1)
    path = tmp_path / "out.jsonl.partial"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2 + line] = lines[2 + line].replace(b"null", b"mull")
    path.write_bytes(b"".join(lines))
    with session_of(ROWS, tmp_path) as session:
        assert session.progress().done == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("4", None), ("-1", None), ("²", None), ("9" * 5000, None), ("0", []), ("0", "left"), ("0", {})),
        *(("0", {"choice": "up", "seconds": 1.0}), ("0", {"choice": [], "seconds": 1.0})),
        *(("0", {"choice": "left", "seconds": "1"}), ("written", None), ("written", 3)),
    ],
)
def test_entries_of_other_kinds_are_not_read(key, value):
    assert not is_entry(key, value, 4)
    for right in (("3", None), ("0", {"choice": "tie", "seconds": 0.5}), ("written", "abc")):
        assert is_entry(*right, 4)


def test_agreement_is_about_answers_and_not_about_sides(tmp_path):
    rows = [{"prompt": str(n), "responses": ["a", "b"]} for n in range(12)]
    for name, judge, agreed in (
        ("answer", lambda left: "left" if left == "a" else "right", range(12, 13)),
        ("side", lambda left: "left", range(1, 12)),
    ):
        with session_of(rows, tmp_path / name, repeat_share=1.0) as session:
            shown = {}
            while not session.is_finished:
                item, left, _ = session.show()
                shown.setdefault(item.row["prompt"], []).append(left)
                session.judge(session.place, judge(left))
            assert session.progress().repeated == 12
            assert session.progress().agreed in agreed
            if name == "side":
                assert session.progress().agreed == sum(a == b for a, b in shown.values())


def test_what_is_skipped_does_not_come_back(tmp_path):
    with session_of(ROWS, tmp_path, repeat_share=1.0) as session:
        assert session.progress().total == 8
        seen = []
        while shown := session.show():
            seen.append(shown[0].row["prompt"])
            session.judge(session.place, "skip")
        assert sorted(seen) == [row["prompt"] for row in ROWS]
        assert session.progress().total == session.progress().done == 4
        assert all(row["scores"] == [None] * 3 and row["comparisons"] == [] for row in session.rows())


def test_late_judgements_and_undos_change_nothing(tmp_path):
    with session_of(ROWS, tmp_path) as session:
        with pytest.raises(StaleError):
            session.undo(session.place)
        session.judge(0, "left")
        for wrong in (0, 2, -1):
            with pytest.raises(StaleError):
                session.judge(wrong, "right")
            with pytest.raises(StaleError):
                session.undo(wrong)
        assert session.progress().done == 1
        session.undo(1)
        assert session.place == 0
        for place in range(4):
            session.judge(place, "tie")
        with pytest.raises(StaleError):
            session.judge(4, "left")


def test_time_runs_from_showing_to_judging(tmp_path):
    now = [100.0]
    with session_of(ROWS, tmp_path) as session:
        session._clock = lambda: now[0]
        session.show()
        now[0] = 103.0
        session.show()  # looked at again: the clock runs on
        now[0] = 104.5
        session.judge(0, "left")
        now[0] = 200.0
        session.show()
        now[0] = 202.0
        session.judge(1, "left")
        assert [c["seconds"] for row in session.rows() for c in row["comparisons"]] in ([4.5, 2.0], [2.0, 4.5])
        assert session.progress().seconds == 6.5


def test_earlier_signals_stay(tmp_path):
    rows = [row | {"signals": {"json": [1, 0, 0]}, "scores": [9, 9, 9]} for row in ROWS]
    with session_of(rows, tmp_path) as session:
        assert session.rows()[0]["signals"] == {"json": [1, 0, 0], "by_hand": [None] * 3}


def test_a_judgement_that_cannot_be_saved_does_not_count(tmp_path, monkeypatch):
    with session_of(ROWS, tmp_path) as session:
        session.judge(0, "left")

        def full(number):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("dpo_fast.curate.worklog.os.fsync", full)
            with pytest.raises(WriteError, match="No space left"):
                session.judge(1, "left")
            assert session.place == 1
            with page_of(session) as (server, _):
                status, answer = ask(server.address, "judge", {"place": 1, "choice": "left"})
                assert status == 507
                assert "No space left" in answer["error"]
        session.judge(1, "right")
    with session_of(ROWS, tmp_path) as session:
        assert session._judged[1]["choice"] == "right"
