"""AutoCompress (Liu et al., AAAI 2020, arXiv 1907.03141): rounds of searched rates, ADMM pruning and purification.

Simulated annealing looks for how much each layer loses, filters and columns apart; ADMM takes the weights there;
purification then removes more of what has become nearly dead.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from prunelab._arrays import Floats, Ints
from prunelab._checks import FLAG, FRACTION, POSITIVE, check_fields, integer, one_of, optional, real
from prunelab.admm import ADMM, Projection
from prunelab.data import Split
from prunelab.masks import Masks
from prunelab.methods.base import Pruned, space_of
from prunelab.purification import Measure, filled, purify
from prunelab.structure import Budget, Plan, RowColumnSpace, Space
from prunelab.training import Context, Recipe, evaluate

UNITS = "filters", "columns", "filters+columns"
APART = 100  # between the seeds of two trainings, so that none repeats the batches of another
SMALLEST = 1e-3  # rate, before rescaling, so that every group can be made to lose more


@dataclass(frozen=True)
class AutoCompress:
    """Search rates, prune by ADMM, retrain what is left, purify: round after round, each of about 2x.

    Every round has four steps of search, as a review of the paper tells: sampling an action (the rates of all groups),
    a quick evaluation, accepting or refusing it, and the decision: the best action seen is what ADMM then prunes to.
    Larger layers lose at least as large a share as smaller ones, which guides the sampling; filters and columns are
    ordered apart.

    Known are the paper's first page and that review; the training code was not released. So these are choices, some of
    them those of NNI or of the same group's ADMM code: how many rounds (each about halves the cost);
    rates from U(0, 1), changed by U(−m, m) with m = perturbation·T / start_temperature; all rates multiplied by one
    factor that takes the cost to the round's target, where NNI counts weights; T in accuracy points, falling by the
    same factor after every evaluation; ρ, from 1e-3 and times 1.3 at each update, the same group's, as AutoCompress's
    own schedule is not known; a constant learning rate; ADMM and masked retraining of equal length.

    Purification, of which thresholds and their search are not known either, first removes what has no effect: columns
    of zeros, filters that nobody reads any more or that are zero with all their parameters. Then thresholds grow, one
    factor times the mean norm of each group's units, as long as the quick accuracy falls by no more than epsilon. A
    filter's norm is its own or that of the largest column that reads it, whichever is relatively smaller, and with it
    goes the constant that its batch norm makes of it. Removed zeros are frozen; the retraining is the next round's or
    the caller's. Under a budget all that is no bonus: what purification removes, ADMM need not cut in the rounds that
    are left, which share out the rest. After the last round only what is dead can go.

    unit: "filters", "columns" of the im2col matrix, or "filters+columns". For both, see `admm.Projection`.
    rounds: >= 1, each of which must remove something; None: as many as make each about 2x.
    evaluations: >= 0 actions that a round tries; with 0 all groups lose the same share, the control.
    start_temperature, stop_temperature: T > 0 in accuracy points, falling from one to the other. Their place in
        the annealing is NNI's, where they are 100 and 20 for any metric.
    perturbation: m at the start, in (0, 1]; 0.35 in NNI.
    images: >= 1, how many validation images a quick evaluation sees; there is no other search signal.
    rho, growth, updates: ρ > 0 at the start of a round, its factor >= 1 at each of the updates >= 1 of Z and U. What ρ
        does grows with learning rate and steps, so a short training needs a larger one.
    purification: whether there is any.
    epsilon: >= 0 accuracy points that a round's purification may cost on the quick images.
    share: of the context's epochs, in (0, 1], for the training in all rounds.
    lr: constant learning rate of all that, > 0.

    Raises ValueError naming the field, its value and the legal ones; when called, before any training, for a budget
    that cannot be met, rounds that would remove nothing, and too few steps for the updates.
    `Pruned.history` has a list with an entry per round of "actions": [Action], "rates": {group: share lost, of the
    units that were there}, "residuals": ||W − Z|| / ||W|| over the updates, "fractions": of the budget's cost left
    (after ADMM's cut, after the removal of what is dead, after purification), and "purification": {"before", "after":
    quick accuracy, "tau": the largest factor within epsilon}. Without purification there is only the first fraction.
    """

    name: ClassVar[str] = "autocompress"

    unit: str = "filters+columns"
    rounds: int | None = None
    evaluations: int = 30
    start_temperature: float = 5.0
    stop_temperature: float = 0.5
    perturbation: float = 0.35
    images: int = 1000
    rho: float = 1e-3
    growth: float = 1.3
    updates: int = 10
    purification: bool = True
    epsilon: float = 1.0
    share: float = 0.5
    lr: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(
            self,
            self.name,
            unit=one_of(UNITS),
            rounds=optional(integer(1)),
            evaluations=integer(0),
            stop_temperature=POSITIVE,
            start_temperature=real(
                f"a finite number >= stop_temperature, {self.stop_temperature!r}",
                lambda start: self.stop_temperature <= start < math.inf,
            ),
            perturbation=FRACTION,
            images=integer(1),
            rho=POSITIVE,
            growth=real("a finite number >= 1", lambda growth: 1 <= growth < math.inf),
            updates=integer(1),
            purification=FLAG,
            epsilon=real("a number >= 0", lambda epsilon: epsilon >= 0),
            share=FRACTION,
            lr=POSITIVE,
        )

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Run all rounds on a copy of the network, in which what goes is zero until the end, and cut it."""
        space = space_of(self.unit, copy.deepcopy(net), context.data.example)
        rounds = self.rounds_to(space, budget)
        phase = self._phase(context, rounds)
        measure = quick(space, context, self.images)
        draw = np.random.default_rng(context.seed)
        present, epochs = space.plan({}), 0.0
        history: dict[str, list[Any]] = defaultdict(list)

        def train(hook: Masks, number: int) -> float:
            return context.train(space.net, phase, hook, self.name, context.seed + APART * number).epochs

        spent = space.spent(budget)
        for number in range(rounds):
            cut = (budget.fraction / spent(space.widths(present))) ** (1 / (rounds - number))
            actions = Actions(space, present, budget.at(spent(space.widths(present)) * cut))
            with tqdm(total=self.evaluations, desc="search", leave=False, disable=not context.progress) as bar:
                tried = anneal(actions, measure, self, draw, bar.update)
            widths = actions.widths(
                max(tried, key=lambda action: action.accuracy).rates if tried else actions.uniform()
            )
            history["actions"].append(tried)
            history["rates"].append(dict(zip(present.keep, (1 - widths / actions.most).tolist(), strict=True)))

            admm = ADMM(actions.projection, widths, self.rho, self.growth, self.updates)
            epochs += train(admm, 2 * number)
            present = admm.support()
            epochs += train(Masks(space, present), 2 * number + 1)
            history["residuals"].append(admm.residuals)
            fractions = [spent(space.widths(present))]
            if self.purification:
                dead, present, report = purify(space, present, budget, measure, self.epsilon)
                fractions += [spent(space.widths(dead)), spent(space.widths(present))]
                history["purification"].append(report)
            history["fractions"].append(fractions)
        return Pruned(space.shrink(present), present, epochs, dict(history))

    def rounds_to(self, space: Space, budget: Budget) -> int:
        """Return how many rounds there are, none for a budget of 1.

        Raises:
            ValueError: the budget cannot be met, or a round would remove less than one unit.
        """
        fraction = budget.fraction
        space.plan_for(space.scores("l2"), budget)
        spent = space.spent(budget if budget.latency is None else Budget(1.0))  # no clock can tell one unit from none
        left = np.array([spent(widths) for widths in space.one_less])
        most = max(int(fraction < 1), int(math.log(fraction) / math.log(left[left < 1].max())))
        rounds = min(most, max(1, round(-math.log2(fraction)))) if self.rounds is None else self.rounds
        if rounds > most:
            raise ValueError(
                f"autocompress: rounds is {self.rounds}; each must remove something, and with a budget of {fraction} "
                f"of the {budget.what} there can be {most} at most"
            )
        return rounds

    def _phase(self, context: Context, rounds: int) -> Recipe:
        epochs = self.share * context.recipe.epochs / (2 * max(1, rounds))
        steps = round(epochs * context.steps_per_epoch)
        if steps < self.updates:
            raise ValueError(
                f"autocompress: each of {2 * rounds} trainings gets {steps} steps, fewer than updates={self.updates}: "
                "raise share or the epochs, or lower updates or rounds"
            )
        return context.constant(epochs, self.lr)


def quick(space: Space, context: Context, images: int) -> Measure:
    """Return the function of a plan that gives its accuracy, in percent, on validation images without any training."""
    held_out = Split(context.data.val.images[:images], context.data.val.labels[:images])
    few = dataclasses.replace(context.data, val=held_out)
    return lambda plan: evaluate(space.mask(plan), few)  # what the shrunk network computes, without tracing it


# -- search -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Action:
    """What the annealing tried: rates, one per group; their accuracy in percent; at what T, and whether accepted."""

    rates: Floats
    accuracy: float
    temperature: float
    accepted: bool


class Actions:
    """The actions of a round: rates, one per group, whose plans keep no more than the round's target.

    A rate is the share of a group's present units that goes; of columns, of those whose channel stays.

    Args:
        space: with the network as it is now.
        present: what is left.
        target: of the round.

    Attributes:
        most: present units by group.
        order: by kind, filters and columns, the groups from the fewest weights to the most.
    """

    def __init__(self, space: Space, present: Plan, target: Budget) -> None:
        self.space, self.target = space, target
        self.projection = Projection(space, present)
        self.most = space.widths(present)
        self.spent = space.spent(target)
        weights = np.array([int(space.unit_weights(group.name).count_nonzero()) for group in space.groups])
        rows = len(space.rows.groups) if isinstance(space, RowColumnSpace) else len(weights)
        self.columns = np.arange(len(weights)) >= rows
        kinds = [np.flatnonzero(~self.columns), np.flatnonzero(self.columns)]
        self.order = [kind[np.argsort(weights[kind], kind="stable")] for kind in kinds if len(kind)]
        self._room = self._readable(self.most)

    def widths(self, rates: Floats) -> Ints:
        """Return how many units of each group stay, int64 [groups]: at least one, and as many as the target allows."""
        return filled(self.space, self._rounded(rates), self.most, self.target, np.concatenate(self.order))

    def _rounded(self, rates: Floats) -> Ints:
        rows = np.where(self.columns, self.space.sizes, self._kept(self.most, rates))
        room = self._readable(rows)
        return np.where(self.columns, self._kept(self.most * room / self._room, rates), rows)

    def plan(self, rates: Floats) -> Plan:
        """Return the plan that one-shot pruning by L2 norm makes of the network at these rates."""
        return self.projection.plan(self.projection.weights, self.widths(rates))

    def guided(self, rates: Floats) -> Floats:
        """Deal the same rates out so that a group with more weights loses no smaller share, and meet the target."""
        found = np.empty_like(rates)
        for groups in self.order:
            found[groups] = np.sort(rates[groups])
        return self.rescaled(found)

    def rescaled(self, rates: Floats) -> Floats:
        """Multiply rates by the smallest factor that meets the target, cut off at 1."""
        rates = np.maximum(rates, SMALLEST)
        low, high = 0.0, 1 / float(rates.min())
        for _ in range(30):
            middle = (low + high) / 2
            if self.spent(self._rounded(np.minimum(1, middle * rates))) <= self.target.fraction:
                high = middle
            else:
                low = middle
        return np.minimum(1, high * rates)

    def uniform(self) -> Floats:
        """Return the same rate for all groups, but for single units."""
        return self.rescaled(np.ones(len(self.most)))

    def random(self, draw: np.random.Generator) -> Floats:
        """Draw an action: every rate from U(0, 1)."""
        return self.guided(draw.uniform(0, 1, len(self.most)))

    def neighbour(self, rates: Floats, magnitude: float, draw: np.random.Generator) -> Floats:
        """Change every rate by U(−magnitude, magnitude), and not below 0."""
        return self.guided(rates + draw.uniform(-magnitude, magnitude, len(rates)))

    def _kept(self, most: NDArray[Any], rates: Floats) -> Ints:
        return np.maximum(1, np.rint(most * (1 - rates))).astype(np.int64)

    def _readable(self, widths: Ints) -> Ints:
        """Return the widths with as many columns as the channels left have."""
        rows = {
            g.name: int(w) for g, w, column in zip(self.space.groups, widths, self.columns, strict=True) if not column
        }
        return self.space.widths(rows)


def acceptance(drop: float, temperature: float) -> float:
    """Return the probability min(1, exp(−Δ/T)) of accepting an action that loses Δ points."""
    return 1.0 if drop <= 0 else math.exp(-drop / temperature)


def anneal(
    actions: Actions,
    measure: Measure,
    settings: AutoCompress,
    draw: np.random.Generator,
    tick: Callable[[], object] = lambda: None,
) -> list[Action]:
    """Try `evaluations` actions, T falling by one factor from the first to the last, and return them in order."""
    tried: list[Action] = []
    current: Action | None = None
    for temperature in np.geomspace(settings.start_temperature, settings.stop_temperature, settings.evaluations):
        if current is None:
            rates = actions.random(draw)
        else:
            magnitude = settings.perturbation * temperature / settings.start_temperature
            rates = actions.neighbour(current.rates, magnitude, draw)
        accuracy = measure(actions.plan(rates))
        chance = 1.0 if current is None else acceptance(current.accuracy - accuracy, temperature)
        tried.append(Action(rates, accuracy, float(temperature), accepted=bool(draw.random() < chance)))
        current = tried[-1] if tried[-1].accepted else current
        tick()
    return tried
