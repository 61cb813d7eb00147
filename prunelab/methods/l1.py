"""Pruning Filters for Efficient ConvNets (Li et al., ICLR 2017): one shot, by the L1 norm of each filter."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, get_args

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunelab import scores as criteria
from prunelab._checks import Legal, check_fields, check_shares, one_of, within
from prunelab.data import Data
from prunelab.methods.base import SPACES, Pruned, space_of
from prunelab.structure import Budget, ChannelSpace, Plan, Space
from prunelab.structure.graph import Axis
from prunelab.training import Context, evaluate

Selection = Literal["smallest", "largest", "random"]
Order = Literal["independent", "greedy"]


@dataclass(frozen=True)
class L1:
    """Remove the units of least s_j = Σ|W_j|, ranked inside each layer, without training.

    Where layers are added, the shortcut decides: the filters of its 1x1 projection are ranked, and every layer of the
    sum loses the same ones. With an identity shortcut there is nothing to rank, and the sum stays whole.
    Hidden linear layers are cut like convolutions, even where a budget of convolution MACs gains nothing by it; the
    paper's VGG-16 keeps its own, as do those `ratios` that do not name it.

    unit: "filters", or, which the rule on sums does not touch, "columns" of the im2col matrix, SPP's one-shot control;
        "filters+columns" or "blocks", those of SSL.
    selection: which go: the "smallest", the "largest" or "random" ones, drawn by the context's seed.
    order: "independent" ranks whole filters; "greedy" goes from input to output, and the sum of a filter counts only
        the input channels that are left (filters only: removing columns leaves every layer all its inputs).
    ratios: {group: fraction p to remove, in [0, 1)}: floor(C·(1 - p)) of C units stay, in exact arithmetic, and at
        least one; groups not named stay whole, and the budget is an upper bound. None: the same fraction everywhere,
        as the budget asks.

    Raises ValueError naming a field, its value and the legal values. A call raises it for ratios of unknown groups, of
    sums with an identity shortcut or above the budget, and for a budget that cannot be met, naming the least that can.
    """

    name: ClassVar[str] = "l1"

    unit: str = "filters"
    selection: Selection = "smallest"
    order: Order = "independent"
    ratios: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(
            self,
            self.name,
            unit=one_of(SPACES),
            selection=one_of(get_args(Selection)),
            order=Legal(
                "'independent', or 'greedy' with unit='filters'",
                lambda order: order == "independent" or (order == "greedy" and self.unit == "filters"),
            ),
        )
        check_shares("l1: ratios", self.ratios, within("[0, 1)"))

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Prune in one shot."""
        space = space_of(self.unit, net, context.data.example)
        scores = {group.name: self._score(space, group.name, context.seed) for group in space.groups}
        if self.ratios is None:
            plan = space.plan_for(scores, budget)
        else:
            plan = space.plan_for(scores, {group: _stays(ratio) for group, ratio in self.ratios.items()})
            _check(space, plan, budget)
        if self.order == "greedy":
            plan = self._greedy(space, plan.widths, context.seed)
        return Pruned(space.shrink(plan), plan)

    def _score(self, space: Space, group: str, seed: int) -> Tensor:
        """Score a group's units; high stays, infinite stays whatever the budget."""
        weights = deciding_weights(space, group)
        if weights is None:
            return torch.full((len(space.unit_weights(group)),), torch.inf)
        if self.selection == "random":
            return space.scores(criteria.random(seed))[group]
        norms = weights.abs().sum(1)
        return norms if self.selection == "smallest" else -norms

    def _greedy(self, space: Space, widths: Mapping[str, int], seed: int) -> Plan:
        """Rank group after group on a copy in which all that the groups before have lost is zero."""
        scratch = copy.copy(space)
        scratch.net = copy.deepcopy(space.net)
        plan = space.plan({})
        for group, width in widths.items():
            best = self._score(scratch, group, seed).argsort(descending=True, stable=True)[:width]
            plan = space.plan({**plan.keep, group: best.tolist()})
            scratch.apply_gates(scratch.net, space.gates(plan))
        return plan


def deciding_weights(space: Space, group: str) -> Tensor | None:
    """Return the weights that rank a group's units, [size, weights per unit]; None where all of them stay.

    They are the weights that compute the units, but in a sum of layers those of the 1x1 projections alone.
    """
    if not isinstance(space, ChannelSpace) or not space.is_sum(group):
        return space.unit_weights(group)
    shortcuts = projections(space, group)
    return torch.cat([space.filters(axis, group) for axis in shortcuts], dim=1) if shortcuts else None


def projections(space: ChannelSpace, group: str) -> list[Axis]:
    """Return the shortcuts with weights: 1x1 convolutions that write the group from what a branch reads too."""
    read = {p.module: p.reads.tobytes() for p in space.coupling.products if p.reads is not None}
    return [
        axis
        for axis in space.writers(group)
        if getattr(space.net.get_submodule(axis.module), "kernel_size", None) == (1, 1)
        and axis.module in read
        and list(read.values()).count(read[axis.module]) > 1
    ]


def _stays(ratio: float) -> Fraction:
    return 1 - Fraction(str(ratio))


def _check(space: Space, plan: Plan, budget: Budget) -> None:
    for group, width in plan.widths.items():
        if width < plan.sizes[group] and deciding_weights(space, group) is None:
            raise ValueError(f"l1: ratios[{group!r}] must be 0: with an identity shortcut, the sum stays whole")
    kept = space.spent(budget)(space.widths(plan))
    if kept > budget.fraction:
        raise ValueError(f"l1: ratios keep {kept:.4f} of the {budget.what}; the budget is {budget.fraction}")


# -- choosing the ratios ----------------------------------------------------------------------------------------------


def sensitivity(
    space: Space, data: Data, ratios: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9), *, progress: bool = True
) -> pd.DataFrame:
    """Prune one layer at a time at each ratio, without retraining, and measure.

    Args:
        space: a trained network's; groups that stay whole (identity shortcuts) are left out.
        data: its validation images are used.
        ratios: fractions to remove, in [0, 1).
        progress: show a bar.

    Returns:
        One row per layer and ratio: layer, ratio, accuracy in percent.
    """
    weights = {group.name: deciding_weights(space, group.name) for group in space.groups}
    scores = dict(space.scores("l1")) | {name: w.abs().sum(1) for name, w in weights.items() if w is not None}
    cases = [(layer, ratio) for layer, w in weights.items() if w is not None for ratio in ratios]
    rows = []
    for layer, ratio in tqdm(cases, desc="sensitivity", leave=False, disable=not progress):
        plan = space.plan_for(scores, {layer: _stays(ratio)})
        rows.append((layer, ratio, evaluate(space.shrink(plan), data)))
    return pd.DataFrame(rows, columns=["layer", "ratio", "accuracy"])


def _first_convs(stages: Mapping[str, tuple[int, float]], skip: Collection[int] = ()) -> dict[str, float]:
    """Prune the first convolution of each residual block; {stage: (blocks, p)}.

    Layers are counted as in the paper: the stem is 1, then two per block, projections not counted.
    """
    blocks = [(f"{stage}.{block}.conv1", p) for stage, (count, p) in stages.items() for block in range(count)]
    return {name: p for index, (name, p) in enumerate(blocks) if 2 * index + 2 not in skip}


_SENSITIVE_34 = (2, 8, 14, 16, 26, 28, 30, 32)

RECIPES: dict[str, tuple[str, dict[str, float]]] = {
    "vgg16-A": ("vgg16", {f"conv{i}": 0.5 for i in (1, *range(8, 14))}),
    "resnet56-A": (
        "resnet56",
        _first_convs({"stage1": (9, 0.1), "stage2": (9, 0.1), "stage3": (9, 0.1)}, skip=(16, 20, 38, 54)),
    ),
    "resnet56-B": (
        "resnet56",
        _first_convs({"stage1": (9, 0.6), "stage2": (9, 0.3), "stage3": (9, 0.1)}, skip=(16, 18, 20, 34, 38, 54)),
    ),
    "resnet110-A": ("resnet110", _first_convs({"stage1": (18, 0.5)}, skip=(36,))),
    "resnet110-B": (
        "resnet110",
        _first_convs({"stage1": (18, 0.5), "stage2": (18, 0.4), "stage3": (18, 0.3)}, skip=(36, 38, 74)),
    ),
    "resnet34-A": (
        "resnet34",
        _first_convs({"layer1": (3, 0.3), "layer2": (4, 0.3), "layer3": (6, 0.3)}, skip=_SENSITIVE_34),
    ),
    "resnet34-B": (
        "resnet34",
        _first_convs({"layer1": (3, 0.5), "layer2": (4, 0.6), "layer3": (6, 0.4)}, skip=_SENSITIVE_34),
    ),
    "resnet34-C": ("resnet34", {"layer3.0.conv2": 0.2}),
}
"""The paper's pruned models: the network's name for `prunelab.models.build`, and what `L1.ratios` removes of it."""
