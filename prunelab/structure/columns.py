"""Columns of the im2col matrix: the same (channel, y, x) position in all filters of a convolution."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prunelab.layers import ColumnConv2d
from prunelab.structure.graph import Product, couple
from prunelab.structure.plan import Plan
from prunelab.structure.space import Cost, Group, Space
from prunelab.structure.tracing import UntraceableError


class ColumnSpace(Space):
    """The columns of every ungrouped convolution that is not transposed; a group per convolution, named after it.

    Column j = (c·kh + dy)·kw + dx. Removing columns leaves every tensor between the layers as it is, so convolutions
    are independent of each other and residual networks need no care.

    Args:
        net: a network that torch.fx can trace.
        example: an input, float [N, C, H, W]; its spatial size fixes the MACs.

    Raises:
        UntraceableError: the network cannot be traced safely, a convolution pads as `ColumnConv2d` cannot, or it shares
            its kernel with another layer.
    """

    kind = "columns"

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        self.example = example
        products = couple(net, example).products
        self.convolutions = {
            p.module: conv
            for p in products
            if isinstance(conv := net.get_submodule(p.module), nn.Conv2d) and conv.groups == 1 and p.kind == "conv"
        }
        self._check_kernels(net)
        groups = [Group(name, conv.weight[0].numel()) for name, conv in self.convolutions.items()]
        super().__init__(net, groups, _cost(products, self.convolutions))

    def _check_kernels(self, net: nn.Module) -> None:
        """Refuse convolutions that `ColumnConv2d` cannot stand in for, and those that share their kernel."""
        holders: dict[int, list[str]] = defaultdict(list)
        for name, module in net.named_modules():
            for parameter in module.parameters(recurse=False):
                holders[id(parameter)].append(name)
        for name, conv in self.convolutions.items():
            if len(layers := holders[id(conv.weight)]) > 1:
                raise UntraceableError(f"columns of {name!r} cannot be cut: {' and '.join(layers)} share its kernel")
            if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
                raise UntraceableError(
                    f"columns of {name!r} cannot be cut: its padding must be zeros, in numbers; got {conv}"
                )

    def owned(self, net: nn.Module) -> list[tuple[nn.Parameter, list[Tensor]]]:
        """List the kernels, [out, C, kh, kw], with the unit of each column, [1, C, kh, kw]."""
        kernels = [net.get_submodule(group.name).get_parameter("weight") for group in self.groups]
        units = torch.arange(int(self.sizes.sum())).split(self.sizes.tolist())
        return [(kernel, [numbers.view(1, *kernel.shape[1:])]) for kernel, numbers in zip(kernels, units, strict=True)]

    def unit_weights(self, group: str) -> Tensor:
        """Return the columns of a convolution's weights, [columns, filters]."""
        self._known({group: None})
        return self.convolutions[group].weight.detach().flatten(1).t()

    def shrink(self, plan: Plan) -> nn.Module:
        """Return a network whose cut convolutions are `ColumnConv2d`; one that keeps all columns stays as it is."""
        self.check(plan)
        cut = {
            id(conv): ColumnConv2d(conv, torch.tensor(plan.keep[name], device=conv.weight.device))
            for name, conv in self.convolutions.items()
            if len(plan.keep[name]) < plan.sizes[name]
        }
        return copy.deepcopy(self.net, dict(cut))

    def cut(self, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the columns of what has the shape of a cut kernel, [out, C, kh, kw] -> [out, kept]."""
        self.check(plan)
        kept = {f"{name}.weight": plan.keep[name] for name in plan.keep if len(plan.keep[name]) < plan.sizes[name]}
        return {name: t.flatten(1)[:, list(kept[name])] if name in kept else t for name, t in tensors.items()}


def _cost(products: Sequence[Product], convolutions: Mapping[str, nn.Conv2d]) -> Cost:
    """Let convolutions read their columns, and the other layers as many channels as ever."""
    index = {name: i for i, name in enumerate(convolutions)}
    reads = np.zeros((len(products), len(index)), dtype=np.int64)
    fixed, per_pair = np.zeros(len(products), dtype=np.int64), np.zeros(len(products), dtype=np.int64)
    for row, product in enumerate(products):
        if product.module in index:
            reads[row, index[product.module]] = 1
            kernel = convolutions[product.module].kernel_size
            per_pair[row] = product.macs // (kernel[0] * kernel[1])  # output positions
        else:
            fixed[row] = 1 if product.reads is None else len(product.reads)
            per_pair[row] = product.macs
    return Cost(
        per_pair=per_pair,
        reads=reads,
        reads_fixed=fixed,
        writes=np.zeros_like(reads),
        writes_fixed=np.array([len(p.writes) for p in products], dtype=np.int64),
        conv=np.array([p.kind == "conv" for p in products]),
    )
