"""The control that removes nothing and gets the same effort as every method."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from prunelab.methods.base import Pruned
from prunelab.structure import Budget, ChannelSpace
from prunelab.training import Context


@dataclass(frozen=True)
class Dense:
    """Keep the whole network, whatever the budget: what it reaches with the same effort is the noise floor."""

    name: ClassVar[str] = "dense"

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Return a copy."""
        return Pruned(copy.deepcopy(net), ChannelSpace(net, context.data.example).plan({}))
