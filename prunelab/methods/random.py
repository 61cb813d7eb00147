"""Random pruning: the control that every criterion has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from prunelab import scores
from prunelab._checks import check_fields, one_of
from prunelab.methods.base import SPACES, Pruned, space_of
from prunelab.structure import Budget
from prunelab.training import Context


@dataclass(frozen=True)
class Random:
    """Remove the same share of every group, drawn uniformly by the context's seed, so that the budget is met.

    unit: what goes, a key of `methods.base.SPACES`: "filters", "columns", "filters+columns" or "blocks".

    Raises ValueError for another unit.
    """

    name: ClassVar[str] = "random"

    unit: str = "filters"

    def __post_init__(self) -> None:
        """Check the unit."""
        check_fields(self, self.name, unit=one_of(SPACES))

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Prune in one shot, without training."""
        space = space_of(self.unit, net, context.data.example)
        plan = space.plan_for(space.scores(scores.random(context.seed)), budget)
        return Pruned(space.shrink(plan), plan)
