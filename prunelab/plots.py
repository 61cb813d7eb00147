"""One style, and one colour and marker per method, in every figure."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import NullLocator
from numpy.typing import ArrayLike, NDArray

from prunelab._files import write_atomically
from prunelab.report import UNDECIDED, Verdict, budget_name, interval
from prunelab.structure import ChannelSpace, Plan

FIGURES = Path(__file__).resolve().parents[1] / "figures"
SIZE = 6.4, 3.7  # inches; at 160 dpi the width of a README column
DPI = 160
TITLE = 64  # characters of a claim in a line, above a figure of that width
DANGER = 0.1  # a unit that stays although p was once above this has recovered

BLACK, GREY = "#333333", "#999999"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = (  # Okabe and Ito: told apart with any colour vision
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#C9B200",
)  # fmt: skip


class Look(NamedTuple):
    """How an arm is drawn."""

    colour: str
    marker: str


LOOKS: dict[str, Look] = {
    "dense": Look(BLACK, "|"),
    "random": Look(GREY, "X"),
    "l1": Look(ORANGE, "^"),
    "finetune": Look(RED, "v"),
    "spp": Look(BLUE, "o"),
    "spp-no-recovery": Look(SKY, "o"),
    "l1-columns": Look(GREEN, "s"),
    "l1-filters": Look(ORANGE, "^"),
    "l1-filters-columns": Look(BLUE, "v"),
    "l1-greedy": Look(GREEN, "v"),
    "l1-largest": Look(RED, "<"),
    "random-filters": Look(GREY, "X"),
    "taylor": Look(PURPLE, "D"),
    "ssl": Look(RED, "h"),
    "ssl-columns": Look(SKY, "h"),
    "ssl-proximal": Look(PURPLE, "h"),
    "ssl-no-penalty": Look(GREY, "h"),
    "ssl-blocks": Look(RED, "s"),
    "l1-blocks": Look(ORANGE, "s"),
    "random-blocks": Look(GREY, "s"),
    "slimming": Look(YELLOW, "d"),
    "slimming-weak": Look(SKY, "d"),
    "slimming-no-penalty": Look(PURPLE, "d"),
    "slimming-uniform": Look(BLUE, "s"),
    "slimming-passes": Look(GREEN, "*"),
    "channel-pruning": Look(RED, "p"),
    "channel-pruning-independent": Look(SKY, "p"),
    "channel-pruning-first-k": Look(PURPLE, "v"),
    "channel-pruning-max-response": Look(GREEN, "^"),
    "channel-pruning-selection": Look(YELLOW, "s"),
    "hrank": Look(SKY, "p"),
    "hrank-reversed": Look(RED, "v"),
    "hrank-one-shot": Look(BLUE, "h"),
    "abcpruner": Look(PURPLE, "*"),
    "abcpruner-random-search": Look(GREEN, "v"),
    "abcpruner-random-widths": Look(RED, "v"),
    "abcpruner-l1": Look(BLUE, "*"),
    "abcpruner-none": Look(YELLOW, "*"),
    "dropnet": Look(GREEN, "*"),
    "dropnet-global": Look(BLUE, "*"),
    "dropnet-maximum": Look(RED, "v"),
    "dropnet-random": Look(SKY, "X"),
    "dropnet-reinitialised": Look(PURPLE, "D"),
    "dmcp": Look(BLUE, "d"),
    "dmcp-direct": Look(SKY, "d"),
    "autocompress": Look(RED, "*"),
    "autocompress-filters": Look(BLUE, "*"),
    "autocompress-impure": Look(PURPLE, "^"),
    "autocompress-uniform": Look(GREEN, "s"),
    "autocompress-filters-uniform": Look(SKY, "s"),
    "scratch": Look(BLACK, "x"),
    "scratch-b": Look(BLUE, "*"),
    "scratch-scales": Look(PURPLE, "x"),
    "scratch-random": Look(GREY, "X"),
    "scratch-low": Look(GREY, "x"),
    "finetune-paper": Look(RED, "v"),
    "finetune-restarted": Look(YELLOW, "^"),
    "finetune-scales": Look(PURPLE, "^"),
    "ticket": Look(GREEN, "d"),
    "ticket-low": Look(SKY, "d"),
}
"""Every arm of every notebook; a new arm is entered here."""


def look(arm: str) -> Look:
    """Return how an arm is drawn: as `LOOKS` says, grey if it is not there."""
    return LOOKS.get(arm, Look(GREY, "."))


def use_style() -> None:
    """Set the style of all figures that follow."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        rc={
            "figure.figsize": SIZE,
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "savefig.dpi": DPI,
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.labelsize": 10,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": "#E6E6E6",
            "grid.linewidth": 0.8,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
        },
    )


def accuracy_against_macs(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw accuracy against the fraction of the MACs kept: every seed, the mean, and its 95% interval.

    The dense arm is a line at its mean in a band that spans its seeds.

    Args:
        rows: as from `report.results`.
        ax: where to draw; default new axes.
    """
    ax = ax or plt.subplots()[1]
    labels = dict(zip(rows.arm, rows.label, strict=True))
    dense = rows[rows.method == "dense"]
    arms = [arm for arm in dict.fromkeys(rows.arm) if arm not in set(dense.arm)]
    if len(dense):
        ax.axhspan(dense.test_tuned.min(), dense.test_tuned.max(), color=BLACK, alpha=0.12, linewidth=0)
        ax.axhline(dense.test_tuned.mean(), color=BLACK, linewidth=1, linestyle="--")
    budgets = sorted(rows.macs[rows.method != "dense"].unique(), reverse=True)
    room = -np.diff(np.log2(budgets)).max(initial=-np.inf)  # to the nearest budget, whose marks stay apart from these
    step = min(0.05, 0.8 * room / max(len(arms), 1))
    for place, arm in enumerate(arms):
        aside = 2 ** (step * (place - (len(arms) - 1) / 2))  # side by side, not on top of each other
        _curve(ax, rows[rows.arm == arm], look(arm), aside)
    ax.set_xscale("log", base=2)
    ax.set_xticks(budgets, [budget_name(budget) for budget in budgets])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.invert_xaxis()
    ax.set(xlabel="MACs kept", ylabel=f"{_metric_name('test_tuned')} (%)")
    _legend(ax, {arm: labels[arm] for arm in (*dict.fromkeys(dense.arm), *arms)})
    return ax


def accuracy_by_arm(rows: pd.DataFrame, ax: Axes | None = None, metric: str = "test_tuned") -> Axes:
    """Draw one line per arm, in the order of the rows: every seed, the mean, and its 95% interval.

    An interval far wider than what was seen is cut off at the frame, where an arrowhead says so. From the dense arm, if
    it is among the rows, a dashed line goes down at its mean, in a band that spans its seeds.

    Args:
        rows: as from `report.results`, at one budget.
        ax: where to draw; default new axes of a fitting height.
        metric: a column in percent.
    """
    labels = dict(zip(rows.arm, rows.label, strict=True))
    ax = ax or plt.subplots(figsize=(SIZE[0], 1.0 + 0.3 * len(labels)))[1]
    dense = rows[metric][rows.method == "dense"]
    if len(dense):
        ax.axvspan(dense.min(), dense.max(), color=BLACK, alpha=0.12, linewidth=0)
        ax.axvline(dense.mean(), color=BLACK, linewidth=1, linestyle="--")
    least, most = rows[metric].min(), rows[metric].max()
    by_arm = {arm: rows[metric][rows.arm == arm].to_numpy() for arm in labels}
    _, lows, highs = np.transpose([interval(values) for values in by_arm.values()])
    reach = 0.25 * (most - least)
    left, right = max(np.nanmin([least, *lows]), least - reach), min(np.nanmax([most, *highs]), most + reach)
    frame = left - 0.1 * reach, right + 0.1 * reach
    for place, (arm, values) in enumerate(by_arm.items()):
        colour, marker = look(arm)
        ax.hlines(place, lows[place], highs[place], color=colour, linewidth=1.6)
        ax.plot(values, np.full(len(values), place), marker, color=colour, alpha=0.35, markersize=4)
        ax.plot(values.mean(), place, marker, color=colour, markersize=8)
        for end, head, is_cut in zip(frame, "<>", (lows[place] < frame[0], highs[place] > frame[1]), strict=True):
            if is_cut:
                ax.plot(end, place, head, color=colour, markersize=6, clip_on=False)
    ax.set_yticks(range(len(labels)), list(labels.values()))
    ax.set(xlim=frame, ylim=(len(labels) - 0.5, -0.5))
    ax.grid(axis="x", visible=True)
    ax.set_xlabel(f"{_metric_name(metric)} (%)")
    return ax


def accuracy_panels(rows: pd.DataFrame, title: str) -> Figure:
    """Draw `accuracy_by_arm` in a panel per budget, from the most MACs to the fewest; the dense arm is in each.

    Args:
        rows: as from `report.results`: the same arms at every budget.
        title: what stands above all panels.
    """
    dense, others = rows[rows.method == "dense"], rows[rows.method != "dense"]
    budgets = sorted(others.macs.unique(), reverse=True)
    size = 3.6 + 2.7 * len(budgets), 1.1 + 0.3 * rows.arm.nunique()
    figure, panels = plt.subplots(1, len(budgets), figsize=size, sharey=True, squeeze=False)
    for budget, ax in zip(budgets, panels[0], strict=True):
        accuracy_by_arm(pd.concat([dense, others[others.macs == budget]]), ax)
        ax.set_title(f"{budget_name(budget)} of the MACs")
    for ax in panels[0, 1:]:
        ax.set_xlabel("")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _curve(ax: Axes, rows: pd.DataFrame, look: Look, aside: float) -> None:
    ax.plot(rows.macs * aside, rows.test_tuned, look.marker, color=look.colour, alpha=0.3, markersize=4)
    means = rows.groupby("macs").test_tuned.mean()
    ax.plot(means.index * aside, means, color=look.colour, marker=look.marker, markersize=6)
    for macs in means.index:
        _, low, high = interval(rows.test_tuned[rows.macs == macs].to_numpy())
        ax.vlines(macs * aside, low, high, color=look.colour, linewidth=1.2)


def _legend(ax: Axes, labels: Mapping[str, str]) -> None:
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="--" if arm == "dense" else "-", label=label)
        for arm, label in labels.items()
        for colour, marker in [look(arm)]
    ]
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _metric_name(metric: str) -> str:
    split, stage = metric.split("_")
    when = {"cut": "right after the cut", "recalibrated": "after batch-norm recalibration", "tuned": "after retraining"}
    return f"{'test' if split == 'test' else 'validation'} accuracy {when[stage]}"


def paired_differences(verdict: Verdict, labels: Mapping[str, str], ax: Axes | None = None) -> Axes:
    """Draw each difference of a verdict with its 95% interval, and the bound that it must be clear of.

    Above it stands the claim, and what came of it.

    Args:
        verdict: what was decided.
        labels: what to call each arm, as `Paper.labels`.
        ax: where to draw; default new axes.
    """
    found = verdict.differences
    ax = ax or plt.subplots(figsize=(SIZE[0], 1.2 + 0.34 * len(found)))[1]
    ax.axvline(0, color=BLACK, linewidth=1)
    if verdict.claim.margin:
        ax.axvline(-verdict.claim.margin, color=BLACK, linewidth=1, linestyle="--")
    names = []
    for place, row in enumerate(found.to_dict("records")):
        colour = look(row["control"] if row["control"] != "dense" else verdict.claim.treatment).colour
        ax.hlines(place, row["low"], row["high"], color=colour, linewidth=2)
        face = colour if row["passed"] else "white"
        ax.plot(row["mean"], place, "o", markersize=7, color=colour, markerfacecolor=face)
        names.append(f"{labels[row['control']]}, {budget_name(row['macs'])}")
    ax.set_yticks(range(len(found)), names)
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", visible=True)
    ax.set_xlabel(f"{labels[verdict.claim.treatment]} minus control (points)")
    word = f"{verdict.word}, {UNDECIDED}" if verdict.undecided else verdict.word
    ax.set_title(f"{textwrap.fill(verdict.claim.text, TITLE)}\n→ {word}", fontsize=10)
    return ax


def kept_by_network(kept: pd.DataFrame, title: str) -> Axes:
    """Draw how much stays of each layer, in a row for each network.

    Args:
        kept: in percent, [networks, layers]; both are named by their labels.
        title: of the picture.
    """
    ax = plt.subplots(figsize=(max(6.0, 2.4 + 0.6 * kept.shape[1]), 0.9 + 0.32 * len(kept)))[1]
    sns.heatmap(kept, annot=True, fmt=".0f", cmap="viridis", vmin=0, vmax=100, ax=ax)
    ax.set(title=title, ylabel="")
    ax.tick_params(length=0)
    return ax


def kept_per_layer(plan: Plan, ax: Axes | None = None) -> Axes:
    """Draw, for each group of a plan, how many of its units stay, in percent and as a count."""
    ax = ax or plt.subplots(figsize=(SIZE[0], 0.9 + 0.3 * len(plan.sizes)))[1]
    names = list(plan.sizes)
    shares = [100 * plan.widths[name] / plan.sizes[name] for name in names]
    ax.barh(names, [100.0] * len(names), color="#EEEEEE", height=0.7)
    ax.barh(names, shares, color=BLUE, height=0.7)
    for place, name in enumerate(names):
        inside = shares[place] > 80
        text = f" {plan.widths[name]} of {plan.sizes[name]} "
        colour, side = ("white", "right") if inside else (BLACK, "left")
        ax.text(shares[place], place, text, va="center", ha=side, color=colour, fontsize=8)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlim=(0, 100), xlabel=f"{plan.space} kept (%)")
    return ax


def coupling(space: ChannelSpace, plan: Plan | None = None, ax: Axes | None = None) -> Axes:
    """Draw which layers write, read and let through each group of channels, and what a plan removes of them.

    A row is a layer, in the order in which they run; a column is a group, which is cut everywhere at once; what ties it
    together stands below. A cell holds the number of channels, and is filled as far as the plan keeps them. Batch norms
    that follow a convolution are left out: they go with it.

    Args:
        space: the network's channels.
        plan: what is kept; default everything.
        ax: where to draw; default new axes of a fitting size.
    """
    following = set(space.coupling.norms.values())
    places = [place for place in space.places() if place.layer not in following]
    rows = {layer: row for row, layer in enumerate(dict.fromkeys(place.layer for place in places))}
    kept = (space.sizes if plan is None else space.widths(plan)) / space.sizes
    ax = ax or plt.subplots(figsize=(2.6 + 0.36 * len(kept), 1.6 + 0.21 * len(rows)))[1]
    for row in range(0, len(rows), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="#F6F6F6", linewidth=0, zorder=0)
    for group, share in enumerate(kept):
        at = [place for place in places if place.channels[group]]
        ax.vlines(group, rows[at[0].layer], rows[at[-1].layer], color="#BBBBBB", linewidth=1.2, zorder=1)
        for place in at:
            _cell(ax, group, rows[place.layer], PLACES[place.role], place.channels[group], share)
    ties = [dict.fromkeys(tie.split(" ")[0] for tie in tied.split("; ")) for tied in space.describe().tied_by]
    ax.set_xticks(range(len(kept)), [", ".join(words) for words in ties], fontsize=8, rotation=90)
    ax.set_yticks(range(len(rows)), list(rows), fontsize=8)
    ax.set(xlim=(-0.6, len(kept) - 0.4), ylim=(len(rows) - 0.4, -0.6))
    ax.tick_params(length=0)
    ax.grid(visible=False)
    sns.despine(ax=ax, left=True, bottom=True)
    handles = [Patch(color=PLACES[role], label=role) for role in PLACES if any(p.role == role for p in places)]
    if plan is not None:
        handles.append(Patch(facecolor="white", edgecolor=GREY, label="removed"))
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, handlelength=1.2, columnspacing=1.4)
    return ax


PLACES = {"writes": "#F2C35E", "through": "#C4C4C4", "reads": "#7DB7DE"}  # light enough for black numbers


def _cell(ax: Axes, column: int, row: int, colour: str, channels: int, share: float) -> None:
    corner, width, height = (column - 0.43, row - 0.4), 0.86, 0.8
    ax.add_patch(Rectangle(corner, width, height, facecolor="white", edgecolor=colour, zorder=2))
    ax.add_patch(Rectangle(corner, share * width, height, facecolor=colour, linewidth=0, zorder=2))
    ax.text(column, row, f"{share * channels:.0f}", ha="center", va="center_baseline", fontsize=7, color=BLACK)


def probability_trace(trace: ArrayLike, kept: ArrayLike, ax: Axes | None = None) -> Axes:
    """Draw the pruning probability of every unit of a layer against the updates.

    Args:
        trace: p, [updates, units], each in [0, 1].
        kept: indices of the units that stayed.
        ax: where to draw; default new axes.
    """
    ax = ax or plt.subplots()[1]
    p: NDArray[np.float64] = np.asarray(trace, dtype=float)
    stayed = np.isin(np.arange(p.shape[1]), np.asarray(kept))
    recovered = stayed & (p.max(axis=0) > DANGER)
    for chosen, colour, label in (
        (~stayed, GREY, "removed"),
        (stayed & ~recovered, SKY, "kept"),
        (recovered, BLUE, f"kept after p > {DANGER}"),
    ):
        alpha = float(np.clip(30 / max(1, chosen.sum()), 0.1, 0.8))
        ax.plot(p[:, chosen], color=colour, alpha=alpha, linewidth=1)
        ax.plot([], [], color=colour, label=f"{label} ({int(chosen.sum())})")
    ax.set(xlabel="updates of p", ylabel="pruning probability p", ylim=(-0.03, 1.03))
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def save(figure: Figure, name: str) -> None:
    """Write a figure to `<name>.png` in the repository's figures folder, or in `PRUNELAB_FIGURES`, if there is one."""
    folder = Path(os.environ.get("PRUNELAB_FIGURES") or FIGURES)
    if folder.is_dir():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=DPI, metadata={"Software": None})
        write_atomically(folder / f"{name}.png", image.getvalue())
