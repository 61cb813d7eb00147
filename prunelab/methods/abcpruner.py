"""Channel Pruning via Automatic Structure Search (Lin et al., IJCAI 2020, arXiv 2001.08565): ABCPruner.

A structure says how wide each layer is, in tenths. An artificial bee colony searches for the structure whose network,
with filters inherited from the trained one, is the most accurate after a short training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from prunelab import scores as criteria
from prunelab._arrays import Ints
from prunelab._checks import FRACTION, Legal, check_fields, integer, one_of, real
from prunelab.methods.base import Pruned
from prunelab.structure import Budget, ChannelSpace, Plan
from prunelab.structure.space import Scores
from prunelab.training import Context, evaluate, fit, recalibrate

Inherit = Literal["random", "l1", "none"]
Code = Ints

RECALIBRATION = 4  # batches
APART = 100  # between the seeds of two evaluations, so that no training repeats the batches of another


@dataclass(frozen=True)
class ABCPruner:
    """Search the widths with a bee colony; what each layer keeps is drawn at random from the trained filters.

    A food source is a code: tenths, 1 to 10·α, one per layer. Its fitness is the accuracy on validation images after a
    short training, on test images in the released code. Batch norm is recalibrated before it is measured: after a few
    steps its running statistics are still those of the dense network. In each cycle every source is changed once by its
    employed bee,

        G_i = C_ji + r·(C_ji − C_gi),  r ~ U(−1, 1),  g ≠ j,

    at `changed` random places, rounded to the nearest tenth and clipped, and kept if it is fitter; an onlooker does the
    same with probability P_j = 0.9·fit_j / max fit + 0.1; the source that has failed most often, if more than `limit`
    times, is drawn anew by a scout. The best source, with the weights after its short training, is the result.

    In the paper α alone bounds the size and there is no target. That is what a budget of 1 gives. Under any other
    budget a code stands for proportions: the widest network whose layers are in these proportions and within the
    budget. Residual streams stay whole. Batch norm is inherited with its filters, which the released code does not do.

    Every other group of filters has a tenth of its own. The released code has fewer: one for both inner convolutions of
    a bottleneck, none for ResNet-50's first convolution and for VGG-16's hidden linear layer, 16 and 13 for these two
    networks instead of our 33 and 14, and 9 for GoogLeNet, whose modules keep the width of their outputs. And that only
    one source is drawn anew in a cycle is the released code's rule: the paper draws every source anew that has failed
    more than `limit` times.

    alpha: α, the largest fraction of a layer that is kept, in tenths from 0.1 to 1.
    sources: n >= 1, and >= 2 if there are cycles. Accounts of the paper have 2, 3 and 2 for T,
        n and M, in an order that is not certain; the released code's defaults are 10, 10 and 5.
    cycles: T >= 0. With 0 the best of n random structures is the result, the control.
    limit: M >= 0 failures in a row after which a source is given up.
    changed: layers that a bee changes, >= 1; 2 in the released code.
    inherit: "random" filters, those of largest "l1" norm, or "none": the initial weights, before any training.
    share: of the context's epochs, in (0, 1], that the search may take, in equal parts for at most n + T·(2n + 1)
        trainings. The released code takes two epochs for each.

    Raises ValueError naming the field, its value and the legal values; when called, for a budget that is out of reach:
    because of α, naming what α allows, or because one unit of each layer must stay.
    `Pruned.history` has "fitness": of every structure tried, in order, in percent; "best": of the best so far; "codes":
    int [tried, layers]; "layers": their names.
    """

    name: ClassVar[str] = "abcpruner"

    alpha: float = 1.0
    sources: int = 3
    cycles: int = 2
    limit: int = 2
    changed: int = 2
    inherit: Inherit = "random"
    share: float = 0.5

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(
            self,
            self.name,
            alpha=real("one of 0.1, 0.2, ..., 1", [tenths / 10 for tenths in range(1, 11)].__contains__),
            cycles=integer(0),
            sources=Legal(
                "an integer >= 1, or >= 2 with cycles", lambda count: integer(2 if self.cycles else 1).accepts(count)
            ),
            limit=integer(0),
            changed=integer(1),
            inherit=one_of(get_args(Inherit)),
            share=FRACTION,
        )

    @property
    def evaluations(self) -> int:
        """The largest number of structures that a search tries."""
        return self.sources + self.cycles * (2 * self.sources + 1)

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Search, and return the fittest network."""
        space = ChannelSpace(self._weights(net, context), context.data.example)
        draw = np.random.default_rng(context.seed)
        structures = Structures(space, budget, self.alpha, self.inherit, draw)
        epochs = self.share * context.recipe.epochs / self.evaluations
        with tqdm(total=self.evaluations, desc=self.name, leave=False, disable=not context.progress) as bar:
            fitness_of = _Fitness(structures, context, epochs, bar.update)
            Colony(len(structures.layers), round(10 * self.alpha), self, fitness_of, draw).search()
        best = max(fitness_of.tried, key=lambda source: source.fitness)
        fitness = [source.fitness for source in fitness_of.tried]
        history = {
            "fitness": fitness,
            "best": np.maximum.accumulate(fitness).tolist(),
            "codes": np.stack([source.code for source in fitness_of.tried]),
            "layers": structures.layers,
        }
        return Pruned(best.net, best.plan, fitness_of.epochs, history)

    def _weights(self, net: nn.Module, context: Context) -> nn.Module:
        if self.inherit != "none":
            return net
        if context.initial is None:
            raise ValueError("abcpruner: inherit='none' needs a context with the initial network")
        return copy.deepcopy(context.initial)


@dataclass
class Source:
    """A food source: a structure, the network that it stands for, and how good that turned out to be."""

    code: Code
    plan: Plan
    net: nn.Module
    fitness: float
    trials: int = field(default=0)


class Structures:
    """What codes stand for in one network: plans within the budget.

    Attributes:
        layers: the groups that the search decides on, all but residual streams.
    """

    def __init__(
        self, space: ChannelSpace, budget: Budget, alpha: float, inherit: Inherit, draw: np.random.Generator
    ) -> None:
        self.space, self.budget, self.inherit, self.draw = space, budget, inherit, draw
        self.layers = tuple(group.name for group in space.groups if not space.is_sum(group.name))
        if not self.layers:
            raise ValueError(f"abcpruner: {type(space.net).__name__} has no layer outside its residual streams")
        self.most = {name: _tenths(space, name, round(10 * alpha)) for name in self.layers}
        widest = space.spent(budget)(space.widths(self.most))
        if budget.fraction < 1 and widest < budget.fraction:
            raise ValueError(
                f"abcpruner: alpha is {alpha}, which keeps {widest:.4f} of the {budget.what} at most; "
                f"the budget is {budget.fraction}: raise alpha or lower the budget"
            )

    def plan(self, code: Code) -> Plan:
        """Return the plan of a code, with filters chosen by `inherit`."""
        tenths = dict(zip(self.layers, code.tolist(), strict=True))
        order = self._order()
        if self.budget.fraction == 1:
            return self.space.plan_for(order, {name: _tenths(self.space, name, n) for name, n in tenths.items()})
        scores = criteria.proportional(tenths, order)
        for name, most in self.most.items():
            scores[name][order[name].argsort(descending=True, stable=True)[most:]] = -math.inf
        widths = self.space.plan_for(scores, self.budget, ranking="global").widths
        return self.space.plan_for(order, {name: min(widths[name], most) for name, most in self.most.items()})

    def _order(self) -> Scores:
        if self.inherit == "l1":
            return self.space.scores("l1")
        return self.space.scores(criteria.random(int(self.draw.integers(2**31))))


class Colony:
    """An artificial bee colony over codes of `length` tenths from 1 to `most`; `evaluate` makes a source of a code."""

    def __init__(
        self,
        length: int,
        most: int,
        settings: ABCPruner,
        evaluate: Callable[[Code], Source],
        draw: np.random.Generator,
    ) -> None:
        self.length, self.most, self.settings = length, most, settings
        self.evaluate, self.draw = evaluate, draw
        self.sources: list[Source] = []

    def search(self) -> None:
        """Run all cycles."""
        self.sources = [self.evaluate(self.random_code()) for _ in range(self.settings.sources)]
        for _ in range(self.settings.cycles):
            self.employed()
            self.onlookers()
            self.scout()

    def employed(self) -> None:
        """Let every source be tried at a neighbouring place."""
        for j in range(len(self.sources)):
            self.improve(j)

    def onlookers(self) -> None:
        """Let fit sources be tried again, with probability 0.9·fit_j / max fit + 0.1."""
        fitness = np.array([source.fitness for source in self.sources])
        chance = 0.9 * fitness / max(fitness.max(), np.finfo(float).tiny) + 0.1
        for j in np.flatnonzero(self.draw.random(len(fitness)) < chance):
            self.improve(int(j))

    def scout(self) -> None:
        """Give up the source that has failed most often, if that is more than `limit` times."""
        worn = max(range(len(self.sources)), key=lambda j: self.sources[j].trials)
        if self.sources[worn].trials > self.settings.limit:
            self.sources[worn] = self.evaluate(self.random_code())

    def improve(self, j: int) -> None:
        """Move one source towards or away from another, and keep the better of the two places."""
        found = self.evaluate(self.neighbour(j))
        if found.fitness > self.sources[j].fitness:
            self.sources[j] = found
        else:
            self.sources[j].trials += 1

    def neighbour(self, j: int) -> Code:
        """Return the code of source j, changed at some places."""
        g = int(self.draw.choice([k for k in range(len(self.sources)) if k != j]))
        code, other = self.sources[j].code.copy(), self.sources[g].code
        places = self.draw.choice(self.length, min(self.settings.changed, self.length), replace=False)
        r = self.draw.uniform(-1, 1, len(places))
        moved = code[places] + r * (code[places] - other[places])
        code[places] = np.clip(np.rint(moved), 1, self.most).astype(np.int64)
        return code

    def random_code(self) -> Code:
        """Draw every tenth uniformly."""
        return self.draw.integers(1, self.most + 1, self.length)


class _Fitness:
    """Trains the network of a code for a while and measures it; keeps all that were tried."""

    def __init__(self, structures: Structures, context: Context, epochs: float, tick: Callable[[], object]) -> None:
        steps = epochs * context.steps_per_epoch
        if steps < 1:
            raise ValueError(f"abcpruner: a training gets {steps:.2f} steps: raise share, or lower sources or cycles")
        self.structures, self.context, self.tick = structures, context, tick
        self.recipe = context.constant(epochs, context.recipe.lr)
        self.epochs = 0.0
        self.tried: list[Source] = []

    def __call__(self, code: Code) -> Source:
        plan = self.structures.plan(code)
        net, context = self.structures.space.shrink(plan), self.context
        seed = context.seed + APART * (1 + len(self.tried))
        self.epochs += fit(net, context.data, self.recipe, seed=seed, progress=False).epochs
        recalibrate(net, context.data, RECALIBRATION, context.recipe.batch_size, seed)
        self.tried.append(Source(code, plan, net, evaluate(net, context.data)))
        self.tick()
        return self.tried[-1]


def _tenths(space: ChannelSpace, group: str, tenths: int) -> int:
    """Return floor(C·tenths/10) of a group of C units, as in the released code, and at least 1."""
    return max(1, len(space.units(group)) * tenths // 10)
