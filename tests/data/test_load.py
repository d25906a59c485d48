"""An account of every row."""

import pytest
from preference_rows import GOOD, load

from dpo_fast.errors import UserError


def test_one_bad_row_does_not_end_a_run_and_every_row_is_accounted_for(tmp_path):
    rows = [
        GOOD,
        '{"prompt": "p", ',
        {**GOOD, "chosen": ""},
        {**GOOD, "rejected": " fox"},
        "",
        {"prompt": "p"},
        {**GOOD, "chosen": 7},
        GOOD,
    ]
    groups, report = load(tmp_path, rows)
    assert [group.row for group in groups] == [0, 6]
    assert report.to_dict()["dropped"] == {
        "broken_json": 1,
        "empty_answer": 1,
        "identical_answers": 1,
        "missing_field": 1,
        "wrong_type": 1,
    }
    assert report.rows_read == 7 == report.rows_used + sum(report.to_dict()["dropped"].values())
    text = report.render()
    assert "line 2: Expecting property name" in text
    assert "line 6: field 'chosen' is missing" in text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ', r"rows\.jsonl, line 2: not valid JSON: Expecting value at column 11"),
        ({**GOOD, "chosen": ""}, r"line 2: an answer is empty: field 'chosen'"),
        ({**GOOD, "rejected": " fox"}, "line 2: both answers are the same"),
    ],
)
def test_strict_stops_at_the_first_bad_row(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, [GOOD, row], strict=True)
