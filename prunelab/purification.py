"""Purification (Liu et al., AAAI 2020): remove units that pruning has left without effect, or nearly so."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from prunelab._arrays import Ints
from prunelab.admm import Projection
from prunelab.structure import Budget, ChannelSpace, Plan, RowColumnSpace, Space

Measure = Callable[[Plan], float]

THRESHOLDS = 16  # that a purification tries at most
FALL = 0.99  # of the cost that is left, from one threshold to the next


def purify(
    space: Space, present: Plan, budget: Budget, measure: Measure, epsilon: float
) -> tuple[Plan, Plan, dict[str, float]]:
    """Remove from the network, in place, what is dead and then what is nearly so, until the budget or epsilon stops it.

    Returns the plan without what is dead, which costs nothing at all; the plan at the end; and the quick accuracy
    before and after, with the largest factor τ that was within epsilon.
    """
    dead = without_dead(space, present)
    there = space.spent(budget)(space.widths(dead))
    strengths = strength(space, dead)
    accuracy = before = measure(dead)
    plan = dead
    falling = [there * FALL ** (step + 1) for step in range(THRESHOLDS)] if there > budget.fraction else []
    for fraction in dict.fromkeys(max(budget.fraction, lower) for lower in falling):
        smaller = weakest_gone(space, dead, strengths, budget.at(fraction))
        found = measure(smaller)
        if before - found > epsilon:
            break
        plan, accuracy = smaller, found
    removed = torch.where(space.gates(dead) > space.gates(plan), strengths, 0.0)
    space.apply_gates(space.net, space.gates(plan))
    return dead, plan, {"before": before, "after": accuracy, "tau": float(removed.max())}


def without_dead(space: Space, present: Plan) -> Plan:
    """Return the plan without the units that have no effect at all on the output of the space's network.

    Dead are columns of zeros, filters all of whose readers have zeros for them, and filters that are zero with their
    biases and batch norm, or else that would leave a constant. Removing some can make others dead. A group keeps one.
    """
    while True:
        space.apply_gates(space.net, space.gates(present))
        projection = Projection(space, present)
        dead = projection.norms(projection.weights) == 0
        if (rows := _rows(space)) is not None:
            dead[: int(rows.sizes.sum())] = (_read(rows) == 0) | (_own(rows) == 0)
        alive = {name: np.flatnonzero(~gone.numpy()).tolist() for name, gone in space.by_group(dead.cpu()).items()}
        keep = {name: [*{*kept} & {*present.keep[name]}] or present.keep[name][:1] for name, kept in alive.items()}
        smaller = space.both(space.plan(keep), present)
        if smaller == present:
            return present
        present = smaller


def strength(space: Space, present: Plan) -> Tensor:
    """Return the norm of every unit over the mean norm of its group's present units, [units].

    Of a filter, it is no more than that of the largest column that reads it, by the mean of that layer's columns.
    """
    projection = Projection(space, present)
    norms = projection.norms(projection.weights).cpu()
    there = space.gates(present)
    parts = zip(space.by_group(norms).values(), space.by_group(there).values(), strict=True)
    found = torch.cat([part / (part @ kept / kept.sum()) for part, kept in parts])
    if (rows := _rows(space)) is not None:
        count = int(rows.sizes.sum())
        found[:count] = found[:count].minimum(_read(rows))
    return found


def weakest_gone(space: Space, present: Plan, strengths: Tensor, target: Budget) -> Plan:
    """Remove present units below one threshold for all groups, as many as the target needs."""
    projection, most = Projection(space, present), space.widths(present)
    scores = strengths.masked_fill(space.gates(present) == 0, -torch.inf)
    plan = space.plan_for(space.by_group(scores), target, "global")
    widths = np.minimum(space.widths(plan), most)
    return projection.best(strengths, filled(space, widths, most, target, np.argsort(most)))


def _rows(space: Space) -> ChannelSpace | None:
    """Return the space of the filters, if they can be removed."""
    if isinstance(space, RowColumnSpace):
        return space.rows
    return space if isinstance(space, ChannelSpace) else None


def _read(rows: ChannelSpace) -> Tensor:
    """Return the norm of the largest column that reads each filter, over the mean of those that are not zero."""
    found = torch.full((int(rows.sizes.sum()) + 1,), -torch.inf)
    parameters = dict(rows.net.named_parameters())
    for axis in rows.coupling.axes:
        if axis.role == "in" and axis.name in parameters:
            columns = parameters[axis.name].detach().transpose(0, axis.dim).norm(dim=1)  # [channels, positions...]
            columns = (columns / columns[columns > 0].mean()).nan_to_num(0.0).reshape(len(columns), -1).amax(1)
            found.scatter_reduce_(0, torch.from_numpy(axis.units) % len(found), columns.cpu(), "amax")
    return found[:-1].masked_fill(found[:-1] == -torch.inf, torch.inf)


def _own(rows: ChannelSpace) -> Tensor:
    """Return the largest of all numbers that make each filter's output: weights, biases, batch norm."""
    found = torch.zeros(int(rows.sizes.sum()) + 1)
    parameters = dict(rows.net.named_parameters())
    for axis in rows.coupling.axes:
        module = rows.net.get_submodule(axis.module)
        shifts = axis.tensor == "running_mean" and not getattr(module, "affine", True)
        if axis.role != "in" and (axis.name in parameters or shifts):
            tensor: Tensor = getattr(module, axis.tensor)
            largest = tensor.detach().abs().transpose(0, axis.dim).reshape(tensor.shape[axis.dim], -1).amax(1)
            found.scatter_reduce_(0, torch.from_numpy(axis.units) % len(found), largest.cpu(), "amax")
    return found[:-1]


def filled(space: Space, widths: Ints, most: Ints, target: Budget, order: Ints) -> Ints:
    """Give units back, one to each group in turn and in this order, as long as the target is met."""
    spent, names = space.spent(target), [group.name for group in space.groups]
    fits = True
    while fits:
        fits = False
        for group in order[widths[order] < most[order]]:
            more = widths.copy()
            more[group] += 1
            more = space.widths(dict(zip(names, more.tolist(), strict=True)))  # no more columns than channels have
            if more[group] > widths[group] and spent(more) <= target.fraction:
                widths, fits = more, True
    return widths
