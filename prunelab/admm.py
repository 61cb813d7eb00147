"""Structured pruning by ADMM: exact projections on few filters and columns, and the pull towards them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prunelab._arrays import Ints
from prunelab._checks import check_trainable, gradient
from prunelab.masks import Masks
from prunelab.structure import ChannelSpace, ColumnSpace, Plan, RowColumnSpace, Space
from prunelab.structure.space import open_ended
from prunelab.training import State


class Projection:
    """Π_S, where S are the weights with at most so many units, in each group, that are not zero.

    The set is on what computes a unit: the filters of all layers that write it, or its column. Zeroing the units of
    least L2 norm is the exact Euclidean projection on it, counted and not by percentile. For filters and columns at
    once no simple exact projection is known: here it is Π_columns(Π_filters(V)), where the columns of channels that
    went are the first zeros of a convolution.

    Args:
        space: of filters, columns or both; the network in it is the one that is trained.
        present: what earlier cuts left; nothing else can be kept.

    Attributes:
        weights: the parameters that S constrains.
    """

    def __init__(self, space: Space, present: Plan | None = None) -> None:
        self.space, self.present = space, present or space.plan({})
        constrained = _constrained(space)
        self.weights = [weight for weight, _ in constrained]
        self._owners = [[units.to(weight.device) for units in owners] for weight, owners in constrained]

    def norms(self, values: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm of every unit in values that have the shapes of `weights`, float [units]."""
        squares = values[0].new_zeros(int(self.space.sizes.sum()) + 1)  # the last place gathers what is never removed
        for value, owners in zip(values, self._owners, strict=True):
            for units in owners:
                over = [dim for dim, size in enumerate(units.shape) if size == 1]
                found = value.detach().square().sum(over).flatten()
                squares.index_add_(0, units.flatten() % len(squares), found)
        return squares[:-1].sqrt()

    def plan(self, values: Sequence[Tensor], widths: Ints) -> Plan:
        """Return which units of `present` stay non-zero, at most as many in each group as `widths` says."""
        plan = self.best(self.norms(values), widths)
        if isinstance(self.space, RowColumnSpace):  # columns by what is left of them when the filters have gone
            filters = self.space.gates(plan)
            filters[int(self.space.rows.sizes.sum()) :] = 1
            plan = self.best(self.norms(self._masked(values, filters)), widths)
        return plan

    def best(self, scores: Tensor, widths: Ints) -> Plan:
        """Keep the units of `present` with the highest scores, [units]."""
        scores = scores.cpu().masked_fill(self.space.gates(self.present) == 0, -torch.inf)
        return self.space.both(self.space.plan_for(self.space.by_group(scores), widths.tolist()), self.present)

    def masked(self, values: Sequence[Tensor], plan: Plan) -> list[Tensor]:
        """Return the values with the units that a plan removes at zero."""
        return self._masked(values, self.space.gates(plan))

    def _masked(self, values: Sequence[Tensor], gates: Tensor) -> list[Tensor]:
        gates = open_ended(gates.to(values[0]))
        pairs = zip(values, self._owners, strict=True)
        return [math.prod((gates[units] for units in owners), start=value.detach()) for value, owners in pairs]


def _constrained(space: Space) -> list[tuple[nn.Parameter, list[Tensor]]]:
    """List the weights that compute units, with the units along their filters and of their columns."""
    if isinstance(space, ColumnSpace):
        return space.owned(space.net)
    rows = space.rows if isinstance(space, RowColumnSpace) else space
    if not isinstance(rows, ChannelSpace):
        raise ValueError(f"ADMM prunes filters and columns; this space has {space.kind}")
    owners: dict[str, list[Tensor]] = {}
    for axis in rows.coupling.axes:
        if axis.role == "out" and (axis.units >= 0).any():
            owners[axis.name] = [axis.along(rows.net.get_parameter(axis.name).dim())]
    if isinstance(space, RowColumnSpace):
        first = int(rows.sizes.sum())
        for group, (_, (columns,)) in zip(space.columns.groups, space.columns.owned(space.net), strict=True):
            owners.setdefault(f"{group.name}.weight", []).append(columns + first)
    return [(space.net.get_parameter(name), units) for name, units in owners.items()]


class ADMM(Masks):
    """Training with W pulled towards Z: min f(W) + g(Z) subject to W = Z, g the indicator of S.

    W^{k+1} = argmin f(W) + (ρ/2)·||W − Z^k + U^k||²    a part of the run: ρ·(W − Z + U) joins the gradient
    Z^{k+1} = Π_S(W^{k+1} + U^k)
    U^{k+1} = U^k + W^{k+1} − Z^{k+1}

    starts from U = 0 and Z = Π_S(W), and ρ grows by a factor at every update of Z and U, which are spread evenly over
    the run, the last one at its end.

    Args:
        projection: on S; its network is the one that is trained, zeros of its `present` plan stay.
        widths: units per group that S allows, int64 [groups].
        rho: ρ at the start, >= 0.
        growth: the factor, >= 1.
        updates: of Z and U in the run, >= 1.

    Attributes:
        residuals: ||W − Z|| / ||W|| at the start and after each update, with the Z of that update.
    """

    def __init__(self, projection: Projection, widths: Ints, rho: float, growth: float, updates: int) -> None:
        super().__init__(projection.space, projection.present)
        self.projection, self.widths = projection, widths
        self.rho, self.growth, self.updates = rho, growth, updates
        self.residuals: list[float] = []

    def start(self, state: State) -> None:
        """Set U = 0 and Z = Π(W)."""
        super().start(state)
        check_trainable("ADMM", self.projection.weights)
        self.dual = [torch.zeros_like(weight) for weight in self.projection.weights]
        self._project()

    @torch.no_grad()
    def after_gradients(self, state: State) -> None:
        """Add the gradient of the quadratic penalty."""
        for weight, z, u in zip(self.projection.weights, self.z, self.dual, strict=True):
            gradient("ADMM", weight).add_(weight - z + u, alpha=self.rho)

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        """Keep old zeros; update Z, U and ρ where it is due."""
        super().after_step(state)
        if (state.step + 1) * self.updates // state.steps > state.step * self.updates // state.steps:
            self._project()
            for u, weight, z in zip(self.dual, self.projection.weights, self.z, strict=True):
                u.add_(weight).sub_(z)
            self.rho *= self.growth

    def support(self) -> Plan:
        """Return the support of Π(W): what the hard cut after the last iteration keeps."""
        return self.projection.plan(self.projection.weights, self.widths)

    @torch.no_grad()
    def _project(self) -> None:
        weights = self.projection.weights
        values = [weight + u for weight, u in zip(weights, self.dual, strict=True)]
        self.z = self.projection.masked(values, self.projection.plan(values, self.widths))
        apart = sum(float((weight - z).square().sum()) for weight, z in zip(weights, self.z, strict=True))
        total = sum(float(weight.square().sum()) for weight in weights)
        self.residuals.append(float(np.sqrt(apart / total)))
