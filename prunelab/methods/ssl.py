"""Learning Structured Sparsity in Deep Neural Networks (Wen et al., NIPS 2016): group lasso while training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from prunelab._checks import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Legal,
    check_fields,
    check_trainable,
    gradient,
    one_of,
    optional,
)
from prunelab.methods.base import Pruned, space_of
from prunelab.structure import BlockSpace, Budget, Plan, RowColumnSpace, Space
from prunelab.structure.space import Ranking
from prunelab.training import Context, Hook, State

Update = Literal["subgradient", "proximal"]

STRUCTURES: dict[str, tuple[int, ...]] = {
    "filters": (1, 2, 3),  # W[n, :, :, :], the rows of the im2col matrix
    "channels": (0, 2, 3),  # W[:, c, :, :]
    "columns": (0,),  # W[:, c, y, x], filter shapes
    "2-D filters": (2, 3),  # W[n, c, :, :]: nothing can be cut out of a network that has only these at zero
    "layers": (0, 1, 2, 3),  # W, for depth
}
"""The groups of a kernel W [N, C, kh, kw]: the dimensions that the norm of one group runs over."""

UNITS: dict[str, tuple[str, tuple[str, ...]]] = {
    "filters": ("filters", ("filters",)),
    "channels": ("filters", ("channels",)),
    "filters+channels": ("filters", ("filters", "channels")),
    "columns": ("columns", ("columns",)),
    "filters+columns": ("filters+columns", ("filters", "columns")),
    "blocks": ("blocks", ("layers",)),
}
"""What can be removed: the space that cuts it, and the structures that are penalised for it."""

ZERO = 1e-4  # smaller penalised weights are set to zero after every update
REFERENCE = 128  # the group size of multiplier 1 in the released AlexNet configuration
REFRESH = 20  # steps between two looks at the norms


@dataclass(frozen=True)
class SSL:
    """Structured Sparsity Learning: train with a group lasso on what is to go, then cut the groups of least norm.

    The objective is E(W) = E_D(W) + λ·R(W) + λ_g·Σ_l m_l·Σ_g ||W_l^(g)||₂; λ·R is the recipe's weight decay.

    The paper searches λ_g by whole trainings. Here it follows the budget within one: the penalty alone, pulling each
    norm by λ_g·m·η in a step (η = lr / (1 − momentum)), is to bring the groups that the budget takes to zero by the end
    of the phase. With ν the largest norm / m among these now and T steps to go, that is λ_g = ν / (η·T), found anew
    every 20 steps, as the loss pulls back. Then the groups of least norm / m go, zeros before all others, until the
    budget is met; what is cut cannot come back, which is the paper's freezing of zeros.

    lambda_g: λ_g >= 0, constant, as in the paper, whose values are not known (the released code starts its ConvNet at
        3e-3); None: found from the budget as above.
    unit: a key of `UNITS`. "filters+columns" are the rows and columns of the im2col matrix; "blocks" is depth: all
        convolutions of every residual branch, and a branch goes with the smallest. The penalty is on convolutions
        that units can be cut from; a unit without any is never removed. With "blocks", whole branches are all there is
        to meet a budget with: what is left may be well below it.
    update: "subgradient", the paper's: λ_g·m·W/||W^(g)|| joins the gradient, 0 where the norm is 0, and weights
        of penalised kernels below 1e-4 become zero after each update. "proximal": after the plain update every norm
        loses λ_g·m·η, or becomes zero, W <- W·max(0, 1 - λ_g·m·η / ||W^(g)||), exact for one structure and one
        structure after the other for two.
    ranking: "global", the paper's: one λ_g, and norms decide how much each layer loses; "layer": the same share of
        every group goes, and each has the λ_g that takes it there.
    multipliers: m. None: 1 everywhere, the paper's plain norm. "sqrt": √(weights in the group / 128), which makes the
        column multipliers of the released AlexNet configuration. Or numbers >= 0, {structure: {layer: m}}, 1 where
        nothing is said: what has m = 0 is never removed.
    share: of the context's epochs, in (0, 1], that the phase takes.
    lr: constant learning rate of the phase, > 0.

    Raises ValueError naming the field, its value and the legal ones; when called, before any training, for multipliers
    of unknown layers, a network without such units, and a budget that cannot be met.
    `Pruned.history` has "lambda_g", {group: λ_g at each look}, and "norms", {group: norm / m, [looks + 1, size]}. There
    is a look every 20 steps, the first before any; the last norms are those at the cut.
    """

    name: ClassVar[str] = "ssl"

    lambda_g: float | None = None
    unit: str = "filters+columns"
    update: Update = "subgradient"
    ranking: Ranking = "global"
    multipliers: Mapping[str, Mapping[str, float]] | str | None = None
    share: float = 0.5
    lr: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(
            self,
            self.name,
            lambda_g=optional(NOT_NEGATIVE),
            unit=one_of(UNITS),
            update=one_of(get_args(Update)),
            ranking=one_of(get_args(Ranking)),
            multipliers=Legal(
                "None, 'sqrt', or {structure of the unit: {layer: a finite number >= 0}}",
                lambda given: given is None or given == "sqrt" or self._are_multipliers(given),
            ),
            share=FRACTION,
            lr=POSITIVE,
        )

    def _are_multipliers(self, given: Mapping[str, Mapping[str, float]]) -> bool:
        """Whether numbers are given for structures of the unit."""
        numbers = [number for layers in given.values() for number in layers.values()]
        return given.keys() <= set(UNITS[self.unit][1]) and all(map(NOT_NEGATIVE.accepts, numbers))

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Train a copy of the network with the penalty, and cut it."""
        kind, structures = UNITS[self.unit]
        space = space_of(kind, copy.deepcopy(net), context.data.example)
        hook = Pressure(space, penalised(space, structures, self.multipliers), self, budget)
        phase = context.constant(self.share * context.recipe.epochs, self.lr)
        run = context.train(space.net, phase, hook, self.name)
        plan, _ = hook.look()
        names, sizes = [group.name for group in space.groups], space.sizes.tolist()
        history = {
            "lambda_g": dict(zip(names, torch.stack(hook.strengths, dim=1), strict=True)),
            "norms": dict(zip(names, torch.stack(hook.norms).split(sizes, dim=1), strict=True)),
        }
        return Pruned(space.shrink(plan), plan, run.epochs, history)


# -- the penalty ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """One structure of one layer: m·Σ_g ||W^(g)||₂.

    Attributes:
        weight: the kernel W, [N, C, kh, kw].
        structure: a key of `STRUCTURES`.
        multiplier: m > 0.
        units: the unit that each group belongs to, int64 of the shape of `norms()`, -1 for what is never removed.
    """

    weight: Tensor
    structure: str
    multiplier: float
    units: Tensor

    def norms(self) -> Tensor:
        """Return ||W^(g)||₂ of every group, of W's shape but for ones where the norm runs."""
        return torch.linalg.vector_norm(self.weight, dim=STRUCTURES[self.structure], keepdim=True)


def penalty(terms: Iterable[Term]) -> Tensor:
    """Return R_g = Σ_l m_l·Σ_g ||W_l^(g)||₂, a scalar."""
    return torch.stack([term.multiplier * term.norms().sum() for term in terms]).sum()


@torch.no_grad()
def add_subgradient(terms: Sequence[Term], pulls: Sequence[Tensor]) -> None:
    """Add λ·m·W/||W^(g)|| to the gradient of every kernel, and nothing where the norm is 0.

    Args:
        terms: whose kernels have gradients.
        pulls: λ·m of each term's groups, of a shape that broadcasts to its norms.
    """
    for term, pull in zip(terms, pulls, strict=True):
        norms = term.norms()
        gradient("ssl", term.weight).addcmul_(term.weight, (pull / norms).masked_fill_(norms == 0, 0))


@torch.no_grad()
def soft_threshold(terms: Sequence[Term], thresholds: Sequence[Tensor]) -> None:
    """Shorten every group by its threshold, to zero if it is no longer: the proximal map of threshold·||W^(g)||."""
    for term, threshold in zip(terms, thresholds, strict=True):
        norms = term.norms()
        left = (norms - threshold).clamp_(min=0)
        term.weight.mul_(left.div_(norms).masked_fill_(norms == 0, 0))


def root_of_size(weights: int) -> float:
    """Return √(weights in a group / 128)."""
    return math.sqrt(weights / REFERENCE)


_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def penalised(
    space: Space, structures: Sequence[str], multipliers: Mapping[str, Mapping[str, float]] | str | None = None
) -> list[Term]:
    """List what is penalised of the space's own network: the structures of kernels that its units own.

    Raises:
        ValueError: a multiplier for a layer that has no such structure; those that have one are named. Or a transposed
            convolution, whose kernel has its filters in another dimension.
    """
    names = {id(layer.weight): n for n, layer in space.net.named_modules() if isinstance(layer, _CONVOLUTIONS)}
    found: list[Term] = []
    for structure in structures:
        own = multipliers.get(structure, {}) if isinstance(multipliers, Mapping) else {}
        layers = []
        for kernel, units in _kernels(space, structure):
            layers.append(names[id(kernel)])
            if isinstance(space.net.get_submodule(layers[-1]), nn.ConvTranspose2d):
                raise ValueError(
                    f"ssl: {layers[-1]!r} is a ConvTranspose2d: only the filters of Conv2d can be penalised"
                )
            given = own.get(layers[-1], 1.0)
            multiplier = root_of_size(kernel.numel() // units.numel()) if multipliers == "sqrt" else given
            found.append(Term(kernel, structure, multiplier, units))
        if unknown := sorted(set(own) - set(layers)):
            raise ValueError(f"ssl: multipliers[{structure!r}] names {unknown}: legal layers are {', '.join(layers)}")
    return [term for term in found if term.multiplier > 0]


def _kernels(space: Space, structure: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield the kernels of convolutions that units own by this structure, with the unit of each group."""
    if isinstance(space, BlockSpace):  # all kernels of a branch, since any of them at zero closes it
        layers = [(space.net.get_submodule(n), i) for i, branch in enumerate(space.branches) for n in branch.layers]
        kernels = [(layer.get_parameter("weight"), [torch.full((1, 1, 1, 1), i)]) for layer, i in layers]
    else:
        kernels = space.owned(space.net)
    for kernel, owners in kernels:
        groups = [1 if dim in STRUCTURES[structure] else size for dim, size in enumerate(kernel.shape)]
        for units in owners:
            if kernel.dim() == 4 and list(units.shape) == groups:
                yield kernel, units


@torch.no_grad()
def unit_norms(terms: Sequence[Term], count: int) -> Tensor:
    """Return, for each of `count` units, how far it is from being gone: norm / m, float [units].

    Where several kernels write a unit, or read it, all must be zero; of a branch, and of the filter and the channel
    that are one unit, either. What is not penalised is infinitely far.
    """
    found = torch.full((count + 1,), torch.inf)  # the last place gathers what is never removed
    for structure in dict.fromkeys(term.structure for term in terms):
        how, start = ("amin", torch.inf) if structure == "layers" else ("amax", -torch.inf)
        far = torch.full_like(found, start)
        for term in terms:
            if term.structure == structure:
                norms = (term.norms() / term.multiplier).flatten().float().cpu()
                far.scatter_reduce_(0, term.units.flatten() % len(far), norms, how)
        found = found.minimum(far.masked_fill_(far == -torch.inf, torch.inf))
    return found[:-1]


# -- training ---------------------------------------------------------------------------------------------------------


class Pressure(Hook):
    """The training side: the penalty in every step, and λ_g from the norms, the budget and the steps to go."""

    def __init__(self, space: Space, terms: Sequence[Term], settings: SSL, budget: Budget) -> None:
        self.space, self.terms, self.settings, self.budget = space, terms, settings, budget
        self.group_of = torch.arange(len(space.groups)).repeat_interleave(torch.from_numpy(space.sizes))
        self.norms: list[Tensor] = []  # by look, [units]
        self.strengths: list[Tensor] = []  # by look, [groups]

    def look(self) -> tuple[Plan, Tensor]:
        """Note the norms; return what the budget lets stay, and ν of each group of the space: norm / m, [groups]."""
        self.norms.append(unit_norms(self.terms, int(self.space.sizes.sum())))
        scores = self.space.by_group(self.norms[-1])
        plan = self.space.plan_for(scores, self.budget, self.settings.ranking)
        goes = self.space.gates(plan) == 0
        if isinstance(self.space, RowColumnSpace):
            goes &= self.space.readable(plan)  # the others go with their channel, whatever their norm
        longest = torch.zeros(len(scores)).scatter_reduce(0, self.group_of[goes], self.norms[-1][goes], "amax")
        return plan, longest if self.settings.ranking == "layer" else longest.max().expand_as(longest)

    def start(self, state: State) -> None:
        """Make sure that every kernel has a gradient to add to."""
        check_trainable("ssl", [term.weight for term in self.terms])

    def before_step(self, state: State) -> None:
        """Set λ_g where it is due."""
        if state.step % REFRESH == 0:
            group = state.optimizer.param_groups[0]
            self.eta = group["lr"] / (1 - group["momentum"])
            _, longest = self.look()
            fixed = self.settings.lambda_g
            found = longest / (self.eta * (state.steps - state.step))
            self.strengths.append(found if fixed is None else torch.full_like(found, fixed))
            units = torch.cat([self.strengths[-1][self.group_of], torch.zeros(1)])  # unit -1 finds the last place
            self.pulls = [(units[term.units] * term.multiplier).to(term.weight) for term in self.terms]

    def after_gradients(self, state: State) -> None:
        """Add the sub-gradient of the penalty."""
        if self.settings.update == "subgradient":
            add_subgradient(self.terms, self.pulls)

    def after_step(self, state: State) -> None:
        """Set to zero what is nearly so, or take the proximal step."""
        if self.settings.update == "proximal":
            soft_threshold(self.terms, [pull * self.eta for pull in self.pulls])
            return
        with torch.no_grad():
            for weight in {id(term.weight): term.weight for term in self.terms}.values():
                weight.masked_fill_(weight.abs() < ZERO, 0)
