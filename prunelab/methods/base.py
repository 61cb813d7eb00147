"""What every pruning method is: a frozen dataclass of the paper's hyper-parameters, called on a trained network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from prunelab._checks import check, one_of
from prunelab.structure import BlockSpace, Budget, ChannelSpace, ColumnSpace, Plan, RowColumnSpace, Space
from prunelab.training import Context, Recipe

SPACES: dict[str, Callable[[nn.Module, Tensor], Space]] = {
    "filters": ChannelSpace,
    "columns": ColumnSpace,
    "filters+columns": RowColumnSpace,
    "blocks": BlockSpace,
}


@dataclass(frozen=True)
class Pruned:
    """What a method returns.

    Attributes:
        net: the physically smaller network, with the weights that it has at the cut.
        plan: what was kept.
        epochs: passes over the training images already spent; the caller fine-tunes with what is left of the effort.
        history: what a reader may want to plot, as the method's docstring says.
        recipe: how the caller is to train the result, where the method's point is a training of its own (from scratch,
            at another rate); None: the context's recipe, for the epochs that are left.
    """

    net: nn.Module
    plan: Plan
    epochs: float = 0.0
    history: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None


class Method(Protocol):
    """A pruning method, a dataclass of its parameters; `name` is how experiments and the command line call it."""

    name: str
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Prune a trained network to a budget; the network itself stays as it is."""
        ...


def space_of(unit: str, net: nn.Module, example: Tensor) -> Space:
    """Return the space of a network whose units are those named, a key of `SPACES`.

    Raises:
        ValueError: the unit is unknown; the legal ones are listed.
    """
    check("unit", unit, one_of(SPACES))
    return SPACES[unit](net, example)
