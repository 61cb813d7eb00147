"""Rows and columns of the im2col matrices at once: filters, with what is tied to them, and columns."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prunelab._arrays import Bools, Floats, Ints
from prunelab.structure.channels import ChannelSpace
from prunelab.structure.columns import ColumnSpace
from prunelab.structure.plan import Plan
from prunelab.structure.space import Budget, Cost, Group, Ranking, Scores, Space


class RowColumnSpace(Space):
    """The groups of `ChannelSpace`, then those of `ColumnSpace`, the latter named "<convolution> columns".

    A column goes with the channel that it reads: no plan of this space keeps a column of a removed channel. So a
    convolution reads as many rows of im2col as it has columns left, and its multiply-adds stay a closed form of the
    widths. `plan_for` picks the filters first, and then the best of the columns whose channel stays, whatever score the
    others have; a share is one of all columns, and where fewer have their channel left, all those stay.

    Args:
        net: a network that torch.fx can trace.
        example: an input, float [N, C, H, W]; its spatial size fixes the MACs.

    Raises:
        UntraceableError: as `ChannelSpace` and `ColumnSpace`.
    """

    kind = "rows+columns"

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        self.example = example
        self.rows, self.columns = ChannelSpace(net, example), ColumnSpace(net, example)
        self.column_groups = {group.name: f"{group.name} columns" for group in self.columns.groups}  # by convolution
        columns = [Group(self.column_groups[group.name], group.size) for group in self.columns.groups]
        super().__init__(net, (*self.rows.groups, *columns), _cost(self.rows.cost, self.columns.cost))
        self._first = int(self.rows.sizes.sum())  # the number of the first column

        convolutions = self.columns.convolutions
        kernels = np.array([conv.weight[0, 0].numel() for conv in convolutions.values()])
        reads = {id(self.rows.tensor(a)): a.units for a in self.rows.coupling.axes if a.role == "in"}
        self._channels = {  # the unit whose channel each column reads, -1 where it always stays
            name: np.repeat(reads[id(conv.weight)], kernel)
            for (name, conv), kernel in zip(convolutions.items(), kernels, strict=True)
        }
        layers = self.columns.cost.reads.argmax(axis=0)  # the convolutions' places among the layers
        self._per_filter = kernels[:, None] * self.rows.cost.reads[layers]  # columns that read a unit of a row group
        self._always = kernels * self.rows.cost.reads_fixed[layers]

    @property
    def whole(self) -> dict[str, str]:
        """Layers that can lose no filter, as `ChannelSpace.whole`; they may lose columns."""
        return self.rows.whole

    def owned(self, net: nn.Module) -> list[tuple[nn.Parameter, list[Tensor]]]:
        """List what filters own; kernels, [out, C, kh, kw], with their filters and their columns, [1, C, kh, kw]."""
        filters = {a.name: a.units for a in self.rows.coupling.axes if a.role == "out" and (a.units >= 0).any()}
        kernels = self.columns.owned(net)
        taken = {id(kernel) for kernel, _ in kernels}
        found = [(parameter, units) for parameter, units in self.rows.owned(net) if id(parameter) not in taken]
        for group, (kernel, (columns,)) in zip(self.columns.groups, kernels, strict=True):
            rows = filters.get(f"{group.name}.weight")
            along = [] if rows is None else [torch.from_numpy(rows).view(-1, 1, 1, 1)]
            found.append((kernel, [*along, columns + self._first]))
        return found

    def unit_weights(self, group: str) -> Tensor:
        """Return filters, [size, weights per filter], or columns, [columns, filters]."""
        self._known({group: None})
        for convolution, name in self.column_groups.items():
            if name == group:
                return self.columns.unit_weights(convolution)
        return self.rows.unit_weights(group)

    def readable(self, plan: Plan) -> Tensor:
        """Return, by unit, whether it is a filter or a column whose channel stays: a plan has no choice of others."""
        stays = np.concatenate(list(self._channels_stay(self._row_plan(plan)).values()))
        return torch.cat([torch.ones(self._first, dtype=torch.bool), torch.from_numpy(stays)])

    def best(self, scores: Scores, widths: Ints) -> Plan:
        """Keep the best filters, then the best columns among those whose channel stays."""
        stays = self._channels_stay(self.rows.best(scores, widths[: len(self.rows.groups)]))
        readable = dict(scores)
        for convolution, group in self.column_groups.items():
            gone = torch.from_numpy(~stays[convolution]).to(scores[group].device)
            readable[group] = scores[group].masked_fill(gone, -torch.inf)
        return super().best(readable, widths)

    def plan(self, keep: Mapping[str, Sequence[int]]) -> Plan:
        """Return the plan that keeps the given indices, but for columns of removed channels.

        Groups not named stay whole. A convolution that would be left without a column keeps the first that it can.
        """
        asked = super().plan(keep)
        stays = self._channels_stay(self._row_plan(asked))
        kept = dict(asked.keep)
        for convolution, group in self.column_groups.items():
            possible = stays[convolution]
            kept[group] = tuple(j for j in kept[group] if possible[j]) or (int(possible.argmax()),)
        return Plan(self.kind, asked.sizes, kept)

    def widths(self, plan: Plan | Mapping[str, int]) -> Ints:
        """Return units kept per group, int64 [groups]; of columns, at most as many as the channels left have."""
        rows, columns = np.split(super().widths(plan), [len(self.rows.groups)])
        return np.concatenate([rows, np.minimum(columns, self._per_filter @ rows + self._always)])

    def check(self, plan: Plan) -> None:
        """Raise ValueError unless the plan was made for a space like this one, and by its `plan`."""
        super().check(plan)
        if plan != self.plan(plan.keep):
            raise ValueError(f"{plan} keeps columns of removed channels: make it with `plan`, which drops them")

    def shrink(self, plan: Plan) -> nn.Module:
        """Return a narrower network, with `ColumnConv2d` where a convolution loses columns of channels that stay."""
        columns = self._renumbered(plan)
        narrow = ColumnSpace(self.rows.shrink(self._row_plan(plan)), self.example)
        return narrow.shrink(narrow.plan(columns))

    def cut(self, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut along the channels, then keep the columns of what has the shape of a kernel that loses more."""
        columns = self._renumbered(plan)
        found = self.rows.cut(self._row_plan(plan), tensors)
        for convolution, kept in columns.items():
            name = f"{convolution}.weight"
            if name in found and len(kept) < found[name][0].numel():
                found[name] = found[name].flatten(1)[:, kept]
        return found

    # -- inside -----------------------------------------------------------------------------------------------------

    def _connections(self) -> dict[str, list[str]]:
        """Say of filters where they are, as `ChannelSpace` does; columns are where the name says."""
        none = [""] * len(self.columns.groups)
        return {column: [*where, *none] for column, where in self.rows._connections().items()}

    def _row_plan(self, plan: Plan) -> Plan:
        return self.rows.plan({group.name: plan.keep[group.name] for group in self.rows.groups})

    def _channels_stay(self, rows: Plan) -> dict[str, Bools]:
        """Say of each column of a convolution whether the filters that a plan keeps write what it reads."""
        kept = np.append(self.rows.gates(rows).numpy() > 0, True)
        return {convolution: kept[units] for convolution, units in self._channels.items()}

    def _renumbered(self, plan: Plan) -> dict[str, list[int]]:
        """Number the kept columns of each convolution among those of the channels that are left."""
        self.check(plan)
        return {
            convolution: (stays.cumsum() - 1)[list(plan.keep[self.column_groups[convolution]])].tolist()
            for convolution, stays in self._channels_stay(self._row_plan(plan)).items()
        }

    def _widths_within(self, budget: Budget, scores: Scores, ranking: Ranking) -> Ints:
        """Find the filters that go, in one order with the columns; then let the best columns stay, as many as fit."""
        widths = super()._widths_within(budget, scores, ranking)
        if budget.latency is not None:  # no measurement can tell a few columns from none
            return widths
        stays = self._channels_stay(self.rows.best(scores, widths[: len(self.rows.groups)]))
        readable = np.concatenate(list(stays.values()))
        priority = super()._priority(scores, ranking)[self._first :]
        self._let_best_stay(priority, readable)
        left = np.flatnonzero(readable)
        best_first = self._group_of[self._first :][left[np.argsort(-priority[left], kind="stable")]]
        widths[len(self.rows.groups) :] = 0

        def with_best(count: int) -> Ints:
            return widths + np.bincount(best_first[:count], minlength=len(widths))

        spent, counts = self.spent(budget, scores), range(len(best_first) + 1)
        return with_best(bisect.bisect_right(counts, budget.fraction, key=lambda count: spent(with_best(count))) - 1)

    def _priority(self, scores: Scores, ranking: Ranking) -> Floats:
        """Let a column go no later than just before the channel that it reads."""
        rows, columns = np.split(super()._priority(scores, ranking), [self._first])
        channels = np.append(rows, np.inf)[np.concatenate(list(self._channels.values()))]
        always = channels == np.inf
        columns = np.minimum(columns, np.where(always, np.inf, np.nextafter(channels, -np.inf)))
        self._let_best_stay(columns, always)
        return np.concatenate([rows, columns])

    def _let_best_stay(self, priority: Floats, candidates: Bools) -> None:
        """Put, in place, each convolution's best candidate above all its other columns; there is always one."""
        for start, stop in itertools.pairwise(np.cumsum([0, *self.columns.sizes]).tolist()):
            possible = start + np.flatnonzero(candidates[start:stop])
            priority[possible[np.argmax(priority[possible])]] = np.inf


def _cost(rows: Cost, columns: Cost) -> Cost:
    """Let convolutions with columns read those, and the other layers channels."""
    gathers = columns.reads.sum(axis=1) > 0
    return Cost(
        per_pair=columns.per_pair,
        reads=np.hstack([np.where(gathers[:, None], 0, rows.reads), columns.reads]),
        reads_fixed=np.where(gathers, 0, rows.reads_fixed),
        writes=np.hstack([rows.writes, np.zeros_like(columns.reads)]),
        writes_fixed=rows.writes_fixed,
        conv=rows.conv,
    )
