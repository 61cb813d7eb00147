"""Tracing a network with torch.fx, and reading what was traced."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torchvision.ops import FrozenBatchNorm2d

from prunelab import layers


class UntraceableError(TypeError):
    """A network, or a module in it, that cannot be cut safely."""


def trace(net: nn.Module) -> fx.Graph:
    """Trace a network's forward, in the mode it is in, down to the layers of PyTorch and of `prunelab.layers`.

    torchvision's frozen batch norm counts as one, too. torch.fx puts the constants that it meets into the network: give
    it a shallow copy where that matters.

    Raises:
        UntraceableError: the forward depends on values; the module is named.
    """
    tracer = _Tracer()
    try:
        return tracer.trace(net)
    except Exception as error:
        where = f"module {tracer.where!r} ({type(tracer.inside).__name__})" if tracer.where else "it"
        raise UntraceableError(
            f"{type(net).__name__} cannot be traced: {where} has a forward that depends on values ({error})"
        ) from error


def operation(node: fx.Node) -> str:
    """Return a module's path, or an operation's name: the same for `a + b`, `a += b` and `a.add_(b)`."""
    if node.op == "call_module":
        return str(node.target)
    name = _function(node).removesuffix("_")
    return name.removeprefix("i") if node.target in _IN_PLACE else name


def adds(node: fx.Node) -> bool:
    """Return whether a node adds two traced values, neither of them scaled."""
    plain = len(node.args) == len(node.all_input_nodes) == 2 and not node.kwargs
    return plain and node.op in ("call_function", "call_method") and operation(node) == "add"


def in_place(net: nn.Module, node: fx.Node) -> bool:
    """Return whether a node of a network's graph may write over what it reads."""
    if node.op == "call_module":
        return bool(getattr(net.get_submodule(str(node.target)), "inplace", False))
    name = _function(node)
    if node.target in _IN_PLACE or name.endswith("_") or node.kwargs.get("inplace"):
        return True
    return name in ("relu", "relu6") and node.args[1:] == (True,)


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def _function(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


class _Tracer(fx.Tracer):
    """A tracer that remembers which module it was in, to name it when tracing fails."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.inside = "", nn.Module()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        outer = self.where, self.inside
        self.where, self.inside = self.path_of_module(m), m
        result = super().call_module(m, forward, args, kwargs)
        self.where, self.inside = outer
        return result

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__ == layers.__name__ or isinstance(m, FrozenBatchNorm2d)
        return ours or super().is_leaf_module(m, module_qualified_name)
