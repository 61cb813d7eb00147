"""DropNet: Reducing Neural Network Complexity via Iterative Pruning (Tan & Motani, ICML 2020, arXiv 2207.06646).

Train, drop the units that are least active, go back to the first weights, and do it again: a lottery ticket of whole
nodes and filters.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab._checks import FRACTION, check_fields, integer, one_of
from prunelab._modes import evaluating
from prunelab.data import Data
from prunelab.methods.base import Pruned
from prunelab.models import reinitialise
from prunelab.scores import IMAGES_AT_A_TIME
from prunelab.structure import Budget, ChannelSpace, Plan, Space
from prunelab.structure.maps import mean_over_maps
from prunelab.structure.space import Scores, portion
from prunelab.training import Context, Hook, State

Metric = Literal["minimum", "maximum", "random", "minimum_layer", "maximum_layer", "random_layer"]
Weights = Literal["initial", "fresh"]
Split = Literal["train", "val", "test"]

APART = 20  # between the seeds of the first weights and of fresh ones, as in the released code


@dataclass(frozen=True)
class DropNet:
    """In cycles, drop the fraction p of the units left, by their activity, and train the rest from the first weights.

    The activity of a filter f whose maps have r pixels, over t training images x_j (a node has r = 1), is

        E(f) = 1/(t·r) · Σ_j Σ_a |V(a | x_j)|,

    with values V behind the activation, of the whole training split, without augmentation. "minimum" drops the units of
    least E, "maximum" those of largest, "random" any; by themselves these compare all units of the network, with
    "_layer" those of each layer. The paper recommends "minimum", and "minimum_layer" for larger plain networks.

    A cycle drops k = max(1, ⌊p·n⌋) of n units, or of the n of each layer; equal ones at random, and the last of a layer
    never, though nothing protects it in the released code. Units go physically. One of a residual stream goes in all
    layers of the sum; the paper masks each layer alone, and the shortcut still carries the channel. So the fraction of
    units that the paper reports is not that of the MACs.

    The first cycle's training is the dense network's own. Our cycles end with the one that meets the budget, which
    drops no more than is needed; the paper's, when validation accuracy falls to κ times the dense one's (in the
    released code: when a tenth of the units is left). The result is the last network with its weights of before any
    training, to be trained as the dense one was. Units that would save nothing of the budget stay: under a budget of
    convolution MACs, hidden linear layers, such as that of the paper's Model C.

    metric: one of the six above. Random ones need no training between the cycles.
    p: fraction of the units left that a cycle drops, in (0, 1]; 0.2 in the paper, 0.5 on Tiny-ImageNet.
    j: length of a cycle's training, in (0, 1], as a fraction of the dense network's, whose recipe and batches it has.
        The paper trains every cycle in full, j = 1; a short training ranks units at a tenth of the cost.
    patience: epochs without a lower validation loss after which a cycle's training ends, >= 1; the last weights stay.
    weights: "initial", reset to the first ones; "fresh", the control: the same units, with weights drawn anew.

    Raises ValueError naming the field, its value and the legal values; when called, for a context without the initial
    network or the dense recipe, and for a budget that one unit in each layer exceeds.
    `Pruned.history` has "units" and "cost": the fractions of the units that can go and of the budget's cost (MACs, ...)
    that are left after each cycle; "activity": E of the units left before each, {layer: [units]}, if it was measured.
    """

    name: ClassVar[str] = "dropnet"

    metric: Metric = "minimum"
    p: float = 0.2
    j: float = 0.1
    patience: int = 5
    weights: Weights = "initial"

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(
            self,
            self.name,
            metric=one_of(get_args(Metric)),
            p=FRACTION,
            j=FRACTION,
            patience=integer(1),
            weights=one_of(get_args(Weights)),
        )

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Run the cycles, and return the last network before its training."""
        if context.initial is None or context.dense is None:
            raise ValueError("dropnet: needs the initial network and the dense recipe: Context(initial=..., dense=...)")
        space = ChannelSpace(context.initial, context.data.example)
        layers = droppable(space, budget)
        spent = space.spent(budget)
        if (least := spent(space.widths(dict.fromkeys(layers, 1)))) > budget.fraction:
            raise ValueError(
                f"dropnet: budget {budget.cost}={budget.fraction} cannot be met: one unit in each of "
                f"{', '.join(layers)} keeps {least:.4f} of the {budget.what}"
            )
        recipe = dataclasses.replace(context.dense, epochs=self.j * context.dense.epochs)
        stop = EarlyStopping(context.data, self.patience)
        draw = np.random.default_rng(context.seed)
        history: dict[str, list[object]] = {"units": [], "cost": [], "activity": []}
        plan, trained, epochs = space.plan({}), net, 0.0
        while spent(space.widths(plan)) > budget.fraction:
            scores: Scores = {layer: torch.zeros(plan.widths[layer]) for layer in layers}
            if self._sign:
                if history["units"]:
                    trained = space.shrink(plan)
                    epochs += context.train(trained, recipe, stop, self.name).epochs
                found = activity(ChannelSpace(trained, context.data.example), _images(context.data))
                history["activity"].append({layer: found[layer] for layer in layers})
                scores = {layer: self._sign * found[layer] for layer in layers}
            plan = self._drop(space, plan, scores, budget, draw)
            history["units"].append(sum(plan.widths[n] for n in layers) / sum(plan.sizes[n] for n in layers))
            history["cost"].append(spent(space.widths(plan)))
        small = space.shrink(plan)
        if self.weights == "fresh":
            reinitialise(small, context.seed + APART)
        return Pruned(small, plan, epochs, history, context.dense)

    @property
    def _sign(self) -> int:
        """What the activity is multiplied by to be a score."""
        return {"minimum": 1, "maximum": -1, "random": 0}[self.metric.removesuffix("_layer")]

    def _drop(self, space: Space, plan: Plan, scores: Scores, budget: Budget, draw: np.random.Generator) -> Plan:
        """Drop a cycle's units, or as few of them as meet the budget."""
        order = dropped(scores, self.p, by_layer=self.metric.endswith("_layer"), draw=draw)
        spent = space.spent(budget)

        def meets(count: int) -> bool:
            lost = Counter(layer for layer, _ in order[:count])
            widths = {layer: width - lost[layer] for layer, width in plan.widths.items()}
            return spent(space.widths(widths)) <= budget.fraction

        count = bisect_left(range(len(order)), True, key=meets)
        return without(space, plan, order[:count])


def activity(space: Space, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the mean absolute value behind the activation of every unit, E(f), {group: float64 [size]}.

    `prunelab.structure.maps` says where the maps are seen, and what is illegal. The released code takes the absolute
    value of a map's mean; where no value is negative, as behind a ReLU, that is the same.

    Args:
        space: of the trained network.
        batches: normalised images, float [N, C, H, W], on the network's device.
    """
    return mean_over_maps(space, lambda maps: maps.abs().mean(dim=(2, 3)), batches)


def dropped(scores: Scores, p: float, *, by_layer: bool, draw: np.random.Generator) -> list[tuple[str, int]]:
    """Return the units, as (layer, number), that a cycle drops, those of least score first.

    Of n units max(1, ⌊p·n⌋) go, in exact arithmetic, and equal ones at random; by layer, as many of each layer, by
    turns in proportion. The best of a layer never goes.

    Args:
        scores: of the units that are left, {layer: [units]}.
        p: fraction, in (0, 1].
        by_layer: compare units of the same layer only.
        draw: decides between equal units.
    """
    units = pd.DataFrame(
        [(layer, unit, value) for layer, score in scores.items() for unit, value in enumerate(score.tolist())],
        columns=["layer", "unit", "score"],
    )
    units = units.iloc[draw.permutation(len(units))].sort_values("score", kind="stable")
    units["place"] = units.groupby("layer").cumcount() + 1
    units["size"] = units.groupby("layer").unit.transform("size")
    may_go = units[units.place < units["size"]]
    if by_layer:
        turn = may_go.place / may_go["size"].map(lambda size: _count(size, p))
        chosen = may_go.iloc[turn.argsort(kind="stable")].iloc[: int((turn <= 1).sum())]
    else:
        chosen = may_go.iloc[: _count(len(units), p)]
    return list(zip(chosen.layer.tolist(), chosen.unit.tolist(), strict=True))


def without(space: Space, plan: Plan, units: Iterable[tuple[str, int]]) -> Plan:
    """Return a plan that keeps less: without those units of the cut network, as (layer, number)."""
    lost = set(units)
    return space.plan(
        {
            layer: [unit for number, unit in enumerate(kept) if (layer, number) not in lost]
            for layer, kept in plan.keep.items()
        }
    )


def droppable(space: ChannelSpace, budget: Budget) -> list[str]:
    """Return the groups whose units save something of the multiply-adds that a budget counts."""
    costs, whole = space.cost(space.one_less, budget.scope), space.macs(scope=budget.scope)
    return [group.name for group, cost in zip(space.groups, costs.tolist(), strict=True) if cost < whole]


def oracle(space: Space, data: Data) -> dict[str, Tensor]:
    """Score each unit by the training loss without it, {group: float64 [size]}: the paper's greedy oracle.

    The trained weights of the others stay as they are. It costs a pass over the training images for every unit, so it
    is for small networks; least goes first, as with every score.
    """
    loss = torch.empty(int(space.sizes.sum()), dtype=torch.float64)
    for unit in range(len(loss)):
        without_it = copy.deepcopy(space.net)
        space.apply_gates(without_it, (torch.arange(len(loss)) != unit).float())
        loss[unit] = mean_loss(without_it, data, "train")
    return space.by_group(loss)


def mean_loss(net: nn.Module, data: Data, split: Split) -> float:
    """Return the mean cross entropy over a split, with the network in evaluation mode."""
    with evaluating(net), torch.no_grad():
        losses = [F.cross_entropy(net(x), labels, reduction="sum") for x, labels in data.batches(split, 1024)]
    return float(torch.stack(losses).sum()) / len(getattr(data, split).labels)


class EarlyStopping(Hook):
    """End a training when the validation loss, taken after every epoch, has not fallen for `patience` epochs."""

    def __init__(self, data: Data, patience: int) -> None:
        self.data, self.patience = data, patience

    def start(self, state: State) -> None:
        """Forget what was before."""
        self.best, self.waited = math.inf, 0

    def after_step(self, state: State) -> None:
        """Measure at the end of an epoch."""
        if (state.step + 1) % state.steps_per_epoch == 0:
            loss = mean_loss(state.net, self.data, "val")
            self.waited = 0 if loss < self.best else self.waited + 1
            self.best = min(self.best, loss)
            state.stop = self.waited >= self.patience


def _count(size: int, p: float) -> int:
    return max(1, portion(size, p))


def _images(data: Data) -> Iterable[Tensor]:
    return (images for images, _ in data.batches("train", IMAGES_AT_A_TIME))
