"""A network that is pruned layer by layer on a sample of images: what its layers see, and what they should respond."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from prunelab._modules import replace_module
from prunelab.data import Data
from prunelab.layers import ChannelSelection
from prunelab.reconstruction import Moments, Reconstruction, check_rows
from prunelab.structure import ChannelSpace
from prunelab.structure.graph import Product
from prunelab.structure.space import open_ended
from prunelab.structure.tracing import adds, trace

Key = TypeVar("Key")

BATCH = 250  # images that run through the networks together
LEAST_GAMMA = 1e-3  # of the largest: below it, a batch norm hides what the layer in front of it does


def samples(maps: Tensor, positions: int, seed: int) -> Tensor:
    """Pick rows at random positions of each image, [B, H, W, ...] -> [B·P, columns]; P = min(positions, H·W).

    The same seed picks the same positions in all maps of the same size.
    """
    images, height, width = maps.shape[:3]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(images, height * width, generator=generator).topk(min(positions, height * width)).indices
    at, image = chosen.to(maps.device), torch.arange(images, device=maps.device)[:, None]
    return maps[image, at // width, at % width].flatten(0, 1).flatten(1)


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """View a layer's input as one row of columns per output position, [B, H', W', ...columns], without a copy of it."""
    if not isinstance(layer, nn.Conv2d):
        return responses(layer, x)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for dim, size, stride, dilation in zip((2, 3), layer.kernel_size, layer.stride, layer.dilation, strict=True):
        x = x.unfold(dim, (size - 1) * dilation + 1, stride)
    x = x[..., :: layer.dilation[0], :: layer.dilation[1]]
    return x.permute(0, 2, 3, 1, 4, 5)


def responses(layer: nn.Module, y: Tensor) -> Tensor:
    """View what a layer or a sum gives out as one row per position, [B, H, W, outputs]."""
    return y.permute(0, 2, 3, 1) if isinstance(layer, nn.Conv2d) else y.reshape(len(y), -1, 1, y.shape[-1])


@dataclass(frozen=True)
class Tap:
    """Which value of a graph to sample: that of `node`, as a layer's input or output."""

    node: fx.Node
    layer: nn.Module
    of_input: bool

    def __call__(self, value: Tensor, positions: int, seed: int) -> Tensor:
        """Return the sampled rows."""
        return samples((patches if self.of_input else responses)(self.layer, value), positions, seed)


class Frontier(fx.Interpreter):
    """A network and some batches that have come as far as one node of its graph.

    Of each batch, only values that nodes behind the frontier read are kept. The network may be exchanged for one that
    has the same graph and computes the same in front of the frontier.
    """

    def __init__(self, net: nn.Module, graph: fx.Graph, batches: Sequence[Tensor]) -> None:
        super().__init__(net, garbage_collect_values=True, graph=graph)
        self.nodes = list(graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.at = 1  # behind the input
        self.held: list[dict[fx.Node, Tensor]] = [{self.nodes[0]: batch} for batch in batches]

    def advance(self, node: fx.Node) -> None:
        """Run all batches to just before a node, and stay there."""
        for number, held in enumerate(self.held):
            for _ in self._steps(held, self.place[node]):
                pass
            self.held[number] = dict(self.env)
        self.at = max(self.at, self.place[node])

    def sample(self, taps: Mapping[Key, Tap], positions: int, seed: int) -> Iterator[dict[Key, Tensor]]:
        """Run each batch as far as the taps need, yield their rows, and return to the frontier."""
        stop = max(self.place[tap.node] for tap in taps.values()) + 1
        for number, held in enumerate(self.held):
            found: dict[Key, Tensor] = {}
            for node, value in self._steps(held, stop):
                found |= {
                    key: tap(value, positions, seed + number) for key, tap in taps.items() if tap.node is node
                }  # at once: what runs next may work in place
            yield found

    @torch.no_grad()
    def _steps(self, held: Mapping[fx.Node, Tensor], stop: int) -> Iterator[tuple[fx.Node, Tensor]]:
        """Run one batch from the frontier, forgetting what is not read again."""
        self.env = dict(held)
        yield from held.items()
        for node in self.nodes[self.at : stop]:
            self.env[node] = self.run_node(node)
            yield node, self.env[node]
            for dead in self.user_to_last_uses.get(node, []):
                self.env.pop(dead, None)


@dataclass(frozen=True)
class _Part:
    """What is left of a layer at some time: which of its columns and outputs, by index, and their weights.

    `channel` says which channel of the group at hand a column belongs to, as in `Reconstruction`.
    """

    inputs: Tensor
    outputs: Tensor
    channel: Tensor
    weight: Tensor
    bias: Tensor

    def moments(self) -> Moments:
        """Return moments for its rows and responses, of none yet."""
        outputs, inputs = self.weight.shape
        return Moments(inputs, outputs, self.weight.device)


class LayerByLayer:
    """An original network and its pruned copy, both run on a sample of training images as far as they are needed.

    Give `prepare` the groups that will lose channels; then, in this order, call `readers` and `cut` for each.

    Attributes:
        space: of the pruned network at full size, where what the plan has removed is still there.
        plan: what has been kept so far.
        batches: the sampled images, normalised.
    """

    def __init__(
        self, net: nn.Module, data: Data, images: int, positions: int, *, accumulated: bool, seed: int
    ) -> None:
        self.positions, self.accumulated, self.seed = positions, accumulated, seed
        chosen = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(seed))[:images]
        self.batches = [data.normalise(data.train.images[some.to(data.device)]) for some in chosen.split(BATCH)]
        self.dense = with_samplers(net, data.example).to(memory_format=torch.channels_last)
        self.without_bias = _give_biases(self.dense)
        self.space = ChannelSpace(copy.deepcopy(self.dense), data.example)
        self.plan = self.space.plan({})
        self.calls = _calls(self.dense)
        self.frontier = Frontier(self.dense, next(iter(self.calls.values()))[0].graph, self.batches)

    def prepare(self, widths: Mapping[str, int], *, check: bool = True) -> None:
        """Sample what the original network responds where groups, {group: channels kept}, will be cut.

        Raises:
            ValueError: with `check`, if a layer will have fewer samples than unknowns; it says how many are needed.
        """
        if check:
            self._check(widths)
        layers = dict.fromkeys(layer.module for name in widths for layer in readers_of(self.space, name))
        calls = {node: _layer(self.dense, name) for name in layers for node in self.calls[name]}
        self.sums = {node: found for node in calls if (found := added_to(self.dense, node))}
        self.taps = {node: Tap(node, layer, of_input=False) for node, layer in calls.items()}
        self.taps |= {s.shortcut: Tap(s.shortcut, calls[node], of_input=False) for node, s in self.sums.items()}
        self.targets = list(self.frontier.sample(self.taps, self.positions, self.seed)) if layers else []

    def readers(self, group: str) -> dict[str, Reconstruction]:
        """Return the layers that read a group, by name, with the moments of what they read and miss at present."""
        if self.accumulated:
            self.frontier.module = self.space.shrink(self.plan).to(memory_format=torch.channels_last)
        writers = [node for axis in self.space.writers(group) for node in self.calls[axis.module]]
        self.frontier.advance(min(writers, key=lambda node: self.frontier.place[node]))

        parts = {layer.module: self._part(layer, group) for layer in readers_of(self.space, group)}
        moments = {name: part.moments() for name, part in parts.items()}
        calls = [(name, node) for name in parts for node in self.calls[name]]
        sums = {node: self.sums[node] for _, node in calls if self.accumulated and node in self.sums}
        taps: dict[object, Tap] = {s.shortcut: self.taps[s.shortcut] for s in sums.values()}
        taps |= {(node, "input"): Tap(node.all_input_nodes[0], self.taps[node].layer, True) for _, node in calls}
        for target, found in zip(self.targets, self.frontier.sample(taps, self.positions, self.seed), strict=True):
            for name, node in calls:
                part, x = parts[name], found[node, "input"]
                x = x if self.accumulated else x[:, part.inputs]
                missing = target[node][:, part.outputs] - F.linear(x, part.weight, part.bias)
                if node in sums:
                    shortcut, scale = sums[node].shortcut, sums[node].scale
                    missing += ((target[shortcut] - found[shortcut]) * scale)[:, part.outputs]
                moments[name].add(x, missing)
        return {name: Reconstruction(part.weight, part.channel, moments[name]) for name, part in parts.items()}

    @torch.no_grad()
    def cut(
        self, group: str, kept: Sequence[int], readers: Mapping[str, Reconstruction], *, reconstruct: bool = True
    ) -> tuple[float, float]:
        """Remove the other channels of a group and give its readers, as `readers` returned them, new weights.

        Returns the squared errors of the readers' responses over their variance: after the removal alone, and as it is
        left, which is the same without `reconstruct`.
        """
        errors, variance = np.zeros(2), 0.0
        for product in readers_of(self.space, group):
            reader, part = readers[product.module], self._part(product, group)
            alone = reader.cut(kept)
            change = reader.solve(kept) if reconstruct else alone
            errors += alone.error, change.error
            original = torch.cat([target[node] for node in self.calls[product.module] for target in self.targets])
            variance += float(original[:, part.outputs].var(0, correction=0).sum())
            layer = _layer(self.space.net, product.module)
            weight = layer.weight.flatten(1).clone()
            weight[part.outputs[:, None], part.inputs] += change.weight.to(weight)
            layer.weight.copy_(weight.view_as(layer.weight))
            _bias(layer)[part.outputs] += change.bias.to(weight)
        self.plan = self.space.plan({**self.plan.keep, group: kept})
        alone_error, error = errors / variance
        return float(alone_error), float(error)

    @torch.no_grad()
    def shrunk(self) -> nn.Module:
        """Return the pruned network; the biases that layers were given go into the batch norms behind them."""
        small = self.space.shrink(self.plan)
        for name in self.without_bias:
            layer, norm = _layer(small, name), self.space.coupling.norms.get(name, "")
            mean = getattr(small.get_submodule(norm), "running_mean", None)
            if mean is not None:
                mean -= _bias(layer)
            if mean is not None or not _bias(layer).any():
                layer.bias = None
        return small

    def _part(self, product: Product, group: str) -> _Part:
        assert product.reads is not None
        alive = open_ended(self.space.gates(self.plan)).numpy() > 0  # by unit; the last entry is that of unit -1
        layer, units = _layer(self.space.net, product.module), self.space.units(group)
        columns = product.reads.repeat(layer.weight[0].numel() // len(product.reads))
        alive_in, alive_out = np.flatnonzero(alive[columns]), np.flatnonzero(alive[product.writes])
        owner = np.where(np.isin(columns, units), columns - units.start, -1)[alive_in]
        inputs, outputs, channel = (torch.from_numpy(a).to(layer.weight.device) for a in (alive_in, alive_out, owner))
        weight, bias = layer.weight.detach().flatten(1), _bias(layer).detach()
        return _Part(inputs, outputs, channel, weight[outputs][:, inputs], bias[outputs])

    def _check(self, widths: Mapping[str, int]) -> None:
        left, products = dict(self.plan.widths), self.space.coupling.products
        layers = {product.module for name in widths for product in readers_of(self.space, name)}
        shapes = _input_shapes(self.dense, layers, self.batches[0][:1])
        for group, width in widths.items():
            left[group] = width
            for product in readers_of(self.space, group):
                assert product.reads is not None
                row, layer = products.index(product), _layer(self.dense, product.module)
                channels = self.space.widths(left) @ self.space.cost.reads[row] + self.space.cost.reads_fixed[row]
                seen = patches(layer, torch.ones(shapes[product.module])).flatten(3)
                rows = sum(map(len, self.batches)) * min(self.positions, seen.shape[1] * seen.shape[2])
                columns = int(seen.any((0, 1, 2)).sum() * channels) // len(product.reads)  # padding alone is no unknown
                check_rows(rows, columns, f"layer {product.module!r}")


@dataclass(frozen=True)
class Sum:
    """Where a layer's response is added to something else, the value of `shortcut`.

    A change of that value by d does what a change of the response by d·scale does; scale is σ/γ of a batch norm between
    the layer and the sum, [channels], and 1 without one.
    """

    shortcut: fx.Node
    scale: Tensor


def added_to(net: nn.Module, call: fx.Node) -> Sum | None:
    """Return what the response of a layer is added to, right behind it or behind its batch norm; None if to nothing."""
    if not call.users:
        return None
    last, scale = call, torch.ones(())
    user, *others = last.users
    if not others and user.op == "call_module":
        norm = net.get_submodule(str(user.target))
        if isinstance(norm, BatchNorm):
            last, scale = user, _sigma_over_gamma(norm)
            user, *others = last.users
    if others or not adds(user):
        return None
    (other,) = (node for node in user.all_input_nodes if node is not last)
    return Sum(other, scale)


def _sigma_over_gamma(norm: BatchNorm) -> Tensor:
    """Return σ/γ, [channels]; 0 where γ is so small that the layer in front of it cannot repair anything."""
    if norm.running_var is None:
        return torch.zeros(())
    sigma = (norm.running_var + norm.eps).sqrt()
    gamma = norm.weight.detach() if norm.affine else torch.ones_like(sigma)
    return torch.where(gamma.abs() > LEAST_GAMMA * gamma.abs().max(), sigma / gamma, 0.0)


def with_samplers(net: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy, in evaluation mode, in which the first convolution of each residual branch chooses its inputs.

    The convolution becomes a `ChannelSelection` and itself, named "select" and "conv". Shortcuts, also those with a
    projection, read all channels still. A network without residual sums is only copied.

    Args:
        net: a network that torch.fx can trace; it stays as it is.
        example: an input, float [N, C, H, W].

    Raises:
        UntraceableError: the network cannot be cut safely.
    """
    net = copy.deepcopy(net).eval()
    space, calls = ChannelSpace(net, example), _calls(net)
    shared = [unit for group in streams(space) for unit in space.units(group)]
    for product in space.coupling.products:
        reads_stream = product.kind == "conv" and product.reads is not None and np.isin(product.reads, shared).all()
        if reads_stream and not added_to(net, calls[product.module][0]):
            conv = _layer(net, product.module)
            chosen: OrderedDict[str, nn.Module] = OrderedDict(select=ChannelSelection(conv.weight.shape[1]), conv=conv)
            replace_module(net, product.module, nn.Sequential(chosen).eval())
    return net


def streams(space: ChannelSpace) -> list[str]:
    """Return the groups that shortcuts read: sums of several layers, and what a projection reads beside a branch."""
    calls = _calls(space.net)
    found = []
    for group in space.groups:
        readers = readers_of(space, group.name)
        projected = any(added_to(space.net, calls[reader.module][0]) for reader in readers)
        if space.is_sum(group.name) or (projected and len(readers) > 1):
            found.append(group.name)
    return found


def readers_of(space: ChannelSpace, group: str) -> list[Product]:
    """Return the layers that read a group, without depthwise and grouped ones: those go with what they read."""
    units = space.units(group)
    return [p for p in space.coupling.products if p.reads is not None and np.isin(p.reads, units).any()]


def _layer(net: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    layer = net.get_submodule(name)
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        kind = type(layer).__name__
        raise ValueError(f"layer {name!r} is a {kind}: only Conv2d and Linear layers can be given new weights")
    return layer


def _input_shapes(net: nn.Module, layers: Collection[str], images: Tensor) -> dict[str, torch.Size]:
    """Return the shape of what layers of a network read, by name."""
    shapes: dict[str, torch.Size] = {}
    hooks = [
        _layer(net, name).register_forward_pre_hook(lambda _, x, name=name: shapes.update({name: x[0].shape}))
        for name in layers
    ]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()
    return shapes


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _give_biases(net: nn.Module) -> list[str]:
    """Give every convolution and linear layer a bias, in place; return the names of those that had none."""
    bare = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is None]
    for name in bare:
        layer = _layer(net, name)
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    return bare


def _calls(net: nn.Module) -> dict[str, list[fx.Node]]:
    """Trace a network; return the calls of each layer."""
    calls = defaultdict(list)
    for node in trace(net).nodes:
        calls[str(node.target)].append(node)
    return calls
