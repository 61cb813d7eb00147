"""The rule that turns rows into a word, checked by hand, and the table of all verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prunelab import claims, report
from prunelab.claims import METRICS, Claim
from prunelab.experiments import Row, Store

BETTER = Claim("id", "a beats b", "better", "a", ("b",))
NOT_WORSE = replace(BETTER, rule="not worse", margin=1.0, controls=("dense",))


def rows(accuracies: Mapping[tuple[str, float], Sequence[float]]) -> pd.DataFrame:
    """Return rows from {(arm, macs): one accuracy per seed}."""
    return pd.DataFrame(
        [
            {"arm": arm, "label": arm, "method": "dense" if arm == "dense" else "l1", "macs": macs, "seed": seed}
            | {"test_tuned": value, "data_digest": "1", "data_source": "image archive (JPEG)"}
            for (arm, macs), values in accuracies.items()
            for seed, value in enumerate(values)
        ]
    )


def test_interval_by_hand() -> None:
    # differences 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.302653, half width 4.302653 / √3 = 2.484138
    assert report.interval([1, 2, 3]) == pytest.approx((2, -0.484138, 4.484138), abs=1e-6)
    # 0, 0, 1, 1: mean 0.5, s = √(1/3), t(0.975, 3) = 3.182446, half width 3.182446 · √(1/3) / 2 = 0.918693
    assert report.interval([0, 0, 1, 1]) == pytest.approx((0.5, -0.418693, 1.418693), abs=1e-6)
    assert report.interval([2, 2, 2]) == (2, 2, 2)


def test_one_value_has_no_interval() -> None:
    assert report.interval([3.0])[0] == 3
    assert np.isnan(report.interval([3.0])[1:]).all()
    assert np.isnan(report.interval([])).all()


def test_the_accuracy_table_by_hand() -> None:
    many = rows({("a", 0.5): [71, 72, 73], ("a", 0.125): [60, 60, 60], ("dense", 1.0): [80]})
    many = many.assign(label=many.arm.str.upper(), test_cut=10.0, test_recalibrated=many.test_tuned - 1)
    table = report.accuracy_table(many)
    assert list(table.index) == [("A", "1/2"), ("A", "1/8"), ("DENSE", "1")]
    assert list(table.columns) == ["right after the cut", "batch norm recalibrated", "retrained"]
    # 71, 72, 73: s = 1, half width 4.302653 / √3 = 2.48; a single seed has no interval
    assert list(table.loc[("A", "1/2")]) == ["10.0 ± 0.0", "71.0 ± 2.5", "72.0 ± 2.5"]
    assert list(table.loc[("DENSE", "1")]) == ["10.0", "79.0", "80.0"]


def test_differences_are_paired_by_seed() -> None:
    # the seeds spread over 20 points, the pairs differ by 1, 2, 3
    decided = report.verdict(BETTER, rows({("a", 0.5): [71, 82, 93], ("b", 0.5): [70, 80, 90]}))
    (only,) = decided.differences.to_dict("records")
    assert (only["mean"], only["low"], only["high"]) == pytest.approx((2, -0.484138, 4.484138), abs=1e-6)
    assert (only["control"], only["macs"], only["seeds"]) == ("b", 0.5, 3)
    assert (only["passed"], only["failed"]) == (False, False)


CLEAR, UNCLEAR, WORSE = [72.0, 72.1, 71.9], [71.0, 72.0, 73.0], [60.0, 60.1, 59.9]


@pytest.mark.parametrize(
    ("half", "quarter", "word"),
    [
        (CLEAR, CLEAR, "holds"),
        (CLEAR, UNCLEAR, "holds in part"),
        (WORSE, CLEAR, "holds in part"),
        (UNCLEAR, UNCLEAR, "does not hold here"),
        (WORSE, WORSE, "does not hold here"),
        (CLEAR, CLEAR[:2], "not tested here"),
        (CLEAR, [], "not tested here"),
    ],
)
def test_every_word(half: list[float], quarter: list[float], word: str) -> None:
    controls = {("b", 0.5): [70.0] * 3, ("b", 0.25): [70.0] * 3}
    assert report.verdict(BETTER, rows({("a", 0.5): half, ("a", 0.25): quarter, **controls})).word == word


def test_every_control_counts() -> None:
    found = rows({("a", 0.5): CLEAR, ("b", 0.5): [70.0] * 3, ("c", 0.5): [75.0] * 3})
    assert report.verdict(BETTER, found).word == "holds"
    assert report.verdict(replace(BETTER, controls=("b", "c")), found).word == "holds in part"
    assert report.verdict(replace(BETTER, controls=("b", "missing")), found).word == "not tested here"


def test_not_worse_asks_for_the_margin_only() -> None:
    # against dense 73: −1.0 ± 0.25 is not clear of −1, −0.5 ± 0.25 is
    dense = {("dense", 1.0): [73.0] * 3}
    at_margin = rows({("a", 0.5): [72.0, 72.1, 71.9], **dense})
    assert report.verdict(NOT_WORSE, at_margin).word == "does not hold here"
    within = rows({("a", 0.5): [72.5, 72.6, 72.4], **dense})
    assert report.verdict(NOT_WORSE, within).word == "holds"
    assert report.verdict(replace(NOT_WORSE, rule="better", margin=0.0), within).word == "does not hold here"


def test_dense_is_compared_at_each_budget_and_the_claim_can_choose() -> None:
    found = rows({("dense", 1.0): [73.0] * 3, ("a", 0.5): [72.5, 72.6, 72.4], ("a", 0.25): WORSE})
    decided = report.verdict(NOT_WORSE, found)
    assert decided.differences.macs.tolist() == [0.5, 0.25]
    assert decided.word == "holds in part"
    assert report.verdict(replace(NOT_WORSE, macs=(0.5,)), found).word == "holds"
    assert report.verdict(replace(NOT_WORSE, macs=(0.125,)), found).word == "not tested here"


def test_only_common_seeds_count() -> None:
    decided = report.verdict(BETTER, rows({("a", 0.5): [*CLEAR, 0.0], ("b", 0.5): [70.0] * 3}))
    assert decided.word == "holds"
    assert decided.differences.seeds.tolist() == [3]


def test_no_rows_decide_nothing() -> None:
    assert report.verdict(BETTER, rows({("a", 0.5): CLEAR}).iloc[:0]).word == "not tested here"


def test_ranks_by_hand() -> None:
    # a beats b by 2 for certain; c lies between, but swings by 10 over the seeds
    found = report.ranks(rows({("a", 0.5): CLEAR, ("b", 0.5): [70.0] * 3, ("c", 0.5): [61.0, 71.0, 81.0]}))
    assert found.arm.tolist() == ["a", "c", "b"]
    assert found["rank"].tolist() == [1, 2, 3]
    assert list(zip(found.highest, found.lowest, strict=True)) == [(1, 2), (1, 3), (2, 3)]
    assert found.seeds.tolist() == [3, 3, 3]


def test_ranks_are_of_each_budget_and_of_the_seeds_that_all_have() -> None:
    given = rows({("a", 0.5): CLEAR, ("b", 0.5): [70.0] * 2, ("a", 0.25): [60.0] * 3, ("b", 0.25): [62.0] * 3})
    found = report.ranks(given)
    assert found.macs.tolist() == [0.5, 0.5, 0.25, 0.25]
    assert found.arm.tolist() == ["a", "b", "b", "a"]
    assert found.seeds.tolist() == [2, 2, 3, 3]


def test_arms_without_a_common_seed_have_no_rank() -> None:
    given = rows({("a", 0.5): CLEAR, ("b", 0.5): [70.0] * 3, ("a", 0.25): [60.0], ("b", 0.25): [62.0]})
    given.loc[(given.arm == "b") & (given.macs == 0.25), "seed"] = 7
    assert report.ranks(given).macs.tolist() == [0.5, 0.5]
    for nothing in (given[given.macs == 0.25], rows({("dense", 1.0): [73.0] * 3})):
        with pytest.raises(ValueError, match="no arm can be ranked"):
            report.ranks(nothing)


def test_the_summary_says_how_many_differences_lie_on_either_side_of_the_bound() -> None:
    found = rows({("a", 0.5): CLEAR, ("a", 0.25): WORSE, ("b", 0.5): [70.0] * 3, ("b", 0.25): [70.0] * 3})
    assert report.verdict(BETTER, found).summary == "-10.0 to +2.0 points; above 0 in 1 of 2, below in 1"


def test_rows_of_different_images_are_not_compared() -> None:
    found = rows({("a", 0.5): CLEAR, ("b", 0.5): UNCLEAR, ("c", 0.5): UNCLEAR})
    unlike = {"data_digest": "2", "data_source": "torchvision"}
    for arm, seed in (("c", 0), ("a", 3)):  # an arm that is not compared; a seed that has no pair
        found = pd.concat([found, found[(found.arm == arm) & (found.seed == 0)].assign(seed=seed, **unlike)])
    assert report.verdict(BETTER, found).word == "does not hold here"
    found.loc[(found.arm == "b") & (found.seed == 2), list(unlike)] = list(unlike.values())
    with pytest.raises(ValueError, match=r"rows of seed 2 .* measured on image archive \(JPEG\) and on torchvision"):
        report.verdict(BETTER, found)


def test_the_interval_of_several_differences_is_that_of_all() -> None:
    # a - b is 1, 2, 3 at a half: 2 ∓ 4.3027/√3; and -10 each time at a quarter
    found = rows(
        {("a", 0.5): [71.0, 72.0, 73.0], ("a", 0.25): [60.0] * 3, ("b", 0.5): [70.0] * 3, ("b", 0.25): [70.0] * 3}
    )
    assert report.verdict(BETTER, found).interval == "-10.0 to +4.5"
    one = report.verdict(BETTER, found[found.macs == 0.5])
    assert (one.interval, one.summary) == ("-0.5 to +4.5", "+2.0 points; above 0 in 0 of 1, below in 0: undecided")
    assert str(one) == f"{BETTER.text}\n    -> does not hold here   ({one.summary})"
    two_seeds = report.verdict(BETTER, found[found.seed < 2])
    assert (two_seeds.interval, two_seeds.summary) == ("", "")
    assert str(two_seeds) == f"{BETTER.text}\n    -> not tested here"


def recorded(folder: Path, values: Mapping[str, float]) -> Store:
    """Return a store with constructed rows of notebook 02: {arm: accuracy}, seeds 0.1 apart."""
    store = Store(folder)
    for (arm, macs, seed), experiment in claims.load("02").experiments().items():
        if arm in values:
            row: Row = {"key": experiment.key, "dataset": "cifar10", "model": "convnet-bn", "method": experiment.method}
            row |= {"effort": "brief", "macs": macs, "seed": seed, "seconds": 20.0}
            row |= {"data_source": "archive (JPEG)", "data_digest": "1"}
            store.add(row | dict.fromkeys(METRICS, values[arm] + seed / 10))
    return store


def test_the_table_reads_the_store_and_computes_nothing(tmp_path: Path) -> None:
    store = recorded(tmp_path, {"l1-filters": 82.0, "dense": 82.5, "random-filters": 81.0})
    table = report.verdict_table(store)
    assert len(table) == sum(len(one.claims) for paper in claims.load_all() for one in paper.everywhere)
    of_filters = table[table.notebook == "02_filter_pruning"].drop_duplicates("claim").set_index("claim")
    lines = {claim.id: of_filters.loc[claim.text] for claim in claims.load("02").claims}
    smallest, regained = lines["smallest"], lines["regained"]
    assert (smallest.verdict, regained.verdict) == ("holds", "holds")
    assert smallest["measured here"] == "+1.0 to +1.0 points; above 0 in 3 of 3, below in 0"
    assert smallest["95% interval"] == "+1.0 to +1.0"
    assert regained["measured here"] == "-0.5 points; above −1 in 1 of 1, below in 0"
    assert regained["paper's number"].startswith("6.6 % (VGG-16-A")
    assert smallest["paper's number"] == ""
    assert smallest.seeds == 5
    assert smallest.setting == "convnet-bn on cifar10 (JPEG), brief, at 1/2, 1/4, 1/8"
    assert regained.setting == "convnet-bn on cifar10 (JPEG), brief, at 1/2"
    assert smallest.minutes == 10.0  # 2 arms x 3 budgets x 5 seeds x 20 s
    assert set(table.verdict[table.notebook == "01_spp"]) == {"not tested here"}


def test_recorded_rows_are_the_repositorys_whatever_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELAB_RESULTS", str(tmp_path))
    paper = claims.load("03")
    rows = report.recorded(paper)
    assert [tuple(cell) for cell in rows[["arm", "macs", "seed"]].to_numpy().tolist()] == list(paper.experiments())
    assert set(rows.label) == set(paper.labels.values())
    assert report.recorded(replace(paper, setting=replace(paper.setting, model="vgg19"))).empty
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fraction", "name"),
    [(0.5, "1/2"), (0.1667, "1/6"), (0.1, "1/10"), (1.0, "1"), (0.66, "66%"), (0.3042, "30.4%"), (0.042, "4.2%")],
)
def test_budgets_are_called_by_their_simple_fractions(fraction: float, name: str) -> None:
    assert report.budget_name(fraction) == name


def test_settings_other_than_the_recorded_ones_are_found_in_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    whole = claims.load("02").experiments(dataset="digits", effort="smoke", macs=[0.3])
    shared = claims.load("02").experiments(dataset="digits", effort="smoke", macs=[0.7])
    others = [experiment for (arm, _, _), experiment in shared.items() if arm == "l1-filters"]
    for experiment in [*whole.values(), *others]:
        row = {"key": experiment.key, "dataset": "digits", "model": "convnet-bn", "method": experiment.method}
        row |= {
            "effort": "smoke",
            "macs": experiment.macs,
            "seed": experiment.seed,
            "seconds": 1.0,
            "data_source": "x",
            "data_digest": "1",
        }
        store.add(row | dict.fromkeys(METRICS, 90.0))
    table = report.verdict_table(store, recorded=False)
    ours = table[table.notebook == "02_filter_pruning"]
    assert ours.setting.iloc[0] == "convnet-bn on digits, smoke, at 3/10"
    about_a_half = ours.setting == "convnet-bn on digits, smoke, at 1/2"  # as these claims say themselves
    assert set(ours.setting[~about_a_half]) == {ours.setting.iloc[0]}
    assert set(ours.verdict[about_a_half]) == {"not tested here"}
    assert ours.verdict.tolist()[:3] == ["does not hold here"] * 3  # all equal, at the budget that all arms have
    recorded = report.verdict_table(store)
    assert set(recorded[recorded.notebook == "02_filter_pruning"].verdict) == {"not tested here"}
