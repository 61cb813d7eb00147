"""From rows to a word: paired differences over seeds, a rule, a verdict, and the table of all of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from prunelab import claims
from prunelab.claims import Claim, Paper
from prunelab.experiments import RECORDED, Experiment, Row, Store, run

HOLDS, IN_PART, FAILS, NOT_TESTED = WORDS = "holds", "holds in part", "does not hold here", "not tested here"

UNDECIDED = "undecided"  # said of a claim that does not hold here, where no interval lies on the other side either

CONFIDENCE = 0.95
COLUMNS = [
    *("notebook", "paper", "claim", "paper's number"),
    *("measured here", "95% interval", "verdict", "setting", "seeds", "minutes"),
]

NAMED = ["arm", "label", "method", "macs", "seed", "data_source", "data_digest", *claims.METRICS]

Cells = Mapping[tuple[str, float, int], Experiment]


@dataclass(frozen=True)
class Verdict:
    """How a claim came out.

    Attributes:
        claim: what was claimed.
        word: "holds", "holds in part", "does not hold here" or "not tested here".
        differences: one row per control and budget: control, macs; mean, low, high of treatment − control in points,
            with the 95% Student-t interval; seeds, the number of pairs; passed, whether low is above the bound; failed,
            whether high is below it. With neither, the matter is open.
    """

    claim: Claim
    word: str
    differences: pd.DataFrame

    def __str__(self) -> str:
        """Return the claim, and below it the word with what was measured."""
        measured = f"   ({self.summary})" if self.summary else ""
        return f"{self.claim.text}\n    -> {self.word}{measured}"

    @property
    def summary(self) -> str:
        """The measured differences in a few words; empty if the claim was not tested."""
        if self.word == NOT_TESTED:
            return ""
        means = self.differences["mean"]
        span = f"{means.min():+.1f}" if len(means) == 1 else f"{means.min():+.1f} to {means.max():+.1f}"
        bound = f"−{self.claim.margin:g}" if self.claim.margin else "0"
        above, below = int(self.differences.passed.sum()), int(self.differences.failed.sum())
        counted = f"{span} points; above {bound} in {above} of {len(means)}, below in {below}"
        return f"{counted}: {UNDECIDED}" if self.undecided else counted

    @property
    def undecided(self) -> bool:
        """Whether the claim does not hold here, with no interval wholly on the other side of its bound either."""
        return self.word == FAILS and not self.differences.failed.any()

    @property
    def interval(self) -> str:
        """The 95% interval; of several differences the lowest and the highest bound; empty if not tested."""
        if self.word == NOT_TESTED:
            return ""
        return f"{self.differences.low.min():+.1f} to {self.differences.high.max():+.1f}"


def results(
    paper: Paper, experiments: Cells, *, store: Store | None = None, jobs: int | None = None, progress: bool = True
) -> pd.DataFrame:
    """Return the rows of a paper's experiments, in their order, computing only what the store lacks.

    Args:
        paper: names the arms.
        experiments: some or all of `paper.experiments(...)`.
        store: as in `prunelab.experiments.run`.
        jobs: as in `prunelab.experiments.run`; where the environment variable `PRUNELAB_CLUSTER` holds an address as
            in `prunelab.cluster.connect`, rows are computed there instead.
        progress: as in `prunelab.experiments.run`.

    Returns:
        The columns of a row, after `arm` (its name) and `label` (what figures call it).
    """
    if address := os.environ.get("PRUNELAB_CLUSTER"):
        from prunelab import cluster  # needs Dask, which not everyone has

        rows = cluster.run(experiments.values(), address, store=store, progress=progress)
    else:
        rows = run(experiments.values(), store=store, jobs=jobs, progress=progress)
    return _named(paper, experiments, {str(row["key"]): row for row in rows.to_dict("records")})


def recorded(paper: Paper) -> pd.DataFrame:
    """Return the rows of a paper's recorded setting that come with the repository, as `results`; none is computed."""
    return _named(paper, paper.experiments(), Store(RECORDED).rows())


def _named(paper: Paper, experiments: Cells, known: Mapping[str, Mapping[Any, Any]]) -> pd.DataFrame:
    """Return those rows of some experiments that are known, with the arms that they belong to."""
    found = [
        {"arm": arm, "label": paper.arms[arm].label, **known[experiment.key]}
        for (arm, _, _), experiment in experiments.items()
        if experiment.key in known
    ]
    return pd.DataFrame(found, columns=None if found else NAMED)


def verdict(claim: Claim, rows: pd.DataFrame) -> Verdict:
    """Decide a claim by the paired differences treatment − control over seeds, at every budget and for every control.

    "better" asks that the 95% Student-t interval of the mean difference lies above 0, "not worse" that it lies above
    −margin. All intervals do: holds. None does: does not hold here. Else: holds in part. Fewer than 3 common seeds at
    any budget of any control, or a budget of the claim that was not run: not tested here. A dense control, which has
    one budget, is compared with the treatment at each of the treatment's.

    Args:
        claim: what to decide.
        rows: as from `results`; arms that the claim does not name are ignored.

    Raises:
        ValueError: rows that are to be compared were measured on different images.
    """
    _check_images(rows[rows.arm.isin([claim.treatment, *claim.controls])])
    values = rows.set_index(["arm", "macs", "seed"])[claim.metric]
    dense = set(rows.arm[rows.method == "dense"])
    tested = rows[rows.arm.isin([claim.treatment, *claim.controls]) & ~rows.arm.isin(dense)]
    budgets = claim.macs or sorted(tested.macs.unique(), reverse=True)
    found = []
    for control in claim.controls:
        for budget in budgets:
            treated = _by_seed(values, claim.treatment, budget)
            pairs = (treated - _by_seed(values, control, 1.0 if control in dense else budget)).dropna()
            mean, low, high = interval(pairs.to_numpy(dtype=float))
            found.append((control, budget, mean, low, high, len(pairs), low > -claim.margin, high < -claim.margin))
    columns = ["control", "macs", "mean", "low", "high", "seeds", "passed", "failed"]
    differences = pd.DataFrame(found, columns=columns)
    return Verdict(claim, _word(differences), differences)


def _check_images(rows: pd.DataFrame) -> None:
    """Refuse pairs of which one was recorded on a copy of the data set that was encoded anew, and the other was not."""
    for seed, of_seed in rows.groupby("seed"):
        if of_seed.data_digest.nunique() > 1:
            sources = " and on ".join(sorted({*of_seed.data_source}))
            raise ValueError(
                f"rows of seed {seed} cannot be compared, as they were measured on {sources}: let PRUNELAB_DATA "
                "name the images of the recorded rows, or PRUNELAB_RESULTS a folder of your own"
            )


def _by_seed(values: pd.Series[float], arm: str, budget: float) -> pd.Series[float]:
    chosen = (values.index.get_level_values("arm") == arm) & (values.index.get_level_values("macs") == budget)
    return values[chosen].droplevel(["arm", "macs"])


def _word(differences: pd.DataFrame) -> str:
    if differences.empty or differences.seeds.min() < claims.LEAST_SEEDS:
        return NOT_TESTED
    if differences.passed.all():
        return HOLDS
    return IN_PART if differences.passed.any() else FAILS


def interval(values: Sequence[float] | NDArray[np.floating[Any]]) -> tuple[float, float, float]:
    """Return the mean and the 95% Student-t interval around it, x̄ ∓ t(n − 1)·s/√n; NaN where n is too small for it."""
    n = len(values)
    mean = float(np.mean(values)) if n else float("nan")
    if n < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return mean, mean - half, mean + half


def beats(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Return which arms beat which for certain: bool [arms, arms], row beats column.

    The 95% interval of the paired difference lies above 0, as in `verdict`. Intervals are not widened for the number of
    pairs, so among many arms a few are wrong.

    Args:
        accuracy: in percent, [seeds, arms].
    """
    values = accuracy.to_numpy().T
    certain = [[interval(a - b)[1] > 0 for b in values] for a in values]
    return pd.DataFrame(certain, index=accuracy.columns, columns=accuracy.columns)


def ranks(rows: pd.DataFrame, metric: str = "test_tuned") -> pd.DataFrame:
    """Rank the arms at each budget, with the ranks that the seeds leave possible.

    Of k arms one can stand as high as 1 + (how many beat it for certain), and as low as k − (how many it beats for
    certain); for certain is as in `beats`.

    Args:
        rows: as from `results`; the dense arm is left out.
        metric: a column of the rows, in percent.

    Returns:
        Per budget, largest first, the best arm first: macs, arm, label, mean in percent; rank, by the mean; highest and
        lowest, the ranks that are possible; seeds, those that all arms of the budget have.

    Raises:
        ValueError: at no budget is there a seed that all of its arms have.
    """
    labels = dict(zip(rows.arm, rows.label, strict=True))
    found: list[pd.DataFrame] = []
    for macs, some in rows[rows.method != "dense"].groupby("macs", sort=False):
        accuracy = some.pivot(index="seed", columns="arm", values=metric).dropna()
        if accuracy.empty:
            continue
        certain = beats(accuracy).to_numpy()
        table = pd.DataFrame({"macs": macs, "arm": accuracy.columns, "mean": accuracy.mean().to_numpy()})
        table.insert(2, "label", table.arm.map(labels))
        table["rank"] = table["mean"].rank(ascending=False, method="min").astype(int)
        table["highest"], table["lowest"] = 1 + certain.sum(axis=0), len(table) - certain.sum(axis=1)
        found.append(table.assign(seeds=len(accuracy)).sort_values("rank"))
    if not found:
        raise ValueError("no arm can be ranked: at no budget do all pruned arms have a seed in common")
    return pd.concat(found).sort_values(["macs", "rank"], ascending=[False, True], ignore_index=True)


def accuracy_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the test accuracy of each arm at each budget, mean ± half the 95% interval over seeds, as text.

    Columns are the three moments: right after the cut, with batch norm recalibrated, retrained.

    Args:
        rows: as from `results`.
    """
    stages = {
        "test_cut": "right after the cut",
        "test_recalibrated": "batch norm recalibrated",
        "test_tuned": "retrained",
    }
    table = rows.groupby(["label", rows.macs.map(budget_name)], sort=False)[list(stages)].agg(_with_interval)
    return table.rename(columns=stages).rename_axis(["arm", "MACs kept"])


def _with_interval(values: pd.Series[float]) -> str:
    mean, low, high = interval(values.to_numpy())
    return f"{mean:.1f}" if np.isnan(high) else f"{mean:.1f} ± {(high - low) / 2:.1f}"


def budget_name(fraction: float) -> str:
    """Return a budget in (0, 1] as people say it: "1/4", or "30.4%" where no simple fraction is the same."""
    simple = Fraction(fraction).limit_denominator(16)
    return str(simple) if round(float(simple), 4) == round(fraction, 4) else f"{100 * fraction:.3g}%"


def verdict_table(store: Store | None = None, *, recorded: bool = True) -> pd.DataFrame:
    """Return a row per claim and setting, from the rows that the store has; nothing is computed.

    Args:
        store: default the repository's.
        recorded: judge the papers' recorded settings, whether they were run or not; False: every data set, network and
            effort that the store has rows of, and no others.

    Returns:
        The columns `COLUMNS`. The paper's number and what was measured here stand in columns of their own, and need not
        be of the same thing. The interval is the 95% one of the difference; where a claim makes several comparisons it
        goes from their lowest to their highest bound.
    """
    store = store or Store()
    known = store.rows()
    papers = claims.load_all()
    if recorded:
        judged: list[tuple[Paper, Cells]] = [(one, one.experiments()) for paper in papers for one in paper.everywhere]
    else:
        judged = [(paper, cells) for paper in papers for cells in found(paper, known.values())]
    lines = [_line(paper, claim, cells, known) for paper, cells in judged for claim in paper.claims]
    return pd.DataFrame(lines, columns=COLUMNS)


def headlines(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a `verdict_table()` that are about the main claim of a notebook, on its main setting."""
    main = {(paper.notebook, claim.text) for paper in claims.load_all() for claim in paper.claims if claim.headline}
    about = [pair in main for pair in zip(table.notebook, table.claim, strict=True)]
    return table[about].drop_duplicates("notebook")  # the main setting comes first


def found(paper: Paper, rows: Iterable[Row]) -> list[Cells]:
    """Return the experiments of a paper for each data set, network and effort that there are rows of.

    Of the budgets, those at which most of its arms were run: papers share arms, and at the others there may be no more
    than what another paper needs.
    """
    rows = [row for row in rows if ("pretrained" in row) == (paper.setting.pretrained is not None)]
    grids: list[Cells] = []
    for setting in dict.fromkeys(map(_setting, rows)):
        same = [row for row in rows if _setting(row) == setting]
        dataset, model, effort, pretrained = setting
        seeds = 1 + max(row["seed"] for row in same)
        macs = sorted({row["macs"] for row in same if row["method"] != "dense"}, reverse=True)
        grid = paper.experiments(
            dataset=dataset, model=model, effort=effort, seeds=seeds, macs=macs, pretrained=pretrained
        )
        keys = {row["key"] for row in same}
        ran = {cell[:2] for cell, experiment in grid.items() if experiment.key in keys and experiment.method != "dense"}
        arms = Counter(budget for _, budget in ran)
        if arms:
            most = {budget for budget in arms if arms[budget] == max(arms.values())}
            grids.append({cell: one for cell, one in grid.items() if one.method == "dense" or cell[1] in most})
    return grids


def _setting(row: Row) -> tuple[str, str, str, str | None]:
    return row["dataset"], row["model"], row["effort"], row.get("pretrained")


def _line(paper: Paper, claim: Claim, experiments: Cells, known: Mapping[str, Row]) -> tuple[object, ...]:
    rows = _named(paper, experiments, known)
    rows = rows[rows.arm.isin([claim.treatment, *claim.controls])]
    decided = verdict(claim, rows)
    number = str(paper.headline) if claim.headline and paper.headline else ""
    some = next(iter(experiments.values()))
    after = f" after {some.pretrained}" if some.pretrained else ""
    budgets = ", ".join(map(budget_name, decided.differences.macs.unique()))
    at = f", at {budgets}" if budgets else ""
    setting = f"{some.model} on {images_of(rows) or some.dataset}{after}, {some.effort}{at}"
    seeds = int(decided.differences.seeds.min()) if len(decided.differences) else 0
    minutes = round(rows.seconds.sum() / 60, 1) if len(rows) else 0.0
    measured = decided.summary, decided.interval, decided.word
    return (paper.notebook, paper.system, claim.text, number, *measured, setting, seeds, minutes)


def images_of(rows: pd.DataFrame) -> str:
    """Return what to call the images of some rows: the data set, and that they are JPEGs if they are; "" for no rows.

    A data set that was re-encoded is not the paper's: its accuracies are a little lower.
    """
    pairs = set() if rows.empty else set(zip(rows.dataset.astype(str), rows.data_source.astype(str), strict=True))
    return ", ".join(sorted({f"{name} (JPEG)" if "JPEG" in source else name for name, source in pairs}))


def markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown, the verdicts in bold."""
    cells = table.assign(verdict=[f"**{word}**" for word in table.verdict]).astype(str)
    lines = [list(cells.columns), ["---"] * cells.shape[1], *cells.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
