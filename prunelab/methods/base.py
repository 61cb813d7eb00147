"""What every pruning method is: a frozen dataclass of the paper's hyper-parameters, called on a trained network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from prunelab.structure import Budget, ChannelSpace, ColumnSpace, Plan, Space
from prunelab.training import Context

SPACES: dict[str, type[ChannelSpace] | type[ColumnSpace]] = {"filters": ChannelSpace, "columns": ColumnSpace}


@dataclass(frozen=True)
class Pruned:
    """What a method returns.

    Attributes:
        net: the physically smaller network, with the weights that it has at the cut.
        plan: what was kept.
        epochs: passes over the training images already spent; the caller fine-tunes with what is left of the effort.
        history: what a reader may want to plot, as the method's docstring says.
    """

    net: nn.Module
    plan: Plan
    epochs: float = 0.0
    history: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A pruning method; `name` is how experiments and the command line call it."""

    name: str

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Prune a trained network to a budget; the network itself stays as it is."""
        ...


def space_of(unit: str, net: nn.Module, example: Tensor) -> Space:
    """Return the space of a network whose units are "filters" or "columns".

    Raises:
        ValueError: the unit is neither.
    """
    if unit not in SPACES:
        raise ValueError(f"unit={unit!r}: legal values are {', '.join(map(repr, SPACES))}")
    return SPACES[unit](net, example)
