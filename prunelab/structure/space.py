"""What the ways of cutting a network share: groups of units, scores, budgets, masks and a closed-form cost."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from numbers import Integral
from operator import index
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunelab import cost
from prunelab import scores as criteria
from prunelab._arrays import Bools, Floats, Ints
from prunelab._checks import FRACTION, NETWORK, Legal, check, instance, one_of
from prunelab.structure.plan import Plan, indices

Scope = cost.Scope
Ranking = Literal["layer", "global"]
Scores = Mapping[str, Tensor]
Share = int | float | Fraction


@dataclass(frozen=True)
class Group:
    """Units of one kind in one place, ranked against each other; at least `least` of them always stay.

    A budget takes them in steps: a multiple of `step` stays, or all.
    """

    name: str
    size: int
    least: int = 1
    step: int = 1


@dataclass(frozen=True)
class Budget:
    """The fraction of the dense network that may stay, in (0, 1]: of its MACs, its parameters or its measured latency.

    Exactly one of the three is given. A method that does not care which reads `fraction`, asks for another fraction of
    the same cost with `at`, and leaves what a network has spent of it to `Space.spent`.

    Attributes:
        macs: of the multiply-adds.
        scope: which multiply-adds are counted, "all" convolution and linear layers, or "conv" alone, as SPP, SSL and He
            et al. do.
        parameters: of the number of parameters.
        latency: of the median time of a forward pass, on this machine, at the space's example.

    Raises:
        ValueError: none or several are given, a fraction is outside (0, 1], or the scope is not legal.
    """

    macs: float | None = None
    scope: Scope = "all"
    parameters: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _COSTS if getattr(self, name) is not None}
        if len(given) != 1:
            raise ValueError(f"a budget is one of {', '.join(_COSTS)}: got {given or 'none'}")
        if not FRACTION.accepts(self.fraction):
            what = _COSTS[self.cost]
            raise ValueError(f"budget {self.cost}={self.fraction!r}: the fraction of {what} to keep must be in (0, 1]")
        check("scope", self.scope, one_of(get_args(Scope)))
        if self.macs is None and self.scope != "all":
            raise ValueError(f"scope={self.scope!r} says which MACs are counted: the budget is of {self.cost}")

    @property
    def cost(self) -> str:
        """Which cost is limited: "macs", "parameters" or "latency"."""
        return next(name for name in _COSTS if getattr(self, name) is not None)

    @property
    def fraction(self) -> float:
        """The fraction of that cost that may stay."""
        fraction: float = getattr(self, self.cost)
        return fraction

    @property
    def what(self) -> str:
        """The cost in words, for messages."""
        return f"{_COSTS[self.cost]} ({self.scope})" if self.macs is not None else _COSTS[self.cost]

    def at(self, fraction: float) -> Budget:
        """Return the budget of the same cost at another fraction."""
        changed: dict[str, Any] = {self.cost: fraction}
        return replace(self, **changed)


_COSTS = {"macs": "MACs", "parameters": "parameters", "latency": "latency"}


def portion(size: int, fraction: float | Fraction) -> int:
    """Return floor(fraction·size), exact: 0.1 means one tenth, not the binary number next to it: 0.7 of 10 is 7."""
    return int(size * Fraction(str(fraction)))


def kept_count(size: int, share: Share) -> int:
    """How many of `size` units a share keeps: an int is a count, a fraction f in (0, 1] keeps max(1, floor(f·size)).

    Raises:
        ValueError: a fraction outside (0, 1], or a count outside [1, size].
    """
    if isinstance(share, Integral) and not isinstance(share, bool):
        if not 1 <= share <= size:
            raise ValueError(f"share {share}: a group of {size} keeps between 1 and {size} units")
        return int(share)
    if not FRACTION.accepts(share):
        raise ValueError(f"share {share}: a kept fraction must be in (0, 1]; a kept count must be an int")
    return max(1, portion(size, share))


@dataclass(frozen=True)
class Cost:
    """A cost as a closed form of the group widths w: the sum over its rows of c · (R·w + r) · (W·w + s).

    Multiply-adds have a row per layer: R·w + r is how many channels it reads, W·w + s how many it writes, and c is the
    arithmetic per pair. Parameters have a row per tensor, with its two lengths that change; c is the product of the
    others.
    """

    per_pair: Ints  # [layers]
    reads: Ints  # [layers, groups]
    reads_fixed: Ints  # [layers]
    writes: Ints  # [layers, groups]
    writes_fixed: Ints  # [layers]
    conv: Bools  # [layers]

    def __call__(self, widths: Ints, scope: Scope = "all") -> Ints:
        """Return the cost of one plan, widths [groups], or of many at once, widths [plans, groups]."""
        per_pair = self.per_pair if scope == "all" else self.per_pair * self.conv
        reads = widths @ self.reads.T + self.reads_fixed
        writes = widths @ self.writes.T + self.writes_fixed
        return np.asarray((reads * writes) @ per_pair)

    def per_unit(self, widths: Ints) -> Ints:
        """Return what it costs to write one unit of each group, [groups], at these widths; readers are not counted."""
        return np.asarray((self.per_pair * (widths @ self.reads.T + self.reads_fixed)) @ self.writes)


class Space(ABC):
    """A network and the units that can be removed from it; the network itself is never changed.

    Units are numbered through all groups in order. `gates`, one number per unit, are the common currency: a plan is a
    gate of ones and zeros, SPP's sampled masks are gates, and `apply_gates` multiplies them into every parameter that a
    unit owns.
    """

    kind: str  # the name of the space in a saved plan
    example: Tensor  # the input at which latency is measured

    def __init__(self, net: nn.Module, groups: Sequence[Group], cost: Cost) -> None:
        if not groups:
            reasons = [*dict.fromkeys(self.whole.values())]
            why = f": {'; '.join(reasons[:3])}{'; …' * (len(reasons) > 3)}" if reasons else ""
            raise ValueError(f"{type(net).__name__} has no {self.kind} that could be removed{why}")
        self.net = net
        self.groups = tuple(groups)
        self.cost = cost
        self.sizes = np.array([group.size for group in self.groups], dtype=np.int64)
        self.steps = np.array([group.step for group in self.groups], dtype=np.int64)
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

    @property
    def whole(self) -> dict[str, str]:
        """Layers that can lose no filter, in a space of filters, and what pins some of these."""
        return {}

    # -- scores, budgets and plans ----------------------------------------------------------------------------------

    def scores(self, criterion: str | Callable[[Space], Scores]) -> Scores:
        """Score every unit: {group: float [size]}, high is important.

        Args:
            criterion: a name in `prunelab.scores.CRITERIA`, or a function of this space.

        Raises:
            ValueError: the name is unknown, or the scores do not fit the groups.
        """
        legal = Legal("a name, or a function of the space", lambda given: isinstance(given, str) or callable(given))
        check("criterion", criterion, legal)
        return self._checked(criteria.named(criterion)(self) if isinstance(criterion, str) else criterion(self))

    def plan_for(
        self, scores: Scores, target: Budget | Mapping[str, Share] | Sequence[Share], ranking: Ranking = "layer"
    ) -> Plan:
        """Keep the units with the highest scores, as many as the target allows.

        Args:
            scores: {group: [size]}. With a budget, units of score +inf are never removed. Units of score -inf are the
                first to go, of their group or with a global ranking of all, but no surer to go than others: one stays
                where nothing more has to go, or nothing else is left of its group.
            target: a budget; or what each group keeps, as {group: share} (groups not named stay whole) or a list in the
                order of `groups`. A share is a count (int) or a fraction.
            ranking: with a budget, "layer" removes the same fraction of every group, "global" compares scores across
                groups.

        Raises:
            ValueError: a budget below what every group has to keep, a list of the wrong length, an unknown
                group, an illegal share, another ranking, scores that do not fit the groups.
        """
        scores = self._checked(scores)
        legal = instance(Budget | Mapping | list | tuple, "a Budget, a mapping {group: share} or a list")
        check("target", target, legal)
        check("ranking", ranking, one_of(get_args(Ranking)))
        if isinstance(target, Budget):
            widths = self._widths_within(target, scores, ranking)
        else:
            widths = self._widths_from(target)
        return self.best(scores, widths)

    def best(self, scores: Scores, widths: Ints) -> Plan:
        """Keep as many units of each group as `widths`, int64 [groups], says: those with the highest scores."""
        keep = {}
        for group, width in zip(self.groups, widths.tolist(), strict=True):
            best = torch.argsort(scores[group.name], descending=True, stable=True)[:width]
            keep[group.name] = tuple(sorted(best.tolist()))
        return self.plan(keep)

    def plan(self, keep: Mapping[str, Sequence[int]]) -> Plan:
        """Return the plan that keeps the given indices; groups not named stay whole."""
        check("keep", keep, instance(Mapping, "a mapping {group: indices}"))
        self._known(keep)
        whole = {group.name: tuple(range(group.size)) for group in self.groups}
        return Plan(
            self.kind,
            dict(self._sizes),
            whole | {name: tuple(sorted(indices(name, kept))) for name, kept in keep.items()},
        )

    def both(self, first: Plan, second: Plan) -> Plan:
        """Return the plan of the units that two plans both keep."""
        return self.plan({name: [*{*kept} & {*second.keep[name]}] for name, kept in first.keep.items()})

    def macs(self, plan: Plan | Mapping[str, int] | None = None, scope: Scope = "all") -> int:
        """Return the MACs of the cut network in closed form; of the dense one without a plan."""
        check("scope", scope, one_of(get_args(Scope)))
        return int(self.cost(self.sizes if plan is None else self.widths(plan), scope))

    def parameters(self, plan: Plan | Mapping[str, int] | None = None) -> int:
        """Return the parameters of the cut network in closed form; of the dense one without a plan."""
        return int(self.parameter_cost(self.sizes if plan is None else self.widths(plan)))

    def spent(self, budget: Budget, scores: Scores | None = None) -> Callable[[Ints], float]:
        """Return the function of widths, int64 [groups], that gives the fraction of the budget's cost that they keep.

        MACs and parameters have a closed form. Latency is measured at every call: of the cut and the dense network,
        turn by turn, at the space's example (its batch) with the present number of threads, the ratio of the medians.

        Args:
            budget: its fraction is not used.
            scores: whose best units are meant, as what is kept may matter to latency; by default the first ones.

        Raises:
            ValueError: the network has nothing of that cost, such as a convolution.
        """
        if budget.latency is not None:
            ranked = scores or criteria.alike(self)
            return lambda widths: self._latency(self.best(ranked, widths))
        closed_form = self.parameter_cost if budget.macs is None else self.cost
        dense = int(closed_form(self.sizes, budget.scope))
        if dense == 0:
            raise ValueError(f"{type(self.net).__name__} has no {budget.what}, of which a budget could keep a fraction")
        return lambda widths: float(closed_form(widths, budget.scope) / dense)

    @cached_property
    def parameter_cost(self) -> Cost:
        """The number of parameters, as a closed form."""
        owned, groups = self.owned(self.net), len(self.groups)
        group_of = np.append(self._group_of, groups)  # unit -1 belongs to the fixed column, the last
        lengths = np.zeros((2, len(owned) + 1, groups + 1), dtype=np.int64)
        lengths[:, :, groups] = 1
        per_pair = np.array([parameter.numel() for parameter, _ in owned] + [0], dtype=np.int64)
        per_pair[-1] = cost.parameters(self.net) - per_pair.sum()  # what no unit owns a part of
        for row, (_, owners) in enumerate(owned):
            for axis, units in enumerate(owners):
                lengths[axis, row] = np.bincount(group_of[units.flatten().numpy()], minlength=groups + 1)
                per_pair[row] //= units.numel()
        lengths //= np.append(self.sizes, 1)
        (reads, writes), fixed = lengths[:, :, :groups], lengths[:, :, groups]
        return Cost(per_pair, reads, fixed[0], writes, fixed[1], conv=np.zeros(len(per_pair), dtype=np.bool_))

    def widths(self, plan: Plan | Mapping[str, int]) -> Ints:
        """Return units kept per group, int64 [groups], in the order of `groups`.

        Raises:
            ValueError: an unknown group, or a width that is no whole number in [0, size].
        """
        if isinstance(plan, Plan):
            self.check(plan)
            plan = plan.widths
        self._known(plan)
        for name, width in plan.items():
            check(f"group {name!r}: width", width, _width(self._sizes[name]))
        return np.array([plan.get(group.name, group.size) for group in self.groups], dtype=np.int64)

    def describe(self, plan: Plan | None = None) -> pd.DataFrame:
        """Return one row per group: what it is, what one unit of it costs, and what a plan removes.

        Columns: group; size; of channels also written_by, through, read_by (layers) and tied_by (operations and the
        modules that they are in); macs_per_unit, the MACs saved by removing one unit alone, from those that write it
        and those that read it; with a plan kept, removed (counts) and removed_units (indices). Layers that stay as they
        are have no row: `whole` lists them.

        Raises:
            ValueError: the plan is not one of this space's.
        """
        table = {
            "group": [group.name for group in self.groups],
            "size": self.sizes,
            **self._connections(),
            "macs_per_unit": self.macs() - self.cost(self.one_less),
        }
        if plan is not None:
            kept = self.widths(plan)
            table |= {"kept": kept, "removed": self.sizes - kept}
            table["removed_units"] = [sorted({*range(g.size)} - {*plan.keep[g.name]}) for g in self.groups]
        return pd.DataFrame(table)

    @property
    def one_less(self) -> Ints:
        """The widths that lack one unit of one group, int64 [groups, groups]: row g lacks one of group g."""
        return self.sizes - np.eye(len(self.groups), dtype=np.int64)

    def by_group(self, values: Tensor) -> dict[str, Tensor]:
        """Split what is there for every unit, [units], by group: {group: [size]}."""
        return dict(zip(self._sizes, values.split(self.sizes.tolist()), strict=True))

    def _connections(self) -> dict[str, list[str]]:
        """Return columns for `describe`: where in the network each group is."""
        return {}

    def check(self, plan: Plan) -> None:
        """Raise ValueError unless the plan was made for a space like this one."""
        check("plan", plan, instance(Plan, "a Plan"))
        if plan.space != self.kind or plan.sizes != self._sizes:
            ours = ", ".join(f"{name}: {size}" for name, size in self._sizes.items())
            raise ValueError(f"{plan} does not fit this network, which has {self.kind} {{{ours}}}")
        for group in self.groups:
            if len(plan.keep[group.name]) < group.least:
                raise ValueError(f"{plan} keeps too little: {group.least} of group {group.name!r} must stay")

    # -- masks ------------------------------------------------------------------------------------------------------

    def gates(self, plan: Plan) -> Tensor:
        """Return one float per unit through all groups, 1 where the plan keeps it and 0 elsewhere."""
        self.check(plan)
        gates = torch.zeros(int(self.sizes.sum()))
        offset = 0
        for group in self.groups:
            gates[torch.tensor(plan.keep[group.name], dtype=torch.int64) + offset] = 1.0
            offset += group.size
        return gates

    def mask(self, plan: Plan) -> nn.Module:
        """Return a copy of the network with everything that removed units own set to zero."""
        masked = copy.deepcopy(self.net)
        self.apply_gates(masked, self.gates(plan))
        return masked

    def apply_gates(self, net: nn.Module, gates: Tensor) -> None:
        """Multiply the gates, [units], into the parameters of `net`, a copy of this space's network, in place."""
        multiply(self.factors(net, gates))

    def factors(self, net: nn.Module, gates: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """List what `apply_gates` multiplies parameters by: each, once for every axis of owners, with their gates.

        The gates have a shape that broadcasts to the parameter's.
        """
        return [
            (parameter, open_ended(gates.to(parameter))[units.to(parameter.device)])
            for parameter, owners in self.owned(net)
            for units in owners
        ]

    # -- optimisers -------------------------------------------------------------------------------------------------

    def carry(self, plan: Plan, optimizer: Optimizer, small: nn.Module) -> Optimizer:
        """Return an optimiser that goes on with the shrunk network where the old one stopped.

        Everything it remembers of a parameter (momentum, second moments) is cut as the parameter was, and gone where
        that is. The old optimiser still holds the old tensors: stepping it would train a network that nobody uses, and
        is an error from now on.

        Args:
            plan: what was kept.
            optimizer: one of torch.optim's over parameters of this space's network; what it remembers of a parameter
                has the parameter's shape, or is a number, which Adafactor and LBFGS do not keep to.
            small: what `shrink(plan)` returned.

        Raises:
            ValueError: the optimiser has a parameter that is not the network's, or remembers what cannot be cut; or the
                network is not the one that the plan leaves.
            RuntimeError: later, when the old optimiser is stepped.
        """
        check("optimizer", optimizer, instance(Optimizer, "a torch.optim.Optimizer"))
        check("small", small, NETWORK)
        names = {id(parameter): name for name, parameter in self.net.named_parameters()}
        known = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if any(id(parameter) not in names for parameter in known):
            raise ValueError("the optimiser has parameters that are not this network's: give the one that trained it")
        new = dict(small.named_parameters())
        stays = [parameter for parameter in known if names[id(parameter)] in new]
        for name, value in self.cut(plan, {names[id(parameter)]: parameter.detach() for parameter in known}).items():
            if name not in new or new[name].shape != value.shape:
                raise ValueError(f"small is not what shrink(plan) returns: its {name!r} would be {list(value.shape)}")
        groups = [
            {**group, "params": [new[name] for p in group["params"] if (name := names[id(p)]) in new]}
            for group in optimizer.param_groups
        ]
        accepted = inspect.signature(type(optimizer)).parameters  # AdamW, for one, has a default that it does not take
        carried = type(optimizer)(groups, **{k: v for k, v in optimizer.defaults.items() if k in accepted})
        along: dict[str, dict[str, Tensor]] = defaultdict(dict)  # state by its key, then by the parameter's name
        for parameter in stays:
            name = names[id(parameter)]
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    along[key][name] = value
                elif isinstance(value, Tensor) and value.dim():
                    raise ValueError(
                        f"{type(optimizer).__name__} cannot be carried: its {key!r} of {name!r}, {list(value.shape)}, "
                        f"has another shape than the parameter, {list(parameter.shape)}"
                    )
                else:
                    carried.state[new[name]][key] = copy.deepcopy(value)
        for key, tensors in along.items():
            for name, value in self.cut(plan, tensors).items():
                carried.state[new[name]][key] = value.clone() if value is tensors[name] else value
        optimizer.register_step_pre_hook(_refuse_step)
        return carried

    # -- inside -----------------------------------------------------------------------------------------------------

    def _known(self, names: Mapping[str, object]) -> None:
        unknown = [name for name in names if name not in self._index]
        if unknown:
            raise ValueError(f"unknown groups {unknown}: this network has {', '.join(self._index)}")

    def _checked(self, scores: Scores) -> Scores:
        of_tensors = "a mapping {group: tensor}"
        check("scores", scores, Legal(of_tensors, lambda given: all(isinstance(s, Tensor) for s in given.values())))
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
        """Remove units in ascending order until the budget is met; the best unit of each group is never removed.

        The result is one that `spent` found within the budget, also where that is measured and does not fall steadily.
        """
        removed_from, left = self._removals(self._priority(scores, ranking))

        def widths(count: int) -> Ints:
            found = self.sizes.copy()
            found[removed_from[:count]] = left[:count]  # of one group's several entries the last one counts
            return found

        spent = self.spent(budget, scores)
        if (least := spent(widths(len(left)))) > budget.fraction:
            whole = "; `whole` says which layers can lose nothing" if self.whole else ""
            raise ValueError(
                f"budget {budget.cost}={budget.fraction} cannot be met: the smallest legal plan, with "
                f"every unit of infinite score, keeps {least:.4f} of the {budget.what}{whole}"
            )
        count = bisect_left(range(len(left)), True, key=lambda count: spent(widths(count)) <= budget.fraction)
        found = widths(count)
        if budget.latency is None:  # no measurement can tell one unit from none
            # Offer steps back, last removed first, where they fit: the groups' units differ in cost. A group of single
            # units is offered one, so that rates stay even; steps of several leave too much of the budget for that.
            last_first = removed_from[:count][::-1].tolist()
            for group in last_first if self.steps.max() > 1 else dict.fromkeys(last_first):
                without = found[group]
                found[group] = min(without + self.steps[group], self.sizes[group])
                if spent(found) > budget.fraction:
                    found[group] = without
        return found

    def _removals(self, priority: Floats) -> tuple[Ints, Ints]:
        """Return, in ascending order of priority, the group that loses a step and how many units are left of it then.

        Units of infinite priority stay.
        """
        order = np.argsort(priority, kind="stable")[: np.count_nonzero(priority < np.inf)]
        group = self._group_of[order]
        removed = np.empty_like(order)  # of the same group, so far
        lost = np.bincount(group, minlength=len(self.sizes))
        removed[np.argsort(group, kind="stable")] = 1 + np.arange(len(order)) - np.repeat(lost.cumsum() - lost, lost)
        left = self.sizes[group] - removed
        whole_steps = left % self.steps[group] == 0
        return group[whole_steps], left[whole_steps]

    def _latency(self, plan: Plan) -> float:
        """Time the shrunk network beside the dense one."""
        example = self.example.to(next(self.net.parameters()))
        times = cost.latencies({"dense": self.net, "cut": self.shrink(plan)}, example)
        return times["cut"].median / times["dense"].median

    def _priority(self, scores: Scores, ranking: Ranking) -> Floats:
        parts = []
        for group in self.groups:
            score = scores[group.name].detach().double().cpu().numpy()
            rank = np.empty(group.size)
            rank[np.argsort(-score, kind="stable")] = np.arange(group.size, 0, -1)
            priority = score.copy() if ranking == "global" else rank / group.size
            priority[(rank == group.size) | (score == np.inf)] = np.inf
            parts.append(priority)
        return np.concatenate(parts)


def _width(size: int) -> Legal:
    return Legal(f"a whole number in [0, {size}]", lambda width: 0 <= index(width) <= size)


def _refuse_step(optimizer: Optimizer, *_: object) -> None:
    raise RuntimeError(
        "this optimiser holds the parameters of a network that was shrunk: step the one `carry` returned"
    )


@torch.no_grad()
def multiply(factors: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Multiply each parameter, in place, by the factor that comes with it."""
    for parameter, factor in factors:
        parameter.mul_(factor)


def open_ended(gates: Tensor) -> Tensor:
    """Append the gate of what is never removed, where unit number -1 finds it."""
    return torch.cat([gates, gates.new_ones(1)])
