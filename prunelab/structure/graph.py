"""Which channels of a network must be kept or removed together, found by tracing it once with torch.fx.

Every output channel of every layer gets an id. The ids are carried along the traced graph beside the tensors' shapes
(the run is on the meta device: no arithmetic). Where an operation forces two channels to share their fate, their ids
are **tied**: an addition ties channel i to channel i, a grouped convolution ties all that its group reads and writes (a
depthwise convolution is the case of one channel per group), a channel split ties position i of each part. Where
channels cannot be removed (the network's input and output, a layer norm's statistics), their ids are **pinned**. Both
remember which operation it was.

What is left is bookkeeping: ids that are tied together are one **unit**, and units that appear in exactly the same
places are one **group**. So a group is homogeneous: each of its units costs the same and can be ranked against the
others, and the width of every layer is a sum of group widths. No case of residual stream, concatenation or zero-padded
shortcut needs a rule of its own.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d

from prunelab._arrays import Bools, Ints
from prunelab._checks import NETWORK, TENSOR, check
from prunelab._modes import modes_kept
from prunelab.layers import AddConstant, ChannelSelection, ZeroPadChannels
from prunelab.structure.tracing import UntraceableError, operation, trace

Role = Literal["out", "in", "channel"]


@dataclass(frozen=True)
class Axis:
    """One dimension of one tensor of the network, and the unit that each position along it belongs to.

    `units` holds a unit number per position, -1 where the position is never removed. `role` is "out" for the filters of
    a layer, "in" for what it reads, "channel" for one value per channel (batch norm, bias). Where several modules share
    the tensor, `module` is the first that runs, and `name` is what `named_parameters` or `named_buffers` calls it.
    """

    module: str
    tensor: str
    name: str
    dim: int
    role: Role
    units: Ints

    def along(self, dims: int) -> Tensor:
        """Return the units in the shape in which they broadcast to a tensor of so many dimensions."""
        return torch.from_numpy(self.units).view([-1 if dim == self.dim else 1 for dim in range(dims)])


@dataclass(frozen=True)
class Count:
    """An integer attribute of a module that is the number of kept channels among `units`, divided by `per`."""

    module: str
    attribute: str
    units: Ints
    per: int = 1


@dataclass(frozen=True)
class Product:
    """A convolution or linear layer: `macs` multiply-adds for each pair of a read channel and a written channel.

    A grouped convolution has no such pairs: what a group reads and writes is one unit, so `reads` is None and `macs`
    counts per written channel.
    """

    module: str
    kind: Literal["conv", "linear"]
    macs: int
    reads: Ints | None
    writes: Ints


@dataclass(frozen=True)
class Tie:
    """Two sets of units made one by the operation `why` in the module `where`."""

    why: str
    where: str
    first: Ints
    second: Ints


@dataclass(frozen=True)
class Pin:
    """Channels that the operation `why` in the module `where` cannot do without, by their ids."""

    why: str
    where: str
    ids: Ints


@dataclass(frozen=True)
class Channels:
    """What is known of a traced tensor: the id of every position along its channel dimension `dim`."""

    ids: Ints
    dim: int

    def spread(self, shape: torch.Size) -> Tensor:
        """Return the ids as an int64 tensor of the traced tensor's shape, without memory of that size."""
        layout = [1] * len(shape)
        layout[self.dim] = len(self.ids)
        return torch.from_numpy(self.ids).view(layout).expand(shape)


@dataclass
class Coupling:
    """Everything a space needs to know of a network: its groups, and where their units sit."""

    names: tuple[str, ...]  # one per group
    sizes: Ints  # units per group
    axes: list[Axis]
    counts: list[Count]
    products: list[Product]
    ties: list[Tie]
    whole: dict[str, list[Pin]]  # layer that can lose no filter -> what pins them
    norms: dict[str, str]  # layer -> the batch norm that alone reads its output


def couple(net: nn.Module, example: Tensor) -> Coupling:
    """Trace `net` and find the groups of channels that can be removed.

    What the network computes in evaluation mode decides. Where layers run only in training, such as auxiliary heads,
    the training graph is followed too: they are cut where they read removed channels, and keep their own.

    Args:
        net: any convolutional network whose forward torch.fx can trace; it is not changed.
        example: an input, float [N, C, H, W]; only its shape matters.

    Raises:
        UntraceableError: the forward depends on values, or a module or operation is not known to be safe; it is named.
        ValueError: the network does not accept an input of the example's shape.
    """
    check("net", net, NETWORK)
    check("example", example, TENSOR)
    if example.dim() < 2:
        raise ValueError(f"the example must be a batch of images, float [N, C, H, W], got shape {tuple(example.shape)}")
    root = copy.copy(net)  # where torch.fx puts the constants that it meets
    with modes_kept(net):
        labeller = Labeller(root, example)
        evaluation = trace(root.eval())
        labeller.evaluate(evaluation)
        if not _reads_all(root, evaluation):
            labeller.follow_training(trace(root.train()))
    return _grouped(labeller.found)


def _reads_all(net: nn.Module, graph: fx.Graph) -> bool:
    """Whether all parameters of the network take part."""
    layers = (net.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module")
    own = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    read = {id(p) for layer in layers for p in layer.parameters()}
    return all(id(p) in read or name in own for name, p in net.named_parameters(remove_duplicate=False))


@dataclass
class _Found:
    """The ids and ties gathered while the graph runs."""

    ids: int = 0
    pins: list[Pin] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    axes: dict[tuple[int, int], Axis] = field(default_factory=dict)  # by the identity of the tensor, and dimension
    counts: dict[tuple[str, str], Count] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)


class Labeller(fx.Interpreter):
    """Runs a traced graph on the meta device, carrying channel ids beside the tensors."""

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        super().__init__(net, garbage_collect_values=False, graph=fx.Graph())
        self.extra_traceback = False  # the message of an error says which node it is about
        self.example = example
        self.found = _Found()
        self.image = self.fresh(example.shape[1])
        self.channels: dict[fx.Node, Any] = {}  # Channels, or a tuple of them for chunk and split
        tensors = {id(tensor): (name, tensor) for name, tensor in (*net.named_parameters(), *net.named_buffers())}
        self.names = {key: name for key, (name, _) in tensors.items()}
        self.meta = {key: tensor.detach().to("meta") for key, (_, tensor) in tensors.items()}

    def evaluate(self, graph: fx.Graph) -> None:
        """Run a graph on an image like the example."""
        self.graph = graph
        self.run(torch.empty((1, *self.example.shape[1:]), dtype=self.example.dtype, device="meta"))

    def follow_training(self, graph: fx.Graph) -> None:
        """Run the training graph after that of evaluation: what only it has costs nothing, and is not removed."""
        evaluation = self.found
        self.found = replace(evaluation, products=[], norms={})
        self.evaluate(graph)
        self.pin("only training", np.arange(evaluation.ids, self.found.ids))
        self.found = replace(self.found, products=evaluation.products, norms=evaluation.norms)

    # -- what the handlers below use -------------------------------------------------------------------------------

    def fresh(self, count: int) -> Ints:
        """Return `count` ids that nothing has yet."""
        self.found.ids += count
        return np.arange(self.found.ids - count, self.found.ids)

    def tie(self, why: str, first: Ints, second: Ints) -> None:
        """Let first[i] and second[i] share their fate."""
        self.found.ties.append(Tie(why, self.where()[0], first, second))

    def pin(self, why: str, ids: Ints) -> None:
        """Never remove these."""
        self.found.pins.append(Pin(why, self.where()[0], ids))

    def axis(self, module: str, tensor: str, dim: int, role: Role, ids: Ints) -> None:
        """Say whose channels lie along a tensor's dimension; a second use of the same tensor ties the two."""
        values: Tensor = getattr(self.submodules[module], tensor)
        if id(values) not in self.meta:
            raise self.refuse(f"{tensor!r} of module {module!r} is computed from other parameters")
        if len(ids) != values.shape[dim]:
            raise self.refuse(
                f"module {module!r} reads {len(ids)} channels, but its {tensor!r} has {values.shape[dim]}"
            )
        new = Axis(module, tensor, self.names[id(values)], dim, role, ids)
        known = self.found.axes.setdefault((id(values), dim), new)
        if known.units is not ids and not np.array_equal(known.units, ids):
            self.tie("shared weights", known.units, ids)

    def tie_rows(self, why: str, rows: Ints) -> None:
        """Let all of each row share their fate, [rows, ids]."""
        self.tie(why, rows[:, :-1].ravel(), rows[:, 1:].ravel())

    def written(self, module: nn.Module, tensor: str, count: int, dim: int = 0) -> Ints:
        """Return the ids of the channels that a layer writes: new ones the first time it is called."""
        known = self.found.axes.get((id(getattr(module, tensor)), dim))
        return known.units if known else self.fresh(count)

    def count(self, module: str, attribute: str, ids: Ints, per: int = 1) -> Ints:
        """Say that a module's attribute counts these channels; return those of its first call."""
        return self.found.counts.setdefault((module, attribute), Count(module, attribute, ids, per)).units

    def source(self, n: fx.Node, dim: int | None = None) -> Channels:
        """Return the channels of a node's input; with `dim`, refuse unless they lie along that dimension."""
        node = n.all_input_nodes[0]
        channels = self.channels.get(node)
        if not isinstance(channels, Channels):
            raise self.refuse(f"{operation(n)!r} reads {node.name!r}, whose channels are not known")
        if dim is not None and channels.dim != dim % self.env[node].dim():
            raise self.refuse(
                f"{operation(n)!r} works along dimension {dim}, the channels are in dimension {channels.dim}"
            )
        return channels

    def where(self) -> tuple[str, Any]:
        """Return the path and the class of the module that the node at hand belongs to."""
        return next(reversed(self.node.meta.get("nn_module_stack", {"": ("", type(self.module))}).values()))

    def refuse(self, what: str) -> UntraceableError:
        """Return the error that says what cannot be cut, and where."""
        path, kind = self.where()
        module = f"{path!r} of type {getattr(kind, '__name__', kind)}"
        return UntraceableError(
            f"cannot cut this network safely: {what} (at {self.node.name!r} in module {module}). Leave that part "
            "out of the traced network, or replace it by operations that work channel by channel."
        )

    # -- running ----------------------------------------------------------------------------------------------------

    def run_node(self, n: fx.Node) -> Any:
        """Run one node on the meta device, then find its channels."""
        self.node = n
        try:
            value = super().run_node(n)
        except Exception as error:
            raise ValueError(
                f"the network does not accept an input like the example{' in training' * self.module.training}, "
                f"{self.example.dtype} of shape {tuple(self.example.shape)}: {operation(n)!r} says {error}"
            ) from None
        self.env[n] = value
        self.channels[n] = self._channels_of(n, value)
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Read a parameter as a meta tensor."""
        value = super().get_attr(target, args, kwargs)
        return value.to("meta") if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a layer with meta parameters; the result of most needs no call, having the shape of their input."""
        module = self.submodules[target]
        if args and isinstance(module, _SAME_SHAPE):
            return args[0]
        tensors = (*module.named_parameters(), *module.named_buffers())
        if not tensors:
            return module(*args, **kwargs)
        return torch.func.functional_call(module, {name: self.meta[id(t)] for name, t in tensors}, args, kwargs)

    def _channels_of(self, n: fx.Node, value: Any) -> Any:
        if n.op == "placeholder":
            self.pin("the image", self.image)
            return Channels(self.image, 1)
        if n.op == "get_attr":
            return self._parameter(str(n.target), value)
        if n.op == "output":
            for source in n.all_input_nodes:
                for ids in self._ids_of(source):
                    self.pin("the network's output", ids)
            return None
        if n.op == "call_module":
            module = self.submodules[str(n.target)]
            handler = next((h for kind, h in _MODULES.items() if isinstance(module, kind)), None)
            if handler is None:
                raise self.refuse(f"module {n.target!r} of type {type(module).__name__} is not known to prunelab")
            return handler(self, n, module, value)
        if isinstance(n.target, type) and issubclass(n.target, tuple):  # a named tuple, of several outputs
            return tuple(self.channels.get(part) for part in n.args if isinstance(part, fx.Node))
        tensors = value if isinstance(value, tuple | list) else (value,)
        carried = any(self.channels.get(source) is not None for source in n.all_input_nodes)
        if not carried or not all(isinstance(tensor, Tensor) for tensor in tensors):
            return None  # sizes, devices and other plain values
        function = _FUNCTIONS.get(operation(n))
        if function is None:
            raise self.refuse(f"operation {operation(n)!r} is not known to prunelab")
        return function(self, n, value)

    def _parameter(self, name: str, value: Any) -> Channels | None:
        """A parameter used as it is, such as a layer scale: its one long dimension may follow the channels."""
        if id(self.fetch_attr(name)) not in self.meta:
            return None  # a constant
        long = [dim for dim, size in enumerate(value.shape) if size > 1]
        if not long:
            return None
        module, _, tensor = name.rpartition(".")
        known = self.found.axes.get((id(self.fetch_attr(name)), long[0]))
        ids = known.units if known else self.fresh(value.shape[long[0]])
        if len(long) > 1:
            self.pin("a parameter with several dimensions", ids)
        else:
            self.axis(module, tensor, long[0], "channel", ids)
        return Channels(ids, long[0])

    def _ids_of(self, node: fx.Node) -> list[Ints]:
        found = self.channels.get(node)
        parts = found if isinstance(found, tuple) else (found,)
        return [channels.ids for channels in parts if channels is not None]


# -- from ids to groups ------------------------------------------------------------------------------------------------


def _grouped(found: _Found) -> Coupling:
    """Merge tied ids to units, drop the pinned ones, and gather units with the same places into groups."""
    unit_of = _merged(found)
    axes = _distinct(found.axes.values())
    kind, writer = _places(axes, unit_of)
    free = writer >= 0
    free[unit_of[np.concatenate([pin.ids for pin in found.pins])]] = False
    order, group = _ordered(unit_of, free, kind)
    leaders = order[np.unique(group, return_index=True)[1]]

    number = np.full(len(free), -1)
    number[order[np.argsort(group, kind="stable")]] = np.arange(len(order))
    unit_number = number[unit_of]
    arrays: dict[int, Ints] = {}  # one for all that share their ids

    def numbered(ids: Ints) -> Ints:
        if id(ids) not in arrays:
            arrays[id(ids)] = unit_number[ids]
        return arrays[id(ids)]

    return Coupling(
        names=tuple(_told_apart(axes[writer[leader]].module for leader in leaders)),
        sizes=np.bincount(group),
        axes=[replace(a, units=numbered(a.units)) for a in found.axes.values()],
        counts=[replace(c, units=numbered(c.units)) for c in found.counts.values()],
        products=[
            replace(p, reads=None if p.reads is None else numbered(p.reads), writes=numbered(p.writes))
            for p in found.products
        ],
        ties=[replace(t, first=numbered(t.first), second=numbered(t.second)) for t in found.ties],
        whole=_whole(found, unit_of, free),
        norms=found.norms,
    )


def _whole(found: _Found, unit_of: Ints, free: Bools) -> dict[str, list[Pin]]:
    """Return the layers that can lose no filter, and what pins any of those."""
    pinned = [(pin, unit_of[pin.ids]) for pin in found.pins]
    layers = {a.module: unit_of[a.units] for a in found.axes.values() if a.role == "out"}
    whole = {name: units for name, units in layers.items() if not free[units].any()}
    return {name: [pin for pin, kept in pinned if np.isin(kept, units).any()] for name, units in whole.items()}


def _merged(found: _Found) -> Ints:
    """Return the unit of every id: ids that are tied to each other, if only through others, are one."""
    none = [np.empty(0, np.int64)]
    first = np.concatenate([tie.first for tie in found.ties] or none)
    second = np.concatenate([tie.second for tie in found.ties] or none)
    links = coo_matrix((np.ones(len(first), bool), (first, second)), shape=(found.ids, found.ids))
    unit_of: Ints = connected_components(links, directed=False)[1]
    return unit_of


def _distinct(axes: Iterable[Axis]) -> list[Axis]:
    """Leave out axes that say nothing new of where units are: a layer's bias and batch norm, beside its filters."""
    distinct: dict[tuple[int, bool], Axis] = {}
    for axis in axes:
        distinct.setdefault((id(axis.units), axis.role == "out"), axis)
    return list(distinct.values())


def _places(axes: Sequence[Axis], unit_of: Ints) -> tuple[Ints, Ints]:
    """Return a number that units share when they are in the same axes, equally often, and the first that writes them.

    Both have an entry per unit; -1 stands for a unit that no axis writes.
    """
    count = unit_of.max() + 1
    kind, writer = np.zeros(count, np.int64), np.full(count, -1)
    for index, axis in reversed(list(enumerate(axes))):
        units, times = np.unique(unit_of[axis.units], return_counts=True)
        _, number = np.unique(kind[units] * (times.max() + 1) + times, return_inverse=True)
        kind[units] = kind.max() + 1 + number
        if axis.role == "out":
            writer[units] = index
    return kind, writer


def _ordered(unit_of: Ints, free: Bools, kind: Ints) -> tuple[Ints, Ints]:
    """Return the free units in the order of their first ids, and the group of each, in the order of its first unit."""
    _, first_id = np.unique(unit_of, return_index=True)
    order = np.argsort(first_id)
    order = order[free[order]]
    _, first, group = np.unique(kind[order], return_index=True, return_inverse=True)
    return order, np.argsort(np.argsort(first))[group]


def _told_apart(layers: Iterable[str]) -> Iterator[str]:
    """Name each group after its layer; further groups of the same layer are numbered from 2."""
    written: Counter[str] = Counter()
    for layer in layers:
        written[layer] += 1
        yield f"{layer}#{written[layer]}" if written[layer] > 1 else layer


# -- modules: each handler returns the channels of the module's output -------------------------------------------------


def _conv(run: Labeller, n: fx.Node, conv: nn.Module, value: Tensor) -> Channels:
    assert isinstance(conv, nn.Conv2d)
    return _convolution(run, n, conv, value, filters=0)


def _transposed_conv(run: Labeller, n: fx.Node, conv: nn.Module, value: Tensor) -> Channels:
    """A convolution that spreads every input position over a window of outputs; its kernel is [in, out/groups, ...]."""
    assert isinstance(conv, nn.ConvTranspose2d)
    if conv.groups > 1 and conv.in_channels != conv.out_channels:
        raise run.refuse(
            f"module {n.target!r} has {conv.groups} groups and writes {conv.out_channels} channels: a grouped "
            f"{type(conv).__name__} must write as many as it reads, {conv.in_channels}"
        )
    # A group writes as many channels as it reads, and goes with these: then the first dimension follows both.
    return _convolution(run, n, conv, run.env[n.all_input_nodes[0]], filters=0 if conv.groups > 1 else 1)


def _convolution(
    run: Labeller, n: fx.Node, conv: nn.Conv2d | nn.ConvTranspose2d, moved: Tensor, filters: int
) -> Channels:
    """Connect what a convolution reads and writes; the window moves over `moved`, filters lie along a dimension."""
    name, source = str(n.target), run.source(n, -3)
    read, written = source.ids, run.written(conv, "weight", conv.out_channels, filters)
    positions = math.prod(moved.shape[-2:]) * math.prod(conv.kernel_size)
    if conv.groups == 1:
        run.axis(name, "weight", 1 - filters, "in", read)
        run.found.products.append(Product(name, "conv", positions, read, written))
    else:
        reads, writes = read.reshape(conv.groups, -1), written.reshape(conv.groups, -1)
        why = "depthwise convolution" if reads.shape[1] == 1 else "grouped convolution"
        run.tie_rows(why, np.concatenate([reads, writes], axis=1))
        run.count(name, "groups", written, per=writes.shape[1])
        run.found.products.append(Product(name, "conv", positions * reads.shape[1], None, written))
    run.count(name, "in_channels", read)
    return _written(run, name, conv, "out_channels", Channels(written, source.dim), filters)


def _linear(run: Labeller, n: fx.Node, linear: nn.Module, value: Tensor) -> Channels:
    assert isinstance(linear, nn.Linear)
    name, read = str(n.target), run.source(n, -1).ids
    written = run.written(linear, "weight", linear.out_features)
    run.axis(name, "weight", 1, "in", read)
    run.found.products.append(Product(name, "linear", math.prod(value.shape[1:-1]), read, written))
    run.count(name, "in_features", read)
    return _written(run, name, linear, "out_features", Channels(written, value.dim() - 1))


def _written(
    run: Labeller, name: str, layer: nn.Module, attribute: str, channels: Channels, filters: int = 0
) -> Channels:
    run.axis(name, "weight", filters, "out", channels.ids)
    run.count(name, attribute, channels.ids)
    if layer.bias is not None:
        run.axis(name, "bias", 0, "channel", channels.ids)
    return channels


def _per_channel(run: Labeller, n: fx.Node, module: nn.Module, *tensors: str) -> Channels:
    """A module that has one number per channel in each of its tensors, and keeps the channels apart."""
    channels = run.source(n, 1)
    for tensor in tensors:
        if getattr(module, tensor) is not None:
            run.axis(str(n.target), tensor, 0, "channel", channels.ids)
    return channels


def _frozen_norm(run: Labeller, n: fx.Node, norm: nn.Module, value: Tensor) -> Channels:
    return _per_channel(run, n, norm, "weight", "bias", "running_mean", "running_var")


def _channel_norm(run: Labeller, n: fx.Node, norm: nn.Module, value: Tensor) -> Channels:
    """A batch or instance norm, which counts its channels."""
    channels = _frozen_norm(run, n, norm, value)
    run.count(str(n.target), "num_features", channels.ids)
    return channels


def _batch_norm(run: Labeller, n: fx.Node, norm: nn.Module, value: Tensor) -> Channels:
    source = n.all_input_nodes[0]
    if source.op == "call_module" and len(source.users) == 1:
        run.found.norms[str(source.target)] = str(n.target)
    return _channel_norm(run, n, norm, value)


def _group_norm(run: Labeller, n: fx.Node, norm: nn.Module, value: Tensor) -> Channels:
    """The channels of a group share their statistics: they go together, or not at all if they are all channels."""
    assert isinstance(norm, nn.GroupNorm)
    if norm.num_groups == 1:
        return _across_channels(run, n, norm, value)
    name, channels = str(n.target), _per_channel(run, n, norm, "weight", "bias")
    rows = channels.ids.reshape(norm.num_groups, -1)
    run.tie_rows("group norm", rows)
    run.count(name, "num_channels", channels.ids)
    first = run.count(name, "num_groups", channels.ids, per=rows.shape[1])
    if not np.array_equal(first, channels.ids):
        run.tie("shared norm", first.reshape(norm.num_groups, -1)[:, 0], rows[:, 0])
    return channels


def _prelu(run: Labeller, n: fx.Node, prelu: nn.Module, value: Tensor) -> Channels:
    assert isinstance(prelu, nn.PReLU)
    if prelu.num_parameters == 1:  # for all channels
        return run.source(n)
    channels = _per_channel(run, n, prelu, "weight")
    run.count(str(n.target), "num_parameters", channels.ids)
    return channels


def _across_channels(run: Labeller, n: fx.Node, module: nn.Module, value: Tensor) -> Channels:
    """A module whose output at one channel depends on the others: none of them can go."""
    channels = run.source(n)
    run.pin(type(module).__name__, channels.ids)
    return channels


def _same(run: Labeller, n: fx.Node, module: nn.Module, value: Tensor) -> Channels:
    return run.source(n)


def _over_space(run: Labeller, n: fx.Node, module: nn.Module, value: Tensor) -> Channels:
    return run.source(n, -3)


def _shape_module(run: Labeller, n: fx.Node, module: nn.Module, value: Tensor) -> Channels:
    channels = _reshaped(run, n, module)
    assert isinstance(channels, Channels)
    return channels


def _unflatten(run: Labeller, n: fx.Node, module: nn.Module, value: Tensor) -> Channels:
    run.pin("fixed sizes", run.source(n).ids)  # which are written into the module
    return _shape_module(run, n, module, value)


def _add_constant(run: Labeller, n: fx.Node, module: nn.Module, value: Tensor) -> Channels:
    return _per_channel(run, n, module, "value")


def _zero_pad(run: Labeller, n: fx.Node, pad: nn.Module, value: Tensor) -> Channels:
    assert isinstance(pad, ZeroPadChannels)
    before = run.count(str(n.target), "before", run.fresh(pad.before))
    after = run.count(str(n.target), "after", run.fresh(pad.after))
    return Channels(np.concatenate([before, run.source(n, 1).ids, after]), 1)


def _selection(run: Labeller, n: fx.Node, selection: nn.Module, value: Tensor) -> Channels:
    run.pin("channel selection", run.source(n, 1).ids)  # what passes is given by its place in the whole stream
    passed = run.written(selection, "kept", value.shape[1])
    run.axis(str(n.target), "kept", 0, "out", passed)
    return Channels(passed, 1)


_ELEMENTWISE_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Dropout,
    nn.Dropout2d,
)  # fmt: skip
_ACROSS_CHANNELS = (nn.LayerNorm, nn.LocalResponseNorm, nn.Softmax, nn.LogSoftmax)
_SAME_SHAPE = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d, *_ELEMENTWISE_MODULES, *_ACROSS_CHANNELS)

_MODULES: dict[type[nn.Module], Callable[[Labeller, fx.Node, nn.Module, Any], Channels]] = {
    nn.Conv2d: _conv,
    nn.ConvTranspose2d: _transposed_conv,
    nn.Linear: _linear,
    nn.modules.batchnorm._BatchNorm: _batch_norm,
    FrozenBatchNorm2d: _frozen_norm,
    nn.modules.instancenorm._InstanceNorm: _channel_norm,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _prelu,
    ZeroPadChannels: _zero_pad,
    ChannelSelection: _selection,
    AddConstant: _add_constant,
    nn.Flatten: _shape_module,
    nn.Unflatten: _unflatten,
    **dict.fromkeys(_ACROSS_CHANNELS, _across_channels),
    **dict.fromkeys(_ELEMENTWISE_MODULES, _same),
    **dict.fromkeys(
        (
            nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d, nn.ConstantPad2d,
            nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d, nn.Upsample,
        ),
        _over_space,
    ),
}  # fmt: skip


# -- functions and methods ---------------------------------------------------------------------------------------------


def _elementwise(run: Labeller, n: fx.Node, value: Tensor) -> Channels:
    """Channel i of the result comes from channel i of every operand, so they share their fate."""
    operands = [(run.channels.get(a), run.env[a]) for a in n.all_input_nodes]
    # Dimensions are counted from the right, as in broadcasting.
    carried = [(c.ids, c.dim - tensor.dim()) for c, tensor in operands if isinstance(c, Channels)]
    if not carried:
        raise run.refuse(f"{operation(n)!r} of a list of tensors")
    widest, dim = max(carried, key=lambda pair: len(pair[0]))
    of_parameter = any(source.op == "get_attr" for source in n.all_input_nodes)
    for ids, place in carried:
        if place == dim and len(ids) == len(widest):
            if ids is not widest:
                run.tie(f"{operation(n)} of a parameter" if of_parameter else operation(n), widest, ids)
        elif len(ids) == 1:
            run.pin("one map for all channels", ids)  # which gates or shifts them
        else:
            raise run.refuse(f"{operation(n)!r} mixes channels of different dimensions")
    for channels, other in operands:
        if channels is None and isinstance(other, int | float):
            raise run.refuse(f"{operation(n)!r} computes with the size of a tensor")
        if channels is None and isinstance(other, Tensor) and other.dim() >= -dim and other.shape[dim] > 1:
            run.pin("a constant per channel", widest)
    return Channels(widest, value.dim() + dim)


def _concatenate(run: Labeller, n: fx.Node, value: Tensor) -> Channels:
    parts: Any = n.args[0] if n.args else n.kwargs["tensors"]
    found = [*(run.channels[parts] or ())] if isinstance(parts, fx.Node) else [run.channels.get(part) for part in parts]
    known = [channels for channels in found if isinstance(channels, Channels)]
    if not known or len(known) < len(found):
        raise run.refuse(f"{operation(n)!r} of a tensor whose channels are not known")
    given: Any = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", n.kwargs.get("axis", 0))
    if any(channels.dim != given % value.dim() for channels in known):
        return _elementwise(run, n, value)
    return Channels(np.concatenate([channels.ids for channels in known]), given % value.dim())


def _reduce(run: Labeller, n: fx.Node, value: Tensor) -> Channels | None:
    """A mean, maximum or deviation over the named dimensions or all: free over space, pinned over channels."""
    source, rank = run.source(n), run.env[n.all_input_nodes[0]].dim()
    given: Any = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", n.kwargs.get("axis"))
    named = (given,) if type(given) is int else given if isinstance(given, tuple | list) else ()
    reduced = {d % rank for d in named or range(rank)}
    if source.dim in reduced:
        run.pin(f"{operation(n)} over channels", source.ids)
        return None
    return Channels(source.ids, source.dim - (value.dim() < rank) * sum(d < source.dim for d in reduced))


def _pin_source(run: Labeller, n: fx.Node, value: Tensor) -> Channels:
    channels = run.source(n)
    run.pin(operation(n), channels.ids)
    return channels


def _pool(run: Labeller, n: fx.Node, value: Tensor) -> Channels:
    return run.source(n, -3)


def _pad(run: Labeller, n: fx.Node, value: Tensor) -> Channels:
    """Padding over space; what it is filled with does not matter, as nothing reads a removed channel."""
    source: Channels = run.source(n)
    widths: Any = n.args[1] if len(n.args) > 1 else n.kwargs["pad"]  # two for each dimension, the last one first
    place = 2 * (value.dim() - 1 - source.dim)
    if any(width != 0 for width in widths[place : place + 2]):
        raise run.refuse("'pad' changes the number of channels; prunelab.layers.ZeroPadChannels can add some")
    return source


def _shape_function(run: Labeller, n: fx.Node, value: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if n.op == "call_method":
            method = "reshape" if n.target == "view" else str(n.target)  # the ids' strides are not the tensor's
            return getattr(args[0], method)(*args[1:], **kwargs)
        assert callable(n.target)
        return n.target(*args, **kwargs)

    return _reshaped(run, n, call)


def _fixed_size(run: Labeller, n: fx.Node, value: Any) -> Any:
    """A reshape: where its arguments say how many channels there are, by a number or another tensor, it stays so."""
    channels = _shape_function(run, n, value)
    sizes: Any = n.args[1:] or tuple(n.kwargs.values())
    sizes = sizes[0] if sizes and isinstance(sizes[0], tuple | list) else sizes
    whole = isinstance(sizes[0], fx.Node) and not isinstance(run.env[sizes[0]], int)
    given = sizes[0] if whole else sizes[channels.dim]
    if isinstance(given, fx.Node):
        for ids in _measured(run, given):
            if not np.array_equal(ids, run.source(n).ids):
                run.pin("the size of another tensor", np.concatenate([ids, channels.ids]))
    elif given != -1:
        run.pin("fixed sizes", channels.ids)
    return channels


def _measured(run: Labeller, size: fx.Node) -> Iterator[Ints]:
    """Yield the ids of the tensors that a size, or what is computed of sizes, was taken from."""
    for source in size.all_input_nodes:
        yield from run._ids_of(source) if run.channels.get(source) is not None else _measured(run, source)


def _fixed_sections(run: Labeller, n: fx.Node, value: Any) -> Any:
    """A split or unflatten, whose arguments are numbers of channels."""
    if not any(isinstance(run.env[a], int) for a in n.all_input_nodes[1:]):
        run.pin("fixed sizes", run.source(n).ids)
    return _shape_function(run, n, value)


def _reshaped(run: Labeller, n: fx.Node, call: Callable[..., Any]) -> Channels | tuple[Channels, ...]:
    """Do to the ids what the operation does to the tensor, and read off where they ended up."""
    parts = run.channels[n.all_input_nodes[0]]
    if isinstance(parts, tuple):  # picking one part of a split
        part: Any = n.args[1]
        return parts[part]

    def ids_or_value(node: fx.Node) -> Any:
        known = run.channels.get(node)
        return run.env[node] if known is None else known.spread(run.env[node].shape)

    source = run.source(n)
    if operation(n) == "squeeze" and not (n.args[1:] or n.kwargs.keys() - {"input"}):
        raise run.refuse("'squeeze' without a dimension drops whatever has one place, a last channel or image too")
    result = call(*fx.node.map_arg(n.args, ids_or_value), **fx.node.map_arg(n.kwargs, ids_or_value))
    if isinstance(result, tuple | list):
        sections = tuple(_read_off(run, section) for section in result)
        if len({len(section.ids) for section in sections}) > 1:
            run.pin("uneven split", source.ids)
        else:
            for section in sections[1:]:
                run.tie("channel split", sections[0].ids, section.ids)
        return sections
    channels = _read_off(run, result, alone=_place_of_one(run, n, call) if len(source.ids) == 1 else 1)
    if n.target is operator.getitem and not np.array_equal(channels.ids, source.ids):
        run.pin("fixed indices", source.ids)  # by which channels are picked
    return channels


def _place_of_one(run: Labeller, n: fx.Node, call: Callable[..., Any]) -> int:
    """Return the dimension in which a single channel ends up: as ids do not change along it, two are sent after it."""
    node, source = n.all_input_nodes[0], run.source(n)
    shape = list(run.env[node].shape)
    shape[source.dim] = 2
    two = Channels(np.arange(2), source.dim).spread(torch.Size(shape))
    args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda given: two if given is node else run.env[given])
    try:
        changing = _changing(call(*args, **kwargs))
    except RuntimeError:  # a size in the arguments says that there is one
        changing = []
    return changing[-1] if changing else 1


def _changing(ids: Tensor) -> list[int]:
    """Return the dimensions along which ids change."""
    return [
        dim
        for dim in range(ids.dim())
        if ids.shape[dim] > 1 and ids.stride(dim) and bool((ids.narrow(dim, 0, 1) != ids).any())
    ]


def _read_off(run: Labeller, ids: Tensor, alone: int = 1) -> Channels:
    """Find the dimension along which the ids change; two of them mean that channels were split into sections.

    A single id changes along none: it is taken to be in dimension `alone`.
    """
    changing = _changing(ids)
    dim = changing[-1] if changing else min(alone, ids.dim() - 1)
    kept = sorted({*changing, dim})
    numbers = ids[tuple(slice(None) if d in kept else 0 for d in range(ids.dim()))].numpy()
    numbers = numbers.reshape(-1, ids.shape[dim]).copy()  # [sections, channels]
    for section in numbers[1:]:
        run.tie("channel sections", numbers[0], section)
    return Channels(numbers[0], dim)


# Functions and methods by name.
_FUNCTIONS: dict[str, Callable[[Labeller, fx.Node, Any], Any]] = {
    **dict.fromkeys(
        (
            "add", "sub", "mul", "div", "truediv", "neg", "abs", "exp", "sqrt", "rsqrt", "square", "pow", "clamp",
            "expm1", "log1p", "erf", "gt", "ge", "lt", "le", "where", "masked_fill",
            "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu",
            "silu", "mish", "sigmoid", "log_sigmoid", "tanh", "softplus", "softsign", "hardswish", "hardsigmoid",
            "hardtanh", "dropout",
            "dropout2d", "stochastic_depth", "maximum", "minimum", "clone", "contiguous", "float", "double",
            "to", "type_as", "expand_as", "detach",
        ),
        _elementwise,
    ),
    **dict.fromkeys(("cat", "concat"), _concatenate),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "std", "var"), _reduce),
    **dict.fromkeys(
        ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate"), _pool
    ),
    "pad": _pad,
    **dict.fromkeys(
        ("layer_norm", "group_norm", "softmax", "log_softmax", "normalize", "local_response_norm"), _pin_source
    ),
    **dict.fromkeys(("view", "reshape", "expand"), _fixed_size),
    **dict.fromkeys(("split", "unflatten"), _fixed_sections),
    **dict.fromkeys(
        ("flatten", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "getitem", "movedim"), _shape_function
    ),
}  # fmt: skip
