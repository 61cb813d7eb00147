"""Rethinking the Value of Network Pruning (Liu et al., ICLR 2019, arXiv 1810.05270): does a cut network need its past?

Cut a network as ever, and keep the widths alone. Trained from random weights, is it as good as fine-tuned? `Scratch`
trains the small network from its beginning, `FineTune` is the fine-tuning that the paper compares with.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import nn

from prunelab import scores as criteria
from prunelab._checks import POSITIVE, check_fields, one_of, optional, real
from prunelab.methods.base import Pruned
from prunelab.models import reinitialise
from prunelab.structure import Budget, ChannelSpace, Plan
from prunelab.structure.space import Scores
from prunelab.training import Context, Recipe, Schedule

Widths = Literal["uniform", "scales", "random"]
Weights = Literal["fresh", "initial"]
Length = Literal["E", "B"]

APART = 100  # between the seeds of the dense network's weights and of fresh ones
LEAST = 0.1  # random widths are proportions from this to 1, as an ABCPruner structure has


@dataclass(frozen=True)
class Scratch:
    """Train a network of the widths that pruning leaves from its beginning, instead of fine-tuning what is left.

    Residual streams stay whole, as in the ResNets of the paper whose widths are predefined.

    widths: "uniform", the paper's predefined target: the same fraction of every layer; "scales", an automatic target:
        one threshold for the |γ| of the whole trained network, slimming's rule without its penalty; "random": drawn
        anew for every seed, our control.
    schedule: "E", as many epochs as the dense training had; "B", as much computation: ⌊E · MACs / MACs left⌋. The
        recipe stays, and with it the fractions of the run at which the learning rate falls, which the released code
        rounds to epochs. MACs are those of convolutions and linear layers; the released code also counts batch norm,
        activations and pools.
    cap: the most that "B" may train, in multiples of "E", >= 1: 2 for the predefined widths on ImageNet, `math.inf` in
        the released CIFAR code and for automatic ones.
    weights: "fresh", drawn anew by the context's seed, convolutions as in the released code, linear layers as PyTorch
        does and γ = 1 (there N(0, 0.01), and 0.5 in VGGs); "initial", a lottery ticket: the filters that L1 (or their
        scales) kept after training start from the values that they had before it.
    lr: peak learning rate, > 0; None: the dense training's.

    Raises ValueError naming the field, its value and the legal values; when called, for a budget that cannot be met,
    and for a context that does not tell how the dense network was trained or, where needed, what it was before.
    """

    name: ClassVar[str] = "scratch"

    widths: Widths = "uniform"
    schedule: Length = "E"
    cap: float = 2.0
    weights: Weights = "fresh"
    lr: float | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(
            self,
            self.name,
            widths=one_of(get_args(Widths)),
            schedule=one_of(get_args(Length)),
            cap=real("a number >= 1", lambda cap: cap >= 1),
            weights=one_of(get_args(Weights)),
            lr=optional(POSITIVE),
        )

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Cut, forget the weights, and say how to train."""
        if context.dense is None:
            raise ValueError("scratch: it has to know how the dense network was trained: Context(dense=...)")
        before = net if self.weights == "fresh" else context.initial
        if before is None:
            raise ValueError("scratch: weights='initial' needs the initial network: Context(initial=...)")
        space = ChannelSpace(net, context.data.example)
        plan = plan_of(space, self.widths, budget, context.seed)
        small = ChannelSpace(before, context.data.example).shrink(plan)
        if self.weights == "fresh":
            reinitialise(small, context.seed + APART)
        return Pruned(small, plan, recipe=self.recipe(context.dense, space.macs() / space.macs(plan)))

    def recipe(self, dense: Recipe, ratio: float) -> Recipe:
        """Return how to train a network of `ratio` times fewer MACs, given how the dense one was trained."""
        factor = min(ratio, self.cap) if self.schedule == "B" else 1.0
        epochs = max(dense.epochs, math.floor(dense.epochs * factor))
        return dataclasses.replace(dense, epochs=epochs, lr=self.lr or dense.lr)


@dataclass(frozen=True)
class FineTune:
    """Cut in one shot, inherit the weights, and fine-tune for the context's epochs, at a rate of its own.

    The defaults are the paper's: a small constant rate, which later work found far too small. With the dense training's
    `lr` and `schedule` that training is restarted.

    widths: as of `Scratch`; the filters that stay are those of largest L1 norm, and with "scales" of largest |γ|.
    lr: (peak) learning rate, > 0.
    schedule: of the rate, as in `prunelab.training.learning_rate`.

    Raises ValueError naming the field, its value and the legal values; when called, for a budget that cannot be met.
    """

    name: ClassVar[str] = "finetune"

    widths: Widths = "uniform"
    lr: float = 1e-3
    schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self, self.name, widths=one_of(get_args(Widths)), lr=POSITIVE, schedule=one_of(get_args(Schedule)))

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Cut, keep the weights, and say how to train."""
        space = ChannelSpace(net, context.data.example)
        plan = plan_of(space, self.widths, budget, context.seed)
        recipe = dataclasses.replace(context.recipe, lr=self.lr, schedule=self.schedule)
        return Pruned(space.shrink(plan), plan, recipe=recipe)


def plan_of(space: ChannelSpace, widths: Widths, budget: Budget, seed: int) -> Plan:
    """Return what stays: widths by the given rule, and in each layer the best filters.

    Raises:
        ValueError: the budget cannot be met, or a layer has no scale.
    """
    scores: Scores = space.scores("bn_scale" if widths == "scales" else "l1")
    if widths == "random":
        draw = torch.Generator().manual_seed(seed)
        shares = LEAST + (1 - LEAST) * torch.rand(len(space.groups), generator=draw)
        scores = criteria.proportional(dict(zip(scores, shares.tolist(), strict=True)), scores)
    whole = {name: torch.full_like(score, torch.inf) for name, score in scores.items() if space.is_sum(name)}
    return space.plan_for({**scores, **whole}, budget, "layer" if widths == "uniform" else "global")
