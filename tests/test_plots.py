"""Figures show the numbers they are given: marks at the means, bars over the intervals, one look per arm."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from prunelab import claims, plots, report

ACCURACIES = {
    ("dense", 1.0): [77.0, 78.0, 79.0],
    ("l1", 0.5): [70.0, 71.0, 72.0],
    ("random", 0.5): [69.0, 70.0, 74.0],
    ("l1", 0.25): [60.0, 62.0, 64.0],
    ("random", 0.25): [61.0, 61.5, 62.0],
}


@pytest.fixture
def rows() -> Iterator[pd.DataFrame]:
    found = [
        {"arm": arm, "label": arm.upper(), "method": arm, "macs": macs, "seed": seed, "test_tuned": value}
        for (arm, macs), values in ACCURACIES.items()
        for seed, value in enumerate(values)
    ]
    yield pd.DataFrame(found)
    plt.close("all")


def intervals(ax: Axes) -> list[tuple[float, float]]:
    """Return what the bars span, from top to bottom."""
    bars = [bar.get_segments()[0] for bar in ax.collections if isinstance(bar, LineCollection)]
    return [(low, high) for (low, _), (high, _) in sorted(bars, key=lambda bar: bar[0][1])]


def test_a_panel_for_each_budget_has_every_arm_with_its_mean_and_interval(rows: pd.DataFrame) -> None:
    figure = plots.accuracy_panels(rows, "a title")
    assert [ax.get_title() or ax.get_title(loc="left") for ax in figure.axes] == ["1/2 of the MACs", "1/4 of the MACs"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["DENSE", "L1", "RANDOM"]
    for macs, ax in zip((0.5, 0.25), figure.axes, strict=True):
        expected = [
            report.interval(ACCURACIES[arm, at]) for arm, at in (("dense", 1.0), ("l1", macs), ("random", macs))
        ]
        assert np.allclose(intervals(ax), [(low, high) for _, low, high in expected])
        singles = [(float(x), float(y)) for line in ax.lines for x, y in zip(*line.get_data(), strict=True)]
        for place, (mean, _, _) in enumerate(expected):
            assert (mean, place) in singles


def test_a_panel_shows_all_that_was_seen_and_cuts_a_far_interval_off(rows: pd.DataFrame) -> None:
    rows = rows[rows.macs != 0.5]
    (ax,) = plots.accuracy_panels(rows, "a title").axes
    left, right = ax.get_xlim()
    seen = rows.test_tuned
    assert left < seen.min() < seen.max() < right
    assert right - left <= 1.6 * (seen.max() - seen.min())
    assert intervals(ax)[1][0] > left  # 62 ∓ 4.97 is near enough
    rows.loc[rows.arm == "l1", "test_tuned"] = [61.0, 79.0, 61.0]
    (ax,) = plots.accuracy_panels(rows, "a title").axes
    assert intervals(ax)[1][0] < ax.get_xlim()[0]  # 67 ∓ 25.8 is not


def test_shares_of_layers_are_printed_in_percent_a_row_for_each_network() -> None:
    kept = pd.DataFrame({"conv1": [25.4, 100.0], "conv2": [62.6, 7.0]}, index=["first", "second"])
    axes = plots.kept_by_network(kept, "a title")
    assert [text.get_text() for text in axes.texts] == ["25", "63", "100", "7"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "second"]


EVERYWHERE = [setting for paper in claims.load_all() for setting in paper.everywhere]


def test_every_arm_has_a_look_and_no_look_is_left_over() -> None:
    assert set(plots.LOOKS) == {arm for paper in EVERYWHERE for arm in paper.arms}


def test_the_arms_of_a_notebook_can_be_told_apart() -> None:
    for paper in EVERYWHERE:
        looks = [plots.LOOKS[arm] for arm in paper.arms]
        assert len(set(looks)) == len(looks), paper.notebook
