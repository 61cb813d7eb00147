"""Channels: filters, and everything in the network that is tied to them."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from prunelab._arrays import Bools, Ints
from prunelab._checks import check, integer
from prunelab.structure.graph import Axis, Coupling, Pin, Tie, couple
from prunelab.structure.plan import Plan
from prunelab.structure.space import Cost, Group, Space


@dataclass(frozen=True)
class Place:
    """A layer, and how many channels of each group it writes (output side), reads (input side) or lets through.

    Through go batch norm, depthwise and grouped convolutions and scales: they keep channel i apart from the others.
    """

    layer: str
    role: Literal["writes", "through", "reads"]
    channels: Ints  # [groups]


class ChannelSpace(Space):
    """The output channels of every convolution and hidden linear layer, grouped by what ties them together.

    A group is named after the first layer that writes it. Removing a unit removes its filters, batch-norm entries and
    biases, and the slices of every layer that reads it.

    Args:
        net: a network that torch.fx can trace.
        example: an input, float [N, C, H, W]; its spatial size fixes the MACs.
        multiple_of: a budget leaves each group whole, or such that what it adds to a layer's width is a multiple of
            this: kernels are fastest at widths that are multiples of 8 or 16.

    Raises:
        UntraceableError: the network, or a named module in it, cannot be cut safely.
        ValueError: multiple_of is below 1.
    """

    kind = "channels"

    def __init__(self, net: nn.Module, example: Tensor, *, multiple_of: int = 1) -> None:
        check("multiple_of", multiple_of, integer(1))
        self.example = example
        self.coupling = couple(net, example)
        cost = _cost(self.coupling)
        channels = np.where(cost.writes, cost.writes, multiple_of)  # of each layer, in a unit of each group
        steps = np.lcm.reduce(multiple_of // np.gcd(multiple_of, channels)).tolist()
        sizes = self.coupling.sizes.tolist()
        groups = [Group(n, s, step=k) for n, s, k in zip(self.coupling.names, sizes, steps, strict=True)]
        super().__init__(net, groups, cost)

    def owned(self, net: nn.Module) -> list[tuple[nn.Parameter, list[Tensor]]]:
        """List weights, biases and batch-norm scales with the units along their axes."""
        parameters = dict(net.named_parameters())
        owners: dict[str, list[Tensor]] = defaultdict(list)
        for axis in self.coupling.axes:
            if axis.name in parameters and (axis.units >= 0).any():
                owners[axis.name].append(axis.along(parameters[axis.name].dim()))
        return [(parameters[name], units) for name, units in owners.items()]

    def unit_weights(self, group: str) -> Tensor:
        """Return, side by side, the filters of every layer that writes the group, [size, weights per unit]."""
        first, *others = [self.filters(axis, group) for axis in self.writers(group)]
        return torch.cat([first, *others], dim=1) if others else first

    def writers(self, group: str) -> list[Axis]:
        """Return the filter axes of the layers that write a group, in the order in which they run."""
        self._known({group: None})
        return self._writers[self._index[group]]

    def filters(self, axis: Axis, group: str) -> Tensor:
        """Return the filters with which one of a group's `writers` writes it, [size, weights per filter]."""
        units = self.units(group)
        rows = np.flatnonzero((axis.units >= units.start) & (axis.units < units.stop))
        rows = rows[np.argsort(axis.units[rows], kind="stable")]
        weight = self.net.get_submodule(axis.module).get_parameter(axis.tensor).detach().transpose(0, axis.dim)
        if not np.array_equal(rows, np.arange(len(weight))):  # else the weights themselves, which may be large
            weight = weight[torch.from_numpy(rows)]
        return weight.reshape(len(units), -1)

    def is_sum(self, group: str) -> bool:
        """Return whether a group is a residual stream: the outputs of several layers, added."""
        additions = [tie.first for tie in self.coupling.ties if tie.why == "add"]
        return any(np.isin(ids, self.units(group)).any() for ids in additions)

    @cached_property
    def _writers(self) -> list[list[Axis]]:
        found: list[list[Axis]] = [[] for _ in self.groups]
        for axis in self.coupling.axes:
            if axis.role == "out":
                for group in np.unique(self._group_of[axis.units[axis.units >= 0]]):
                    found[group].append(axis)
        return found

    def units(self, group: str) -> range:
        """Return the numbers of a group's units."""
        self._known({group: None})
        index = self._index[group]
        last = int(self.sizes[: index + 1].sum())
        return range(last - int(self.sizes[index]), last)

    def places(self) -> list[Place]:
        """List where channels that can be removed are, layers in the order in which they run."""
        axes = self.coupling.axes
        writers = {axis.module for axis in axes if axis.role == "out"}
        grouped = {count.module for count in self.coupling.counts if count.attribute == "groups"}
        found: dict[tuple[str, str], Place] = {}
        for axis in axes:
            if axis.role == "channel" and axis.module in writers:
                continue  # the bias of what writes
            inner = any(self.net.get_submodule(axis.module).children())  # a parameter beside layers, not a layer's own
            layer = axis.name if inner else axis.module
            through = axis.role == "channel" or axis.module in grouped
            role: Literal["writes", "through", "reads"]
            role = "through" if through else "writes" if axis.role == "out" else "reads"
            channels = np.bincount(self._group_of[axis.units[axis.units >= 0]], minlength=len(self.groups))
            if channels.any():
                found.setdefault((layer, role), Place(layer, role, channels))
        return list(found.values())

    def _connections(self) -> dict[str, list[str]]:
        """Say of each group which layers write it, pass it through and read it, and what ties its parts together."""
        places, groups = self.places(), range(len(self.groups))
        columns = {
            column: [", ".join(p.layer for p in places if p.role == role and p.channels[g]) for g in groups]
            for column, role in (("written_by", "writes"), ("through", "through"), ("read_by", "reads"))
        }
        tied: list[list[Tie]] = [[] for _ in groups]
        for tie in self.coupling.ties:
            for group in np.unique(self._group_of[tie.first[tie.first >= 0]]):
                tied[group].append(tie)
        return columns | {"tied_by": [_in_words(ties) for ties in tied]}

    @cached_property
    def whole(self) -> dict[str, str]:
        """Layers that can lose no filter, and what pins some of these, such as "the network's output"."""
        return {layer: _in_words(pins) for layer, pins in self.coupling.whole.items()}

    def shrink(self, plan: Plan) -> nn.Module:
        """Return a smaller network of the same classes: every tensor cut along its axes, every width attribute set.

        The tensors are cut while the network is copied, so no second full set of weights is made.
        """
        own = {axis.name: self.tensor(axis) for axis in self.coupling.axes}
        cut = self.cut(plan, {name: tensor.detach() for name, tensor in own.items()})
        memo: dict[int, Tensor] = {}
        for name, tensor in own.items():
            if cut[name].shape != tensor.shape:
                learnt = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(cut[name], tensor.requires_grad) if learnt else cut[name]
        small = _copied(self.net, dict(memo))
        kept = self._kept(plan)
        for count in self.coupling.counts:
            setattr(small.get_submodule(count.module), count.attribute, int(kept[count.units].sum()) // count.per)
        return small

    def cut(self, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep, along every axis of each tensor, what the plan keeps."""
        kept = self._kept(plan)
        positions: dict[str, dict[int, Ints]] = defaultdict(dict)
        for axis in self.coupling.axes:
            if axis.name in tensors and not (stays := kept[axis.units]).all():
                positions[axis.name][axis.dim] = np.flatnonzero(stays)
        return {n: _select(t, positions[n]) if n in positions else t for n, t in tensors.items()}

    def _kept(self, plan: Plan) -> Bools:
        """Return, by unit number, whether a unit stays; -1, which finds the last entry, does."""
        return np.append(self.gates(plan).numpy() > 0, True)

    def tensor(self, axis: Axis) -> Tensor:
        """Return the tensor that an axis is one dimension of."""
        tensor: Tensor = getattr(self.net.get_submodule(axis.module), axis.tensor)
        return tensor


def _in_words(causes: Iterable[Tie | Pin]) -> str:
    """Name operations, each with the modules that it is in."""
    found: dict[str, dict[str, None]] = defaultdict(dict)  # operation -> modules, in order
    for cause in causes:
        found[cause.why][cause.where] = None
    return "; ".join(f"{why} at {', '.join(filter(None, at))}".removesuffix(" at ") for why, at in found.items())


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Do as copy.deepcopy does, in half the time: most of what a module holds is empty."""
    own_way = hasattr(module, "__deepcopy__") or type(module).__getstate__ is not object.__getstate__
    if own_way or id(module) in memo:
        return copy.deepcopy(module, memo)
    twin = memo[id(module)] = type(module).__new__(type(module))
    for key, value in vars(module).items():
        if type(value) in (dict, OrderedDict, set, list) and not value:
            twin.__dict__[key] = type(value)()
        elif key == "_modules":
            twin.__dict__[key] = {
                name: None if child is None else _copied(child, memo) for name, child in value.items()
            }
        else:
            twin.__dict__[key] = copy.deepcopy(value, memo)
    return twin


def _select(tensor: Tensor, positions: Mapping[int, Ints]) -> Tensor:
    """Keep some positions along one dimension, or along the first and another."""
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        for dim, kept in positions.items():
            tensor = tensor.index_select(dim, torch.from_numpy(kept).to(tensor.device))
        return tensor
    values = tensor.detach().numpy()  # NumPy takes several times as fast as index_select
    *first, (dim, kept) = sorted(positions.items())
    if not first:
        return torch.from_numpy(np.take(values, kept, dim))
    rows = first[0][1]
    small = np.empty([len(rows), *values.shape[1:dim], len(kept), *values.shape[dim + 1 :]], values.dtype)
    at_once = max(1, _CACHED // values[0].size)  # rows that stay in the cache, and never a second large tensor
    for start in range(0, len(rows), at_once):
        some = slice(start, start + at_once)
        np.take(values[rows[some]], kept, dim, out=small[some], mode="clip")  # "clip" writes to `out` unbuffered
    return torch.from_numpy(small)


_CACHED = 2**18  # numbers


def _cost(coupling: Coupling) -> Cost:
    """Turn the layers' read and written units into the closed form of `Cost`."""
    groups = len(coupling.sizes)
    group_of = np.append(np.repeat(np.arange(groups), coupling.sizes), groups)  # unit -1 belongs to the fixed column

    def channels_per_unit(units: Ints | None) -> Ints:
        if units is None:  # a grouped convolution: its MACs count per written channel
            return np.eye(1, groups + 1, groups, dtype=np.int64)[0]
        totals = np.bincount(group_of[units], minlength=groups + 1)
        return totals // np.append(coupling.sizes, 1)

    read = np.stack([channels_per_unit(p.reads) for p in coupling.products])
    written = np.stack([channels_per_unit(p.writes) for p in coupling.products])
    return Cost(
        per_pair=np.array([p.macs for p in coupling.products], dtype=np.int64),
        reads=read[:, :-1],
        reads_fixed=read[:, -1],
        writes=written[:, :-1],
        writes_fixed=written[:, -1],
        conv=np.array([p.kind == "conv" for p in coupling.products]),
    )
