"""Feature maps: running a network on images to see what its units put out behind each layer's activation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from prunelab._arrays import Ints
from prunelab._modes import evaluating
from prunelab.layers import ZeroPadChannels
from prunelab.structure.tracing import operation, trace

if TYPE_CHECKING:
    from prunelab.structure.graph import Coupling
    from prunelab.structure.space import Space

Measure = Callable[[Tensor], Tensor]

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
)  # fmt: skip
_ACTIVATION_FUNCTIONS = (
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh",
    "softplus", "softsign", "log_sigmoid", "logsigmoid", "hardswish", "hardsigmoid", "hardtanh",
)  # fmt: skip
_TURNED = ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims")


def mean_over_maps(space: Space, measure: Measure, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Measure every feature map of every image, and return each unit's mean, {group: float64 [size]}.

    A layer's maps are seen behind the first activation that they meet: after batch norm, in a residual block after the
    sum, in DenseNet in the next layer; where none comes before the next layer, behind its own batch norm. A unit that
    several layers write has maps in several places, which count alike. The network runs in evaluation mode.

    Args:
        space: of the network to run.
        measure: takes maps [N, C, H, W] to one number each, [N, C]; those of a hidden linear layer have one pixel.
        batches: normalised images, float [N, C, H, W], on the network's device.

    Raises:
        ValueError: the space is not one of channels, there is no image, or a group has no maps [N, C, ...] to see.
    """
    with evaluating(space.net), torch.no_grad():
        watch = _Watch(space, measure)
        images = sum(watch.look_at(batch) for batch in batches)
    if images == 0:
        raise ValueError("feature maps are seen on images, at least one: got none")
    means = space.by_group((watch.sums / watch.counts)[:-1])
    if unseen := [name for name, mean in means.items() if mean.isnan().any()]:
        raise ValueError(f"no feature maps [N, C, ...] to see of {', '.join(unseen)}: its channels are rearranged")
    return means


class _Watch(fx.Interpreter):
    """Runs a network on images, knows the unit of every channel on the way, and adds up what is measured of its maps.

    Attributes:
        sums: of the measure, per unit; the last place is for what belongs to no unit.
        counts: how many maps were measured, per unit.
    """

    def __init__(self, space: Space, measure: Measure) -> None:
        coupling: Coupling | None = getattr(space, "coupling", None)
        if coupling is None:
            raise ValueError(f"feature maps belong to channels; this space has {space.kind}")
        root = copy.copy(space.net)  # where torch.fx puts the constants that it meets
        super().__init__(root, graph=trace(root))
        self.measure = measure
        self.written = {axis.module: axis.units for axis in coupling.axes if axis.role == "out"}
        self.places = self._places(coupling.norms)
        self.sums = torch.zeros(int(space.sizes.sum()) + 1, dtype=torch.float64)
        self.counts = torch.zeros_like(self.sums)

    def _places(self, norms: dict[str, str]) -> dict[fx.Node, list[fx.Node]]:
        """Return at which node the maps of which layers are seen."""
        seen_at: dict[fx.Node, fx.Node] = {}
        coming: dict[fx.Node, set[fx.Node]] = {}  # the layers whose maps get to a node without an activation
        for node in self.graph.nodes:
            coming[node] = {layer for source in node.all_input_nodes for layer in coming[source]}
            if self._is_layer(node):
                coming[node] = {node}
            elif self._activates(node):
                seen_at |= dict.fromkeys(coming[node] - seen_at.keys(), node)
                coming[node] = set()
        places: dict[fx.Node, list[fx.Node]] = {}
        for layer in filter(self._is_layer, self.graph.nodes):
            norm = next((user for user in layer.users if user.target == norms.get(layer.target)), layer)
            places.setdefault(seen_at.get(layer, norm), []).append(layer)
        return places

    def _is_layer(self, n: fx.Node) -> bool:
        return n.op == "call_module" and n.target in self.written

    def _activates(self, n: fx.Node) -> bool:
        return isinstance(self._module(n), _ACTIVATIONS) or operation(n) in _ACTIVATION_FUNCTIONS

    def _module(self, n: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(n.target)) if n.op == "call_module" else None

    def look_at(self, images: Tensor) -> int:
        """Run the network on images, measure all maps, and return how many images there were."""
        self.units: dict[fx.Node, Ints | None] = {}
        self.run(images)
        return len(images)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, carry the unit numbers along, and measure the maps that are to be seen here."""
        value = super().run_node(n)
        units = self.units[n] = self._units_of(n, value) if isinstance(value, Tensor) and value.dim() > 1 else None
        if units is not None and n in self.places:
            layers = np.concatenate([self.written[str(layer.target)] for layer in self.places[n]])
            self._add(np.where(np.isin(units, layers), units, -1), value)
        return value

    def _units_of(self, n: fx.Node, value: Tensor) -> Ints | None:
        """Return the unit number of each channel, -1 for none; None where channels are not what they were."""
        if operation(n) in _TURNED or (isinstance(self._module(n), nn.Linear) and value.dim() > 2):
            return None  # the channels are not in dimension 1
        if self._is_layer(n):
            units = self.written[str(n.target)]
        elif n.op == "placeholder":
            units = np.full(value.shape[1], -1)
        else:
            known = [found for source in n.all_input_nodes if (found := self.units.get(source)) is not None]
            if not known:
                return None
            if operation(n) in ("cat", "concat"):
                units = np.concatenate(known)
            elif isinstance(pad := self._module(n), ZeroPadChannels):
                units = np.pad(known[0], (pad.before, pad.after), constant_values=-1)
            else:  # the operands of a sum have the same units, or none
                units = np.max([found for found in known if len(found) == max(map(len, known))], axis=0)
        return units if len(units) == value.shape[1] else None

    def _add(self, units: Ints, maps: Tensor) -> None:
        chosen = np.flatnonzero(units >= 0)
        if len(chosen):
            maps = maps[:, torch.from_numpy(chosen).to(maps.device)]
            measured = self.measure(maps.reshape(*maps.shape, *[1] * (4 - maps.dim())))
            where = torch.from_numpy(units[chosen])
            self.sums.index_add_(0, where, measured.double().sum(0).cpu())
            self.counts.index_add_(0, where, self.counts.new_full(where.shape, len(maps)))
