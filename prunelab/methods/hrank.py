"""HRank: Filter Pruning using High-Rank Feature Map (Lin et al., CVPR 2020): filters whose maps have low rank go."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from prunelab import scores as criteria
from prunelab._checks import POSITIVE, check_fields, check_shares, integer, one_of, within
from prunelab.masks import Masks
from prunelab.methods.base import Pruned
from prunelab.structure import Budget, ChannelSpace, Plan
from prunelab.structure.space import portion
from prunelab.training import Context

Selection = Literal["highest", "lowest", "random"]

MILESTONES = 5 / 30, 10 / 30  # where the published code divides the learning rate by 10 in a layer's training


@dataclass(frozen=True)
class HRank:
    """Keep the filters whose maps have the highest average rank, r_j = 1/g · Σ_t Rank(o_j(I_t)) over g images.

    The maps o_j lie behind batch norm and ReLU; those of the last convolution of a residual block, behind the sum.
    (The published code takes those of ResNet-50's first convolution behind the max pool.) The ranks are taken once, on
    the trained network, and fix what goes. Then, from input to output, one layer after the other loses its filters and
    the network is trained. Of equal ranks, the earlier filter stays. Where several layers write a unit, they lose the
    same filters, by the mean of the ranks in all places. Hidden linear layers stay whole; a VGG's
    last convolution, which the paper never prunes, is cut like the others: give it the rate 0. The published code keeps
    each layer's best epoch on the test images; here the last one counts.

    g: images, >= 1, drawn and augmented as in training; 640 in the published code, 500 are ours.
    selection: which filters stay: those of "highest" rank; as controls those of "lowest", or "random" ones, drawn by
        the context's seed.
    rates: {group: fraction to remove, in [0, 1)}, the paper's compress rate: floor(rate·C) of C filters go, in exact
        arithmetic; groups not named stay whole, and the budget is an upper bound. None: the same fraction everywhere,
        as the budget asks.
    share: of the context's epochs, in [0, 1], that the layers get in equal parts. With 0 all filters go at once, and
        the training is left to the caller: HRankPlus.
    lr: learning rate of a layer's training, > 0; a tenth of it after one sixth, a hundredth after one third.

    Raises ValueError naming a field, its value and the legal values. A call raises it for more images than there are, a
    share of less than one update a layer, rates of unknown groups or above the budget, and for layers to be pruned
    whose maps never have a rank above 1, as they have one pixel or are constant: there, rank tells nothing.

    `Pruned.epochs` counts an image whose ranks are taken like one trained on. `Pruned.history` has "scores", {group:
    [size]}: r, or -r for "lowest", or random numbers; and "gaps", {pruned group: lowest score that stays - highest that
    goes}.
    """

    name: ClassVar[str] = "hrank"

    g: int = 500
    selection: Selection = "highest"
    rates: Mapping[str, float] | None = None
    share: float = 0.5
    lr: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(
            self,
            self.name,
            g=integer(1),
            selection=one_of(get_args(Selection)),
            share=within("[0, 1]"),
            lr=POSITIVE,
        )
        check_shares("hrank: rates", self.rates, within("[0, 1)"))

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Prune a copy of the network, layer by layer."""
        space = ChannelSpace(copy.deepcopy(net), context.data.example)
        widths = self._widths(space, budget)
        layers = [group.name for group in space.groups if widths[group.name] < group.size]
        steps = self._steps(len(layers), context)
        scores, epochs = self._scores(space, layers, context)
        plan = space.plan_for(scores, widths)
        seeds = torch.randint(2**31, (len(layers),), generator=torch.Generator().manual_seed(context.seed)).tolist()
        for number, seed in enumerate(seeds if steps else (), start=1):
            so_far = space.plan({layer: plan.keep[layer] for layer in layers[:number]})
            epochs += self._train(space, so_far, steps, seed, context)
        return Pruned(space.shrink(plan), plan, epochs, {"scores": scores, "gaps": gaps(scores, plan)})

    def _widths(self, space: ChannelSpace, budget: Budget) -> dict[str, int]:
        """Return how many filters of each group stay."""
        if self.rates is None:
            hidden = [group.name for group in space.groups if not _convolves(space, group.name)]
            return dict(space.plan_for(criteria.alike(space, hidden), budget).widths)
        sizes = {group.name: group.size for group in space.groups}
        space.widths(dict.fromkeys(self.rates, 1))  # refuses unknown groups
        widths = sizes | {group: sizes[group] - removed(sizes[group], rate) for group, rate in self.rates.items()}
        kept = space.spent(budget)(space.widths(widths))
        if kept > budget.fraction:
            raise ValueError(f"hrank: rates keep {kept:.4f} of the {budget.what}; the budget is {budget.fraction}")
        return widths

    def _steps(self, layers: int, context: Context) -> int:
        """Return the training steps for each layer."""
        if self.share == 0 or layers == 0:
            return 0
        steps = int(self.share * context.recipe.epochs * context.steps_per_epoch) // layers
        if steps < 1:
            epochs = f"{context.recipe.epochs} epochs"
            raise ValueError(
                f"hrank: share is {self.share}: of {epochs} that is not one update for each of {layers} layers"
            )
        return steps

    def _scores(self, space: ChannelSpace, layers: list[str], context: Context) -> tuple[dict[str, Tensor], float]:
        """Score all units, high stays; and return the fraction of the training images that were looked at."""
        if self.selection == "random":
            return dict(space.scores(criteria.random(context.seed))), 0.0
        available = len(context.data.train.labels)
        if self.g > available:
            raise ValueError(f"hrank: g is {self.g}; {context.data.name} has {available} training images")
        images, _ = next(context.data.batches("train", self.g, torch.Generator().manual_seed(context.seed)))
        ranks = space.scores(criteria.feature_rank(images))
        if blind := [layer for layer in layers if ranks[layer].max() <= 1]:
            raise ValueError(
                f"hrank: no feature map of {', '.join(blind)} has a rank above 1: maps of one pixel, or constant ones, "
                "cannot be told apart by rank; leave such layers whole, by naming the others in `rates`"
            )
        sign = 1 if self.selection == "highest" else -1
        return {group: sign * rank for group, rank in ranks.items()}, self.g / available

    def _train(self, space: ChannelSpace, plan: Plan, steps: int, seed: int, context: Context) -> float:
        """Train with what is pruned so far at zero, and return the epochs."""
        epochs = steps / context.steps_per_epoch
        phase = dataclasses.replace(context.recipe, epochs=epochs, schedule="step", milestones=MILESTONES, lr=self.lr)
        return context.train(space.net, phase, Masks(space, plan), self.name, seed).epochs


def _convolves(space: ChannelSpace, group: str) -> bool:
    """Whether a convolution writes the group."""
    return any(
        isinstance(space.net.get_submodule(axis.module), nn.Conv2d | nn.ConvTranspose2d)
        for axis in space.writers(group)
    )


def removed(filters: int, rate: float) -> int:
    """Return floor(rate·filters), how many go, in exact arithmetic."""
    return portion(filters, rate)


def gaps(scores: Mapping[str, Tensor], plan: Plan) -> dict[str, float]:
    """Return, for each pruned group, the lowest score that stays minus the highest that goes; 0 is a tie."""
    found = {}
    for group, kept in plan.keep.items():
        if len(kept) < plan.sizes[group]:
            stays = torch.zeros(plan.sizes[group], dtype=torch.bool)
            stays[list(kept)] = True
            found[group] = (scores[group][stays].min() - scores[group][~stays].max()).item()
    return found


# -- the published rates, and what they were said to save --------------------------------------------------------------


class Count(NamedTuple):
    """Multiply-adds, and weights of convolutions and linear layers: no biases, no batch norm."""

    macs: int
    weights: int


def count(space: ChannelSpace, rates: Mapping[str, float], narrowed: Collection[str] = ()) -> Count:
    """Count a network whose convolutions have each lost floor(rate·C) filters of their own.

    The published tables subtract a layer's own filters alone: the layer that reads them is counted with its full input
    width. Layers that share a sum lose filters of their own, so the sum has no fewer channels for those that read it.

    Args:
        space: of the whole network.
        rates: {layer: fraction of its filters to remove}.
        narrowed: layers that are counted without the inputs they have lost.
    """
    gone = {p.module: removed(len(p.writes), rates.get(p.module, 0)) for p in space.coupling.products}
    lost = np.zeros(int(space.sizes.sum()) + 1)  # the fraction that goes of a unit's group; unit -1 never goes
    for group in alone(space, rates):
        lost[space.units(group)] = gone[group] / len(space.units(group))
    macs = weights = 0
    for product in space.coupling.products:
        reads = 1 if product.reads is None else len(product.reads)
        if product.module in narrowed and product.reads is not None:
            reads = round(reads - lost[product.reads].sum())
        pairs = reads * (len(product.writes) - gone[product.module])
        macs += product.macs * pairs
        weights += space.net.get_submodule(product.module).get_parameter("weight")[0, 0].numel() * pairs
    return Count(macs, weights)


def alone(space: ChannelSpace, rates: Mapping[str, float]) -> dict[str, float]:
    """Return the rates of those layers that alone write what they write, fit for `HRank.rates`."""
    return {
        group.name: rates[group.name]
        for group in space.groups
        if group.name in rates and len(space.writers(group.name)) == 1
    }


def by_layer(space: ChannelSpace, rates: tuple[float, ...]) -> dict[str, float]:
    """Name the convolutions that published rates belong to: all of them, in the order in which they run.

    Raises:
        ValueError: there are more or fewer rates than convolutions.
    """
    convolutions = [product.module for product in space.coupling.products if product.kind == "conv"]
    if len(rates) != len(convolutions):
        raise ValueError(f"{len(rates)} rates for {len(convolutions)} convolutions: give one for each")
    return dict(zip(convolutions, rates, strict=True))


RATES: dict[str, tuple[str, tuple[float, ...]]] = {
    "vgg16-2": ("vgg16", (0.95, *[0.5] * 6, *[0.9] * 4, *[0.8] * 2)),
    "resnet56-2": (
        "resnet56",
        (0.1, *[0.6] * 35, 0, 0, *[0.6] * 6, *[0.4] * 3, *[0.1, 0.4] * 4),
    ),
    "resnet110-1": ("resnet110", (0.1, *[0.4] * 108)),
    "resnet50-2": ("resnet50", (0.2, *[0.8] * 23, *[0.55] * 19, *[0.45] * 10)),
    "densenet40-1": ("densenet40", (*(0, *[0.1] * 6, *[0.7] * 6) * 2, 0, *[0.1] * 6, *[0.7] * 5, 0)),
}
"""Published settings: the network's name for `prunelab.models.build`, and the fraction that each convolution loses.

ResNet-50's is for ImageNet, the others are for CIFAR-10. VGG-16's first row and GoogLeNet's are left out: whether their
rates say what stays or what goes has to be guessed.
"""
