"""Lottery tickets of single weights, as Rethinking (Liu et al., ICLR 2019, arXiv 1810.05270) tests them.

Train, remove the smallest weights of all convolutions, and start again with what is left: from the values that it had
before training (the winning ticket), or from new ones. `prunelab.methods.scratch` has the tickets of whole filters. A
network with single weights gone costs as many multiply-adds as before, so this is no method that meets a budget.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunelab._checks import check, within
from prunelab.structure.space import portion
from prunelab.training import Hook, State

WeightMasks = Mapping[str, Tensor]
"""For the weight of each convolution, by its name, True where it stays."""


def smallest_removed(net: nn.Module, ratio: float, masks: WeightMasks | None = None) -> WeightMasks:
    """Return masks without the fraction `ratio` of the weights of least |w| that are still there, network-wide.

    Rounds compound, as in the released code: twice 0.5 leaves a quarter. Of n weights ⌊ratio · n⌋ go, in exact
    arithmetic; among equal ones the first.

    Args:
        net: a trained network.
        ratio: in [0, 1).
        masks: what earlier rounds left; None: everything.

    Raises:
        ValueError: the ratio is not in [0, 1), or there is no convolution.
    """
    check("ratio", ratio, within("[0, 1)"))
    weights = convolutions(net)
    masks = masks or {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    sizes = torch.cat([torch.where(masks[name], w.abs(), torch.inf).flatten() for name, w in weights.items()])
    present = int(sizes.isfinite().sum())
    gone = sizes.argsort(stable=True)[: portion(present, ratio)]
    kept = sizes.isfinite().index_fill(0, gone, False).split([weight.numel() for weight in weights.values()])
    return {name: part.view_as(weights[name]) for name, part in zip(weights, kept, strict=True)}


def ticket(initial: nn.Module, masks: WeightMasks) -> nn.Module:
    """Return the winning ticket: a copy of the network before its training, zero where the masks are False."""
    net = copy.deepcopy(initial)
    for name, weight in convolutions(net).items():
        weight.mul_(masks[name])
    return net


def redrawn(initial: nn.Module, masks: WeightMasks, seed: int) -> nn.Module:
    """Return the control: the ticket with new weights in its convolutions, w ~ N(0, 2·C_in / weights that stay).

    That is He et al.'s variance, 2 over the fan-out, for the fan-out that is left. Everything else is as at the start.
    """
    net, generator = copy.deepcopy(initial), torch.Generator().manual_seed(seed)
    for name, weight in convolutions(net).items():
        fan_out = max(1, int(masks[name].sum())) / weight.shape[1]
        drawn = math.sqrt(2 / fan_out) * torch.randn(weight.shape, generator=generator)
        weight.copy_(drawn.to(weight) * masks[name])
    return net


class Masked(Hook):
    """Keeps removed weights at zero through a training.

    The released code derives the mask anew in each step, as weight ≠ 0, and applies it to the gradient: a weight that
    passes through exactly 0 is lost. Here the masks are fixed and applied after each step.
    """

    def __init__(self, masks: WeightMasks) -> None:
        self.masks = masks

    def start(self, state: State) -> None:
        """Look up the weights once, and remove what the masks remove."""
        self.weights = convolutions(state.net)
        self.after_step(state)

    def after_step(self, state: State) -> None:
        """Set what is removed back to zero."""
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])


def convolutions(net: nn.Module) -> dict[str, Tensor]:
    """Return the weights of all convolutions by name, detached.

    Raises:
        ValueError: there is none.
    """
    found = {f"{name}.weight": m.weight.detach() for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    if not found:
        raise ValueError(f"{type(net).__name__} has no convolution: there is nothing to remove")
    return found
