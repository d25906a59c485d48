"""Plots: what is drawn from which rows."""

import pytest

from dpo_fast.analysis.plots import PANELS, draw_bars, draw_curves, make_figure, plot_metrics

ROWS = [
    {"step": 1, "loss": 0.69, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0},
    {"step": 2, "loss": 0.60, "rewards/accuracies": 0.5, "rewards/chosen": 0.1, "rewards/rejected": -0.1},
    {"step": 2, "eval_loss": 0.65},
]


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_is_written(tmp_path, suffix, magic):
    path = tmp_path / f"plot.{suffix}"
    plot_metrics(ROWS, path)
    assert path.read_bytes().startswith(magic)


def test_curves_hold_the_rows_that_have_them():
    _, (ax,) = make_figure(1, 1)
    assert draw_curves(ax, ROWS, *PANELS[0])
    curves = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert curves == {"training": [[1, 0.69], [2, 0.60]], "held-out pairs": [[2, 0.65]]}


def test_a_share_is_drawn_from_none_to_all():
    _, (ax,) = make_figure(1, 1)
    assert draw_curves(ax, [{"step": 1, "pack_fill": 0.97}], *PANELS[3])
    assert ax.get_ylim() == (0, 1.05)


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_metrics([{"step": 1}], tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_bars_have_their_heights_and_intervals():
    _, (ax,) = make_figure(1, 1)
    draw_bars(ax, "t", "share", ["a", "b"], {"before": [(0.2, 0.1, 0.4), (0, 0, 0)], "after": [(1, 0.9, 1), (0, 0, 0)]})
    assert [patch.get_height() for patch in ax.patches] == [0.2, 0, 1, 0]
    segment = ax.collections[0].get_segments()[0]
    assert segment[:, 1].tolist() == pytest.approx([0.1, 0.4])
    with pytest.raises(ValueError, match="1 bars for 2 groups"):
        draw_bars(ax, "t", "share", ["a", "b"], {"before": [(0, 0, 0)]})
