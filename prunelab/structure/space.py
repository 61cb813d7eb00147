"""What the ways of cutting a network share: groups of units, scores, budgets, masks and a closed-form cost."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from prunelab import scores as criteria
from prunelab.structure.plan import Plan

Scope = Literal["all", "conv"]
Ranking = Literal["layer", "global"]
Scores = Mapping[str, Tensor]
Share = int | float | Fraction
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Units of one kind in one place, ranked against each other; at least one of them always stays."""

    name: str
    size: int


@dataclass(frozen=True)
class Budget:
    """The fraction of the dense network's multiply-adds that may stay, in (0, 1].

    `scope` says which are counted: "all" convolution and linear layers, or "conv" alone, as SPP, SSL and He et al. do.
    """

    macs: float
    scope: Scope = "all"

    def __post_init__(self) -> None:
        if not 0 < self.macs <= 1:
            raise ValueError(f"budget macs={self.macs}: the fraction of MACs to keep must be in (0, 1]")
        check_scope(self.scope)


def check_scope(scope: str) -> None:
    """Raise ValueError unless `scope` is one that costs are counted in."""
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r}: legal values are {', '.join(map(repr, get_args(Scope)))}")


def kept_count(size: int, share: Share) -> int:
    """How many of `size` units a share keeps: an int is a count, a fraction f in (0, 1] keeps max(1, floor(f·size)).

    The product is exact: 0.1 means one tenth, not the binary number next to it, so that 0.7 of 10 keeps 7.

    Raises:
        ValueError: a fraction outside (0, 1], or a count outside [1, size].
    """
    if isinstance(share, Integral):
        if not 1 <= share <= size:
            raise ValueError(f"share {share}: a group of {size} keeps between 1 and {size} units")
        return int(share)
    if not 0 < share <= 1:
        raise ValueError(f"share {share}: a kept fraction must be in (0, 1]; a kept count must be an int")
    return max(1, int(size * Fraction(str(share))))


@dataclass(frozen=True)
class Cost:
    """Multiply-adds as a closed form of the group widths w: sum over layers of c · (R·w + r) · (W·w + s).

    R·w + r is how many channels a layer reads, W·w + s how many it writes; c is the arithmetic per pair.
    """

    per_pair: Ints  # [layers]
    reads: Ints  # [layers, groups]
    reads_fixed: Ints  # [layers]
    writes: Ints
    writes_fixed: Ints
    conv: NDArray[np.bool_]  # [layers]

    def __call__(self, widths: Ints, scope: Scope = "all") -> Ints:
        """Return the MACs of one plan, widths [groups], or of many at once, widths [plans, groups]."""
        per_pair = self.per_pair if scope == "all" else self.per_pair * self.conv
        reads = widths @ self.reads.T + self.reads_fixed
        writes = widths @ self.writes.T + self.writes_fixed
        return np.asarray((reads * writes) @ per_pair)

    def per_unit(self, widths: Ints) -> Ints:
        """Return the MACs that compute one unit of each group, [groups], at these widths; readers are not counted."""
        return np.asarray((self.per_pair * (widths @ self.reads.T + self.reads_fixed)) @ self.writes)


class Space(ABC):
    """A network and the units that can be removed from it; the network itself is never changed.

    Units are numbered through all groups in order. `gates`, one number per unit, are the common currency: a plan is a
    gate of ones and zeros, SPP's sampled masks are gates, and `apply_gates` multiplies them into every parameter that a
    unit owns.
    """

    kind: str  # the name of the space in a saved plan

    def __init__(self, net: nn.Module, groups: Sequence[Group], cost: Cost) -> None:
        if not groups:
            raise ValueError(f"{type(net).__name__} has no {self.kind} that could be removed")
        self.net = net
        self.groups = tuple(groups)
        self.cost = cost
        self.sizes = np.array([group.size for group in self.groups], dtype=np.int64)
        self._sizes = {group.name: group.size for group in self.groups}
        self._index = {group.name: i for i, group in enumerate(self.groups)}
        self._group_of = np.repeat(np.arange(len(self.groups)), self.sizes)

    # -- what a kind of space must say ------------------------------------------------------------------------------

    @abstractmethod
    def owned(self, net: nn.Module) -> list[tuple[nn.Parameter, list[Tensor]]]:
        """List the parameters of `net`, a copy of this space's network, that units own a part of.

        With each come one or more int64 tensors of unit numbers that broadcast to the parameter's shape: entry by
        entry, whose it is. A unit number of -1 stands for what is never removed.
        """

    @abstractmethod
    def unit_weights(self, group: str) -> Tensor:
        """Return the weights that compute each unit of a group, [size, weights per unit]."""

    @abstractmethod
    def shrink(self, plan: Plan) -> nn.Module:
        """Return a physically smaller copy of the network that computes what the masked one computes."""

    @abstractmethod
    def cut(self, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut tensors that have the names and shapes of the network's parameters as `shrink` cuts the parameters."""

    # -- scores, budgets and plans ----------------------------------------------------------------------------------

    def scores(self, criterion: str | Callable[[Space], Scores]) -> Scores:
        """Score every unit: {group: float [size]}, high is important.

        Args:
            criterion: a name in `prunelab.scores.CRITERIA`, or a function of this space.

        Raises:
            ValueError: the name is unknown, or the scores do not fit the groups.
        """
        return self._checked(criteria.named(criterion)(self) if isinstance(criterion, str) else criterion(self))

    def plan_for(
        self, scores: Scores, target: Budget | Mapping[str, Share] | Sequence[Share], ranking: Ranking = "layer"
    ) -> Plan:
        """Keep the units with the highest scores, as many as the target allows.

        Args:
            scores: {group: [size]}; with a budget, units of score +inf are never removed.
            target: a budget; or what each group keeps, as {group: share} (groups not named stay whole) or a list in the
                order of `groups`. A share is a count (int) or a fraction.
            ranking: with a budget, "layer" removes the same fraction of every group, "global" compares scores across
                groups.

        Raises:
            ValueError: a budget below what must stay (one unit per group), a list of the wrong length, an unknown
                group, an illegal share, scores that do not fit the groups.
        """
        scores = self._checked(scores)
        if isinstance(target, Budget):
            widths = self._widths_within(target, scores, ranking)
        else:
            widths = self._widths_from(target)
        keep = {}
        for group, width in zip(self.groups, widths, strict=True):
            best = torch.argsort(scores[group.name], descending=True, stable=True)[: int(width)]
            keep[group.name] = tuple(sorted(best.tolist()))
        return self.plan(keep)

    def plan(self, keep: Mapping[str, Sequence[int]]) -> Plan:
        """Return the plan that keeps the given indices; groups not named stay whole."""
        self._known(keep)
        whole = {group.name: tuple(range(group.size)) for group in self.groups}
        return Plan(
            self.kind,
            dict(self._sizes),
            whole | {name: tuple(sorted(map(int, kept))) for name, kept in keep.items()},
        )

    def macs(self, plan: Plan | Mapping[str, int] | None = None, scope: Scope = "all") -> int:
        """Return the MACs of the cut network in closed form; of the dense one without a plan."""
        check_scope(scope)
        widths = self.sizes if plan is None else self.widths(plan)
        return int(self.cost(widths, scope))

    def widths(self, plan: Plan | Mapping[str, int]) -> Ints:
        """Return units kept per group, int64 [groups], in the order of `groups`."""
        if isinstance(plan, Plan):
            self.check(plan)
            plan = plan.widths
        self._known(plan)
        return np.array([plan.get(group.name, group.size) for group in self.groups], dtype=np.int64)

    def check(self, plan: Plan) -> None:
        """Raise ValueError unless the plan was made for a space like this one."""
        if plan.space != self.kind or plan.sizes != self._sizes:
            ours = ", ".join(f"{name}: {size}" for name, size in self._sizes.items())
            raise ValueError(f"{plan} does not fit this network, which has {self.kind} {{{ours}}}")

    # -- masks ------------------------------------------------------------------------------------------------------

    def gates(self, plan: Plan) -> Tensor:
        """Return one float per unit through all groups, 1 where the plan keeps it and 0 elsewhere."""
        self.check(plan)
        gates = torch.zeros(int(self.sizes.sum()))
        offset = 0
        for group in self.groups:
            gates[torch.tensor(plan.keep[group.name]) + offset] = 1.0
            offset += group.size
        return gates

    def mask(self, plan: Plan) -> nn.Module:
        """Return a copy of the network with everything that removed units own set to zero."""
        masked = copy.deepcopy(self.net)
        self.apply_gates(masked, self.gates(plan))
        return masked

    @torch.no_grad()
    def apply_gates(self, net: nn.Module, gates: Tensor) -> None:
        """Multiply the gates, [units], into the parameters of `net`, a copy of this space's network, in place."""
        for parameter, owners in self.owned(net):
            for units in owners:
                parameter.mul_(open_ended(gates.to(parameter))[units.to(parameter.device)])

    # -- optimisers -------------------------------------------------------------------------------------------------

    def carry(self, plan: Plan, optimizer: Optimizer, small: nn.Module) -> Optimizer:
        """Return an optimiser that goes on with the shrunk network where the old one stopped.

        Everything it remembers of a parameter (momentum, second moments) is cut as the parameter was. The old optimiser
        still holds the old tensors: stepping it would train a network that nobody uses, and is an error from now on.

        Args:
            plan: what was kept.
            optimizer: any of torch.optim's, over parameters of this space's network.
            small: what `shrink(plan)` returned.

        Raises:
            ValueError: the optimiser has a parameter that is not the network's.
            RuntimeError: later, when the old optimiser is stepped.
        """
        names = {id(parameter): name for name, parameter in self.net.named_parameters()}
        known = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if any(id(parameter) not in names for parameter in known):
            raise ValueError("the optimiser has parameters that are not this network's: give the one that trained it")
        new = dict(small.named_parameters())
        groups = [{**g, "params": [new[names[id(p)]] for p in g["params"]]} for g in optimizer.param_groups]
        carried = type(optimizer)(groups, **optimizer.defaults)
        for parameter in known:
            name = names[id(parameter)]
            for key, value in optimizer.state.get(parameter, {}).items():
                along = isinstance(value, Tensor) and value.shape == parameter.shape
                carried.state[new[name]][key] = self.cut(plan, {name: value})[name] if along else copy.copy(value)
        optimizer.register_step_pre_hook(_refuse_step)
        return carried

    # -- inside -----------------------------------------------------------------------------------------------------

    def _known(self, names: Mapping[str, object]) -> None:
        unknown = [name for name in names if name not in self._index]
        if unknown:
            raise ValueError(f"unknown groups {unknown}: this network has {', '.join(self._index)}")

    def _checked(self, scores: Scores) -> Scores:
        for group in self.groups:
            if group.name not in scores or scores[group.name].shape != (group.size,):
                found = tuple(scores[group.name].shape) if group.name in scores else "nothing"
                raise ValueError(f"scores of group {group.name!r} must have shape ({group.size},), got {found}")
            if scores[group.name].isnan().any():
                raise ValueError(f"scores of group {group.name!r} contain NaN")
        return scores

    def _widths_from(self, target: Mapping[str, Share] | Sequence[Share]) -> Ints:
        if not isinstance(target, Mapping):
            if len(target) != len(self.groups):
                names = ", ".join(self._index)
                raise ValueError(f"{len(target)} shares for {len(self.groups)} groups: give one each for {names}")
            target = dict(zip(self._index, target, strict=True))
        self._known(target)
        return self.widths({name: kept_count(self.groups[self._index[name]].size, s) for name, s in target.items()})

    def _widths_within(self, budget: Budget, scores: Scores, ranking: Ranking) -> Ints:
        """Remove units in ascending order until the budget is met; the best unit of each group is never removed."""
        priority = self._priority(scores, ranking)
        order = np.argsort(priority, kind="stable")[: np.count_nonzero(priority < np.inf)]
        removed_from = self._group_of[order]

        def widths(count: int) -> Ints:
            return self.sizes - np.bincount(removed_from[:count], minlength=len(self.sizes))

        allowed = budget.macs * self.macs(scope=budget.scope)
        smallest = int(self.cost(widths(len(order)), budget.scope))
        if smallest > allowed:
            least = smallest / self.macs(scope=budget.scope)
            raise ValueError(
                f"budget macs={budget.macs} ({budget.scope}) cannot be met: one unit per group and every "
                f"unit of infinite score must stay, which keeps {least:.4f} of the MACs"
            )
        low, high = 0, len(order)  # the budget is met after removing `high` units
        while low < high:
            middle = (low + high) // 2
            if self.cost(widths(middle), budget.scope) <= allowed:
                high = middle
            else:
                low = middle + 1
        return self._given_back(widths(high), removed_from[:high][::-1], allowed, budget.scope)

    def _given_back(self, widths: Ints, removed_from: Ints, allowed: float, scope: Scope) -> Ints:
        """Give each group one unit back, last removed first, where it fits: the groups' units differ in cost."""
        for group in dict.fromkeys(removed_from.tolist()):
            widths[group] += 1
            if self.cost(widths, scope) > allowed:
                widths[group] -= 1
        return widths

    def _priority(self, scores: Scores, ranking: Ranking) -> NDArray[np.float64]:
        if ranking not in get_args(Ranking):
            raise ValueError(f"ranking={ranking!r}: legal values are {', '.join(map(repr, get_args(Ranking)))}")
        parts = []
        for group in self.groups:
            score = scores[group.name].detach().double().cpu().numpy()
            rank = np.empty(group.size)
            rank[np.argsort(-score, kind="stable")] = np.arange(group.size, 0, -1)
            priority = score.copy() if ranking == "global" else rank / group.size
            priority[(rank == group.size) | (score == np.inf)] = np.inf
            parts.append(priority)
        return np.concatenate(parts)


def _refuse_step(optimizer: Optimizer, *_: object) -> None:
    raise RuntimeError(
        "this optimiser holds the parameters of a network that was shrunk: step the one `carry` returned"
    )


def open_ended(gates: Tensor) -> Tensor:
    """Append the gate of what is never removed, where unit number -1 finds it."""
    return torch.cat([gates, gates.new_ones(1)])
