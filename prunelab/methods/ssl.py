"""Learning Structured Sparsity in Deep Neural Networks (Wen et al., NIPS 2016): group lasso while training."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from prunelab.methods.base import Pruned, space_of
from prunelab.structure import BlockSpace, Budget, Plan, RowColumnSpace, Space
from prunelab.training import Context, Hook, State, fit

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

ZERO = 1e-4  # smaller weights are set to zero after every update
REFERENCE = 128  # the group size of multiplier 1 in the released AlexNet configuration
REFRESH = 20  # steps between two looks at the norms


@dataclass(frozen=True)
class SSL:
    """Structured Sparsity Learning: train with a group lasso on what is to go, then cut the groups of least norm.

    The objective is E(W) = E_D(W) + λ·R(W) + λ_g·Σ_l m_l·Σ_g ||W_l^(g)||₂; λ·R is the recipe's weight decay.

    The paper searches λ_g by whole trainings. Here it follows the budget within one: the penalty alone, pulling each
    norm by m·λ_g·η in a step (η = lr / (1 − momentum)), is to bring the groups that the budget takes to zero by the end
    of the phase. With ν the largest norm / m among these now and T steps to go, that is λ_g = ν / (η·T), found anew
    every 20 steps, as the loss pulls back. Then the groups of least norm / m go, zeros before all others, until the
    budget is met; what is cut cannot come back, which is the paper's freezing of zeros.

    lambda_g: λ_g >= 0, constant, as in the paper (3e-3 for its ConvNet); None: found from the budget as above.
    unit: a key of `UNITS`. "filters+columns" are the rows and columns of the im2col matrix; "blocks" is depth: all
        convolutions of every residual branch, and a branch goes with the smallest. The penalty is on convolutions
        that units can be cut from; a unit without any is never removed. With "blocks", whole branches are all there is
        to meet a budget with: what is left may be well below it.
    update: "subgradient", the paper's: λ_g·m·W/||W^(g)|| joins the gradient, 0 where the norm is 0, and weights below
        1e-4 become zero after each update. "proximal": after the plain update every norm loses λ_g·m·η, or becomes
        zero, W <- W·max(0, 1 - λ_g·m·η / ||W^(g)||), exact for one structure and one structure after the other for two.
    multipliers: m. None: 1 everywhere, the paper's plain norm. "sqrt": √(weights in the group / 128), which makes the
        column multipliers of the released AlexNet configuration. "scale": the mean norm of the layer's groups at the
        start, so that norms are compared with their layer's; behind batch norm the scale of a layer says nothing (our
        choice, not the paper's). Or numbers >= 0, {structure: {layer: m}}, 1 where nothing is said: what has m = 0 is
        never removed.
    share: of the context's epochs, in (0, 1], that the phase takes.
    lr: constant learning rate of the phase, > 0.

    Raises ValueError naming the field, its value and the legal ones; when called, before any training, for multipliers
    of unknown layers, a network without such units, and a budget that cannot be met.
    `Pruned.history` has "lambda_g", λ_g at every look, and "norms": {group: norm / m, [looks, size]}; there is a look
    before the first step, every 20 steps, and after the last.
    """

    name: ClassVar[str] = "ssl"

    lambda_g: float | None = None
    unit: str = "filters+columns"
    update: Update = "subgradient"
    multipliers: Mapping[str, Mapping[str, float]] | str | None = None
    share: float = 0.5
    lr: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        given = self.multipliers if isinstance(self.multipliers, Mapping) else {}
        known = self.unit in UNITS and set(given) <= set(UNITS[self.unit][1])
        for field, legal, valid in (
            ("lambda_g", "a finite number >= 0, or None", self.lambda_g is None or 0 <= self.lambda_g < math.inf),
            ("unit", f"one of {', '.join(map(repr, UNITS))}", self.unit in UNITS),
            ("update", f"one of {', '.join(map(repr, get_args(Update)))}", self.update in get_args(Update)),
            (
                "multipliers",
                "None, 'sqrt', 'scale', or {structure of the unit: {layer: a finite number >= 0}}",
                self.multipliers in (None, *RULES)
                or (known and all(0 <= m < math.inf for layers in given.values() for m in layers.values())),
            ),
            ("share", "in (0, 1]", 0 < self.share <= 1),
            ("lr", "a finite number > 0", 0 < self.lr < math.inf),
        ):
            if not valid:
                raise ValueError(f"ssl: {field} is {getattr(self, field)!r}; it must be {legal}")

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Train a copy of the network with the penalty, and cut it."""
        kind, structures = UNITS[self.unit]
        space = space_of(kind, copy.deepcopy(net), context.data.example)
        hook = Pressure(space, penalised(space, structures, self.multipliers), self, budget)
        phase = dataclasses.replace(
            context.recipe, epochs=self.share * context.recipe.epochs, schedule="constant", lr=self.lr
        )
        run = fit(
            space.net, context.data, phase, seed=context.seed, hook=hook, progress=context.progress, label=self.name
        )
        plan, _ = hook.look()
        norms = torch.stack(hook.norms).split(space.sizes.tolist(), dim=1)
        history = {"lambda_g": hook.strengths, "norms": {g.name: n for g, n in zip(space.groups, norms, strict=True)}}
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
def add_subgradient(terms: Iterable[Term], strength: float) -> None:
    """Add strength·m·W/||W^(g)|| to the gradient of every kernel, and nothing where the norm is 0."""
    for term in terms:
        norms = term.norms()
        assert term.weight.grad is not None
        term.weight.grad.addcmul_(term.weight, (strength * term.multiplier / norms).masked_fill_(norms == 0, 0))


@torch.no_grad()
def soft_threshold(terms: Iterable[Term], threshold: float) -> None:
    """Shorten every group by threshold·m, to zero if it is no longer than that: the proximal map of the penalty."""
    for term in terms:
        norms = term.norms()
        left = (norms - threshold * term.multiplier).clamp_(min=0)
        term.weight.mul_(left.div_(norms).masked_fill_(norms == 0, 0))


def root_of_size(term: Term) -> float:
    """Return √(weights in a group / 128)."""
    return math.sqrt(term.weight.numel() / term.units.numel() / REFERENCE)


def mean_norm(term: Term) -> float:
    """Return the mean of ||W^(g)||₂ over the layer's groups."""
    return float(term.norms().detach().mean())


RULES: dict[str, Callable[[Term], float]] = {"sqrt": root_of_size, "scale": mean_norm}
"""What a layer's multiplier may be by name."""


def penalised(
    space: Space, structures: Sequence[str], multipliers: Mapping[str, Mapping[str, float]] | str | None = None
) -> list[Term]:
    """List what is penalised of the space's own network: the structures of kernels that its units own.

    Raises:
        ValueError: a multiplier for a layer that has no such structure; those that have one are named.
    """
    names = {id(module.weight): name for name, module in space.net.named_modules() if isinstance(module, nn.Conv2d)}
    found: list[Term] = []
    for structure in structures:
        own = multipliers.get(structure, {}) if isinstance(multipliers, Mapping) else {}
        layers = []
        for kernel, units in _kernels(space, structure):
            layers.append(names[id(kernel)])
            plain = Term(kernel, structure, own.get(layers[-1], 1.0), units)
            rule = RULES[multipliers] if isinstance(multipliers, str) else None
            found.append(dataclasses.replace(plain, multiplier=rule(plain)) if rule else plain)
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
        self.strengths: list[float] = []
        self.norms: list[Tensor] = []

    def look(self) -> tuple[Plan, float]:
        """Note the norms; return what the budget lets stay, and the largest norm / m, ν, among what it does not."""
        self.norms.append(unit_norms(self.terms, int(self.space.sizes.sum())))
        parts = self.norms[-1].split(self.space.sizes.tolist())
        scores = {group.name: part for group, part in zip(self.space.groups, parts, strict=True)}
        if isinstance(self.space, RowColumnSpace):
            scores = self.space.capped(scores)
        plan = self.space.plan_for(scores, self.budget, ranking="global")
        gone = torch.cat(list(scores.values()))[self.space.gates(plan) == 0]
        return plan, float(gone.max()) if len(gone) else 0.0

    def before_step(self, state: State) -> None:
        """Set λ_g where it is due."""
        group = state.optimizer.param_groups[0]
        self.eta = group["lr"] / (1 - group["momentum"])
        if state.step % REFRESH == 0:
            _, longest = self.look()
            found = longest / (self.eta * max(state.steps - state.step, REFRESH))
            self.strengths.append(found if self.settings.lambda_g is None else self.settings.lambda_g)

    def after_gradients(self, state: State) -> None:
        """Add the sub-gradient of the penalty."""
        if self.settings.update == "subgradient":
            add_subgradient(self.terms, self.strengths[-1])

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        """Set to zero what is nearly so, or take the proximal step."""
        if self.settings.update == "proximal":
            soft_threshold(self.terms, self.strengths[-1] * self.eta)
        else:
            for weight in {id(term.weight): term.weight for term in self.terms}.values():
                weight.masked_fill_(weight.abs() < ZERO, 0)
