"""Pruning Filters for Efficient ConvNets (Li et al., ICLR 2017): one shot, by the L1 norm of each filter."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, get_args

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunelab import scores as criteria
from prunelab.data import Data
from prunelab.methods.base import Pruned, check_unit, space_of
from prunelab.structure import Budget, ChannelSpace, Plan, Space
from prunelab.structure.graph import Axis
from prunelab.training import Context, evaluate

Selection = Literal["smallest", "largest", "random"]
Order = Literal["independent", "greedy"]


@dataclass(frozen=True)
class L1:
    """Remove the units of least s_j = Σ|W_j|, ranked inside each layer, without training.

    Where layers are added, the shortcut decides: the filters of its 1x1 projection are ranked and the other layers of the
    sum lose the same ones. With an identity shortcut there is nothing to rank, and the sum stays whole.

    unit: "filters", or "columns" of the im2col matrix, the one-shot control of SPP, to which the rule on sums does not apply.
    selection: which units go: the "smallest", the "largest" or "random" ones, drawn by the context's seed.
    order: "independent" ranks with the whole filters; "greedy" goes from input to output and lets a filter's sum count its
        surviving input channels alone (filters only: a column does not run through the next layer).
    ratios: {group: fraction p to remove, in [0, 1)}, keeping floor(C·(1 - p)) of C units in exact arithmetic, at least one; groups
        not named stay whole, and the budget is then an upper bound. None removes the same fraction everywhere, as the
        budget asks.

    Raises ValueError naming a field, its value and the legal values; when called, for ratios of unknown groups or of sums
    with an identity shortcut, and for a budget that cannot be met, with the least one that can.
    """

    name: ClassVar[str] = "l1"

    unit: str = "filters"
    selection: Selection = "smallest"
    order: Order = "independent"
    ratios: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        check_unit(self.unit)
        for field, legal in (("selection", get_args(Selection)), ("order", get_args(Order))):
            if getattr(self, field) not in legal:
                names = ", ".join(map(repr, legal))
                raise ValueError(f"l1: {field} is {getattr(self, field)!r}; legal values are {names}")
        if self.order == "greedy" and self.unit != "filters":
            raise ValueError(f"l1: order is 'greedy' with unit={self.unit!r}; it must be 'independent' unless unit='filters'")
        for group, ratio in (self.ratios or {}).items():
            if not 0 <= ratio < 1:
                raise ValueError(f"l1: ratios[{group!r}] is {ratio!r}; the fraction to remove must be in [0, 1)")

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Prune in one shot."""
        space = space_of(self.unit, net, context.data.example)
        scores = {group.name: self._score(space, group.name, context.seed) for group in space.groups}
        if self.ratios is None:
            plan = space.plan_for(scores, budget)
        else:
            plan = space.plan_for(scores, {group: 1 - Fraction(str(ratio)) for group, ratio in self.ratios.items()})
            _check_whole(space, plan)
            _check_budget(space, plan, budget)
        if self.order == "greedy":
            plan = self._greedy(space, plan.widths, context.seed)
        return Pruned(space.shrink(plan), plan)

    def _score(self, space: Space, group: str, seed: int) -> Tensor:
        """Score a group's units, high stays; infinite where the whole group stays."""
        weights = deciding_weights(space, group)
        if weights is None:
            return torch.full((len(space.unit_weights(group)),), torch.inf)
        if self.selection == "random":
            return space.scores(criteria.random(seed))[group]
        norms = weights.abs().sum(1)
        return norms if self.selection == "smallest" else -norms

    def _greedy(self, space: Space, widths: Mapping[str, int], seed: int) -> Plan:
        """Choose again, group by group, on a copy in which what the groups before have lost is zero."""
        scratch = copy.copy(space)
        scratch.net = copy.deepcopy(space.net)
        plan = space.plan({})
        for group, width in widths.items():
            best = self._score(scratch, group, seed).argsort(descending=True, stable=True)[:width]
            plan = space.plan({**plan.keep, group: best.tolist()})
            scratch.apply_gates(scratch.net, space.gates(plan))
        return plan


def deciding_weights(space: Space, group: str) -> Tensor | None:
    """Return the weights by which a group's units are ranked, [size, weights per unit]; None if the group stays whole.

    They are all weights that compute a unit, unless the group is a sum of layers: then its 1x1 projections decide, and without
    one (an identity shortcut) nothing is removed.
    """
    if not isinstance(space, ChannelSpace) or not _is_sum(space, group):
        return space.unit_weights(group)
    deciding = projections(space, group)
    return torch.cat([space.filters(axis, group) for axis in deciding], dim=1) if deciding else None


def projections(space: ChannelSpace, group: str) -> list[Axis]:
    """Return the 1x1 convolutions that write a group from channels which another layer reads too: the weighted shortcuts."""
    read = {p.module: p.reads.tobytes() for p in space.coupling.products if p.reads is not None}
    inputs = list(read.values())
    return [
        axis
        for axis in space.writers(group)
        if getattr(space.net.get_submodule(axis.module), "kernel_size", None) == (1, 1)
        and axis.module in read
        and inputs.count(read[axis.module]) > 1
    ]


def _is_sum(space: ChannelSpace, group: str) -> bool:
    """Return whether an addition ties channels of the group to others."""
    units = torch.cat([torch.from_numpy(axis.units) for axis in space.writers(group)]).unique()
    added = [tie.first for tie in space.coupling.ties if tie.why in ("add", "add_", "iadd")]
    names = space._group_of  # placeholder
    return bool(names is not None and added and units.numel())


def _check_whole(space: Space, plan: Plan) -> None:
    for group, width in plan.widths.items():
        if width < plan.sizes[group] and deciding_weights(space, group) is None:
            raise ValueError(f"l1: ratios[{group!r}] must be 0: these layers are added to an identity shortcut, which stays whole")


def _check_budget(space: Space, plan: Plan, budget: Budget) -> None:
    kept = space.macs(plan, budget.scope) / space.macs(scope=budget.scope)
    if kept > budget.macs:
        raise ValueError(f"l1: these ratios keep {kept:.4f} of the MACs ({budget.scope}), above the budget of {budget.macs}")
