"""Win rate and scores, calculated by hand."""

import pytest

from dpo_fast.analysis.answer_figures import answer_figures


def test_win_rate_by_hand():
    own = [{"scores": [1.0, 0.0, None], "signals": {"json": [1.0, 0.0, None]}}]
    ref = [{"scores": [0.0, 0.0, 0.0], "signals": {"json": [0.0, 0.0, 0.0]}}]
    figures = answer_figures(own * 2, ref * 2)
    assert (figures["wins"], figures["ties"], figures["losses"]) == (2, 2, 2)
    assert figures["win_rate"]["value"] == pytest.approx(0.5)
    assert figures["score"]["model"]["value"] == pytest.approx(0.5)
    assert figures["signals"]["json"]["rise"]["value"] == pytest.approx(0.5)
    assert figures["unjudged"] == {"model": 2, "reference": 0}
    none = [{"scores": [None], "signals": {"json": [None]}}]
    assert answer_figures(none, none)["score"] is None
    assert answer_figures(none, none)["win_rate"]["value"] == 0.5
