"""Residual branches: the removal of whole blocks, with the constant that a branch of zero weights leaves behind.

**What a branch is.** In y = shortcut(x) + F(x), F is a branch if the addition is its only way out: in the traced graph,
everything that would be dead code if the addition did not read F. The other operand, which stays, is the shortcut: the
stream itself, or a path with fewer convolutions (a projection, padded channels). Two paths of equal depth are no branch
and shortcut, and neither goes. Of branches inside branches the inner ones are found. The blocks of ResNets (basic,
bottleneck, pre-activation), ResNeXts, RegNets, MobileNets, EfficientNets and ConvNeXts are all this one pattern.

**Groups.** Each branch is a group of one unit, named after the module that adds it ("layer2.0"), and may be gone
altogether: its shortcut takes over, so that no unit has to stay as one channel of a layer has to. Branches differ in
cost, and one group of all of them would have no closed-form cost of its width; as groups of one, their widths are their
gates, and MACs and parameters are sums over them. Budgets rank all branches against each other.

**The mask.** A closed gate zeroes the weights of the branch's last layer, the last convolution or linear layer that
everything passes through. What stands behind it stays as it is: batch norm, bias, layer scale, squeeze-and-excitation.
With the statistics frozen, as in evaluation, these turn a zero into one constant per channel,

    c = β − μ·γ / √(σ² + ε)   for a batch norm alone,

and a branch for which that is not so (a border of padding that shows) is not removable.

**The cut.** The module that adds the branch is replaced by a `torch.fx.GraphModule` of its own forward without the
branch; its other children, the rest of the network, and all their names stay what they are. c goes into the bias of the
shortcut's last layer if it has one, otherwise into an `AddConstant` on the stream. That layer is absent only where c is
zero whatever the weights are: what the small network is made of depends on the plan, not on the weights, so that
its state dict can be loaded again.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np
import torch
from torch import Tensor, fx, nn

from prunelab import cost
from prunelab._arrays import Bools, Floats, Ints
from prunelab._checks import NETWORK, TENSOR, check
from prunelab._modes import evaluating, modes_kept
from prunelab._modules import replace_module
from prunelab.layers import AddConstant
from prunelab.structure.graph import Channels, Labeller
from prunelab.structure.plan import Plan
from prunelab.structure.space import Cost, Group, Ranking, Scores, Space
from prunelab.structure.tracing import UntraceableError, adds, in_place, trace


@dataclass(frozen=True)
class Branch:
    """A residual branch; all names are those of the network's modules and tensors.

    Attributes:
        name: the module whose forward adds the branch to the shortcut; numbered if it adds several.
        layers: the branch's convolutions and linear layers, in the order in which they run.
        last: the one of them that a closed gate zeroes.
        tensors: all its parameters and buffers.
        block: the path of the module that adds it, "" for the network itself.
        addition: which of the additions in that module's forward it is.
        shortcut: which of the two summands stays, 0 or 1.
        bias: the layer of the shortcut whose bias takes the constant; None if there is none.
        constant: whether there can be a constant.
        tail: what stands behind the last layer.
    """

    name: str
    layers: tuple[str, ...]
    last: str
    tensors: frozenset[str]
    block: str
    addition: int
    shortcut: int
    bias: str | None
    constant: bool
    tail: _Tail


@dataclass(frozen=True)
class _Tail:
    """What stands between a branch's last layer and the addition."""

    layer: fx.Node
    nodes: tuple[fx.Node, ...]
    shape: torch.Size  # of what the last layer puts out, for one image
    dim: int  # where its channels lie

    def __call__(self, run: fx.Interpreter, channels: Tensor) -> Tensor:
        """Return what the branch puts out, [1, C, …], if its last layer puts out these channels everywhere."""
        layout = [1] * len(self.shape)
        layout[self.dim] = len(channels)
        run.env = {self.layer: channels.view(layout).expand(self.shape)}
        with torch.no_grad():
            for node in self.nodes:
                run.env[node] = run.run_node(node)
        return run.env[(self.layer, *self.nodes)[-1]]


class BlockSpace(Space):
    """The residual branches of a network; a group of one unit per branch, which may be gone.

    Args:
        net: a network that torch.fx can trace.
        example: an input, float [N, C, H, W]; its spatial size fixes the MACs.

    Attributes:
        branches: what is known of each branch, in the order of the groups. `branches[i].layers` names the convolutions
            whose weights SSL's depth penalty acts on: λ_d · Σ ‖W‖₂, a sum over the layers of all branches.

    Raises:
        UntraceableError: the network cannot be traced safely, or what is left of a block would not train as it does
            now; the module is named.
        ValueError: the network has no residual branches.
    """

    kind = "blocks"

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        check("net", net, NETWORK)
        check("example", example, TENSOR)
        self.example = example
        with modes_kept(net):
            search = _Search(net, example)
            self.branches = search.branches()
        self._graph, products = search.graph, search.run.found.products
        gates = np.array([[p.module in b.layers for b in self.branches] for p in products], dtype=np.int64)
        gates = gates.reshape(len(products), len(self.branches))
        macs = [p.macs * (1 if p.reads is None else len(p.reads)) * len(p.writes) for p in products]
        conv = np.array([p.kind == "conv" for p in products])
        groups = [Group(branch.name, 1, least=0) for branch in self.branches]
        super().__init__(net, groups, _sum_over(np.array(macs, dtype=np.int64), gates, conv))

    @cached_property
    def parameter_cost(self) -> Cost:
        """The number of parameters, as a closed form; constants left behind are not parameters."""
        sizes = {name: parameter.numel() for name, parameter in self.net.named_parameters()}
        own = [sum(sizes.get(name, 0) for name in branch.tensors) for branch in self.branches]
        rows = np.array([*own, cost.parameters(self.net) - sum(own)], dtype=np.int64)
        return _sum_over(rows, np.eye(len(rows), len(own), dtype=np.int64), np.zeros(len(rows), dtype=np.bool_))

    def owned(self, net: nn.Module) -> list[tuple[nn.Parameter, list[Tensor]]]:
        """List the weights of each branch's last layer with the branch's number."""
        weights = [net.get_submodule(branch.last).get_parameter("weight") for branch in self.branches]
        return [(weight, [torch.full([1] * weight.dim(), unit)]) for unit, weight in enumerate(weights)]

    def unit_weights(self, group: str) -> Tensor:
        """Return the weights of all layers of a branch side by side, [1, weights].

        Norms of them are those of SSL, without a factor for their number: a branch of more weights has a larger norm.
        """
        self._known({group: None})
        layers = self.branches[self._index[group]].layers
        return torch.cat([self.net.get_submodule(n).get_parameter("weight").detach().flatten() for n in layers])[None]

    def shrink(self, plan: Plan) -> nn.Module:
        """Return a network of the same class without the removed branches, whose weights are not copied."""
        gone = self._gone(plan)
        constants = self._constants(gone)
        dropped = {name for branch in gone for name in branch.tensors}
        tensors = (*self.net.named_parameters(), *self.net.named_buffers())
        small = copy.deepcopy(self.net, {id(tensor): tensor for name, tensor in tensors if name in dropped})
        blocks: dict[str, list[Branch]] = defaultdict(list)
        for branch in gone:
            blocks[branch.block].append(branch)
            if branch.bias is not None and branch.name in constants:
                bias = small.get_submodule(branch.bias).get_parameter("bias").detach()  # the same memory
                bias += constants.pop(branch.name).flatten()
        for path in sorted(blocks, reverse=True):  # inner blocks before those that hold them
            block = small.get_submodule(path)
            cut = fx.GraphModule(block, _without(block, blocks[path], constants), type(block).__name__)
            # A graph module is given the modules that its graph names; its parent may ask for what else the block has.
            vars(cut).update({k: v for k, v in vars(block).items() if k not in vars(cut) or "_hooks" in k})
            if not path:
                return cut
            replace_module(small, path, cut)
        return small

    def cut(self, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leave out what belongs to removed branches; all else stays as it is."""
        dropped = {name for branch in self._gone(plan) for name in branch.tensors}
        return {name: tensor for name, tensor in tensors.items() if name not in dropped}

    def _gone(self, plan: Plan) -> list[Branch]:
        self.check(plan)
        return [branch for branch in self.branches if not plan.keep[branch.name]]

    def _constants(self, gone: Sequence[Branch]) -> dict[str, Tensor]:
        """Return what branches leave behind whose last layer has zero weights, [C, 1, …]."""
        found = {}
        with evaluating(self.net):
            run = _interpreter(self.net, self._graph)
            for branch in gone:
                if branch.constant:
                    last, channels = self.net.get_submodule(branch.last), branch.tail.shape[branch.tail.dim]
                    bias = last.get_parameter("bias") if last.bias is not None else last.weight.new_zeros(channels)
                    found[branch.name] = _at_origin(branch.tail(run, bias))[0].detach().clone()
        return found

    def _priority(self, scores: Scores, ranking: Ranking) -> Floats:
        """Rank all branches against each other, whatever the ranking: none is in a group with another."""
        return np.array([scores[group.name].item() for group in self.groups])


def _sum_over(amounts: Ints, gates: Ints, conv: Bools) -> Cost:
    """Return Σ amount · gate over rows; a row that no gate opens, [rows, branches], counts always."""
    zeros, ones = np.zeros_like(gates), np.ones(len(amounts), dtype=np.int64)
    return Cost(amounts, gates, 1 - gates.sum(axis=1), zeros, ones, conv)


# -- finding branches --------------------------------------------------------------------------------------------------


class _Search:
    """A traced network, and the search for its branches."""

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        self.net = net
        root = copy.copy(net)  # where torch.fx puts the constants that it meets
        self.graph = trace(root.eval())
        self.values = _interpreter(net, self.graph)
        self.run = Labeller(root, example)
        self.run.evaluate(self.graph)
        self.graph.eliminate_dead_code(lambda node: node.op in _ENDS or in_place(net, node))
        self.layers = {product.module for product in self.run.found.products}
        self.named = {
            **dict(net.named_parameters(remove_duplicate=False)),
            **dict(net.named_buffers(remove_duplicate=False)),
        }
        self.readers: dict[int, set[fx.Node]] = defaultdict(set)  # by the identity of a parameter or buffer
        self.fed: set[fx.Node] = set()  # what depends on the image
        for node in self.graph.nodes:
            if node.op == "placeholder" or not self.fed.isdisjoint(node.all_input_nodes):
                self.fed.add(node)
            for name in self._tensors(node):
                self.readers[id(self.named[name])].add(node)

    def branches(self) -> tuple[Branch, ...]:
        """Return all removable branches in the order in which they are added."""
        found: list[tuple[fx.Node, set[fx.Node], Branch]] = []
        seen: dict[str, int] = defaultdict(int)  # additions by block
        for add in filter(adds, self.graph.nodes):
            block = _paths(add)[-1]
            place, seen[block] = seen[block], seen[block] + 1
            sides = [self._only_for(add, operand) for operand in add.all_input_nodes]
            depths = [sum(self._is_layer(node) for node in side) for side in sides]
            if depths[0] != depths[1]:
                shortcut = depths.index(min(depths))
                branch = self._branch(add, sides[1 - shortcut], shortcut, block, place)
                found += [(add, sides[1 - shortcut], branch)] if branch else []
        additions = {add for add, _, _ in found}
        inner = [branch for _, nodes, branch in found if not nodes & additions]
        for branch in inner:
            _check_arguments(self.net, branch)
            _check_training(self.net, branch)
        return tuple(inner)

    def _only_for(self, add: fx.Node, operand: fx.Node) -> set[fx.Node]:
        """Return the nodes that would be dead code if an addition did not read this operand."""
        dead: set[fx.Node] = set()
        node = add.prev
        while node.op not in ("root", "placeholder"):
            users = node.users.keys() - dead
            if users <= {add} and (node is operand or not users):
                dead.add(node)
            node = node.prev
        return dead

    def _branch(self, add: fx.Node, members: set[fx.Node], shortcut: int, block: str, place: int) -> Branch | None:
        """Return the branch of these nodes, or None if it cannot be removed exactly."""
        nodes = [node for node in self.graph.nodes if node in members]
        stays = add.all_input_nodes[shortcut]
        tail = self._tail(nodes) if self._stands_alone(nodes, add, stays, block) else None
        if tail is None:
            return None
        # A stream that is written over has to be a copy, which the sum with a constant is.
        overwritten = any(in_place(self.net, reader) for reader in add.users)
        return Branch(
            name=(f"{block}#{place + 1}" if place else block) if block else add.name,
            layers=tuple(dict.fromkeys(str(node.target) for node in nodes if self._is_layer(node))),
            last=str(tail.layer.target),
            tensors=frozenset(name for node in nodes for name in self._tensors(node)),
            block=block,
            addition=place,
            shortcut=shortcut,
            bias=str(stays.target) if self._takes_bias(stays) else None,
            constant=overwritten or self._may_add(tail),
            tail=tail,
        )

    def _stands_alone(self, nodes: Sequence[fx.Node], add: fx.Node, stays: fx.Node, block: str) -> bool:
        """Whether an addition in a block can do without these nodes, and nothing else has to do with them."""
        members, summed = set(nodes), self.run.channels[add]
        return (
            isinstance(summed, Channels)
            and summed.dim == 1
            and stays in self.fed
            and self.run.env[stays].shape == self.run.env[nodes[-1]].shape
            and all(block in _paths(node) for node in nodes)
            and all(node.op != "get_attr" or node.target in self.named for node in nodes)
            and all(members.issuperset(node.all_input_nodes) for node in nodes if in_place(self.net, node))
            and all(self.readers[id(self.named[name])] <= members for node in nodes for name in self._tensors(node))
        )

    def _tail(self, nodes: Sequence[fx.Node]) -> _Tail | None:
        """Return what stands behind the last layer, if there is one and it leaves the same behind everywhere."""
        last = self._last(nodes)
        if last is None:
            return None
        behind = tuple(node for node in nodes if node not in {last, *_around(nodes, last)})
        tail = _Tail(last, behind, self.run.env[last].shape, self.run.channels[last].dim)
        zero = self._silence(tail)
        trial = tail(self.values, torch.linspace(-1, 1, len(zero)).to(zero))
        return tail if torch.allclose(trial, _at_origin(trial).expand_as(trial), rtol=1e-4, atol=1e-6) else None

    def _may_add(self, tail: _Tail) -> bool:
        """Whether a branch may add anything once its last layer has zero weights."""
        own = [name for node in (tail.layer, *tail.nodes) for name in self._tensors(node)]
        return own != [f"{tail.layer.target}.weight"] or bool(tail(self.values, self._silence(tail)).any())

    def _silence(self, tail: _Tail) -> Tensor:
        """Return the channels, all zero, of a tail's layer."""
        weight = self.net.get_submodule(str(tail.layer.target)).get_parameter("weight")
        return weight.new_zeros(tail.shape[tail.dim])

    def _last(self, nodes: Sequence[fx.Node]) -> fx.Node | None:
        """Return the last layer that everything between the branch's input and its output passes through."""
        layers = [node for node in nodes if self._is_layer(node)]
        return next((layer for layer in reversed(layers) if nodes[-1] not in _around(nodes, layer)), None)

    def _is_layer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and str(node.target) in self.layers

    def _takes_bias(self, node: fx.Node) -> bool:
        """Whether a node is a layer with a bias that nothing but the addition behind it sees."""
        if len(node.users) > 1 or node.op != "call_module":
            return False
        module = self.net.get_submodule(str(node.target))
        if not isinstance(module, (*_WITH_BIAS, nn.modules.batchnorm._BatchNorm)):
            return False
        return module.bias is not None and len(self.readers[id(module.bias)]) == 1

    def _tensors(self, node: fx.Node) -> list[str]:
        """Return the names of the parameters and buffers that a node reads."""
        name = str(node.target)
        if node.op == "call_module":
            module = self.net.get_submodule(name)
            return [f"{name}.{own}" for own, _ in (*module.named_parameters(), *module.named_buffers())]
        return [name] if node.op == "get_attr" and name in self.named else []


_ENDS = ("placeholder", "output")
_WITH_BIAS = (nn.Conv2d, nn.Linear)


def _interpreter(net: nn.Module, graph: fx.Graph) -> fx.Interpreter:
    return fx.Interpreter(net, garbage_collect_values=False, graph=graph)


def _around(nodes: Sequence[fx.Node], layer: fx.Node) -> set[fx.Node]:
    """Return those of a branch's nodes that its input reaches on a way that does not pass `layer`."""
    members, reached = set(nodes), set[fx.Node]()
    for node in nodes:
        if node is not layer and any(source in reached or source not in members for source in node.all_input_nodes):
            reached.add(node)
    return reached


def _paths(node: fx.Node) -> list[str]:
    """Return the modules that a node is in, from the whole network, "", inwards."""
    return ["", *(path for path, _ in node.meta.get("nn_module_stack", {}).values())]


def _at_origin(value: Tensor) -> Tensor:
    """Return [N, C, 1, …]: the first place of every channel."""
    return value[(slice(None), slice(None), *[slice(1)] * (value.dim() - 2))]


# -- cutting blocks ----------------------------------------------------------------------------------------------------


class _ShallowTracer(fx.Tracer):
    """A tracer of one module's own forward."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _without(block: nn.Module, branches: Iterable[Branch], constants: Mapping[str, Tensor]) -> fx.Graph:
    """Trace a block without some of the branches that it adds; constants, by branch, become layers of the block."""
    graph = _ShallowTracer().trace(block)
    additions = [node for node in graph.nodes if adds(node)]
    for branch in branches:
        add = additions[branch.addition]
        left = add.all_input_nodes[branch.shortcut]
        if branch.name in constants:
            name = next(name for i in count(1) if not hasattr(block, name := f"constant{i if i > 1 else ''}"))
            block.add_module(name, AddConstant(constants[branch.name]).train(block.training))
            with graph.inserting_before(add):
                left = graph.call_module(name, (left,))
        add.replace_all_uses_with(left)
        graph.erase_node(add)
    graph.eliminate_dead_code(lambda node: node.op in _ENDS)
    return graph


def _check_arguments(net: nn.Module, branch: Branch) -> None:
    """Raise UntraceableError if a block may be called in several ways: traced by itself, it has one."""
    block = net.get_submodule(branch.block)
    arguments = inspect.signature(block.forward).parameters.values()
    if optional := [one.name for one in arguments if one.default is not inspect.Parameter.empty]:
        raise UntraceableError(
            f"cannot cut {branch.block!r} of type {type(block).__name__} safely: its forward has optional arguments, "
            f"{', '.join(optional)}, and may do something else with them. Give it one argument."
        )


def _check_training(net: nn.Module, branch: Branch) -> None:
    """Raise UntraceableError unless a block without a branch does the same in training as in evaluation.

    Layers may differ between the two, since they stay modules; the block's own forward is fixed when it is traced.
    """
    block, graphs = net.get_submodule(branch.block), set()
    for mode in (True, False):
        probe = copy.copy(block)
        probe.training = mode
        try:
            graphs.add(str(_without(probe, [branch], {})))
        except Exception as error:
            raise UntraceableError(
                f"{branch.block!r} of type {type(block).__name__} cannot be traced apart from its layers ({error})"
            ) from error
    if len(graphs) > 1:
        raise UntraceableError(
            f"cannot cut {branch.block!r} of type {type(block).__name__} safely: beside the branch, its forward "
            "computes something else in training than in evaluation. Use modules for that, such as nn.Dropout."
        )
