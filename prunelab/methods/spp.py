"""Structured Probabilistic Pruning (Wang et al. 2017, arXiv 1709.06994).

Every unit has a probability p of being masked, which starts at 0. Every t steps the units of a layer are ranked by
their L1 norm and p moves by Δ(rank): up for the weakest, down for the others, so a unit that recovers its norm recovers
its place. p = 1 is final.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from prunelab import scores
from prunelab._arrays import Floats
from prunelab._checks import FLAG, FRACTION, POSITIVE, check_fields, integer, one_of, within
from prunelab.methods.base import Pruned, space_of
from prunelab.structure import Budget, Space
from prunelab.structure.space import open_ended
from prunelab.training import Context, Hook, State

LARGEST_EXPONENT = 50.0  # far beyond the target rank the curve would overflow; p is clamped to 0 there anyway


def increment(rank: Floats, target: int, A: float = 0.05, u: float = 0.25) -> Floats:
    """Return Δ(r), the change of the pruning probability of a unit at (0-based, ascending) rank r.

    Δ(r) = A·exp(−αr) for r ≤ N, and 2uA − A·exp(−α(2N − r)) beyond, with α = ln(2/u)/T and N = −ln(u)/α: strictly
    decreasing from A, through uA at N, to 0 at the target rank T, and negative behind it.
    """
    alpha = math.log(2 / u) / target
    centre = -math.log(u) / alpha
    mirrored = np.minimum(-alpha * (2 * centre - rank), LARGEST_EXPONENT)
    return np.where(rank <= centre, A * np.exp(-alpha * rank), 2 * u * A - A * np.exp(mirrored))


class PruningProbability:
    """The pruning probabilities of one layer's units, p in [0, 1]^size, and the rule that moves them.

    Args:
        size: units in the layer.
        remove: how many must go, exactly.
        settings: A, u, margin, averaging and recovery are used.
    """

    def __init__(self, size: int, remove: int, settings: SPP) -> None:
        self.remove, self.settings = remove, settings
        self.p: Floats = np.zeros(size)
        self.gone = np.zeros(size, dtype=bool)
        self.score: Floats = np.zeros(size)

    @property
    def finished(self) -> bool:
        """Whether as many units have reached p = 1 as must go."""
        return int(self.gone.sum()) == self.remove

    def update(self, score: Floats) -> None:
        """Move every p by Δ of its rank among the units that are left; those that reach 1 are gone for good."""
        self.score = self.settings.averaging * self.score + score
        alive = np.flatnonzero(~self.gone)
        order = alive[np.argsort(self.score[alive], kind="stable")]
        aim = min(self.remove + math.ceil(self.settings.margin * len(self.p)), len(self.p) - 1)
        ranks = np.arange(len(order), dtype=float)
        change = increment(ranks, aim - int(self.gone.sum()), self.settings.A, self.settings.u)
        if not self.settings.recovery:
            change = np.maximum(change, 0)
        before = self.p.copy()
        self.p[order] = np.clip(self.p[order] + change, 0, 1)
        certain = order[self.p[order] >= 1]
        left = self.remove - int(self.gone.sum())
        self.gone[certain[:left]] = True
        self.p[certain[left:]] = before[certain[left:]]  # the count is full: who stays is not certain to go

    def finish(self) -> None:
        """Remove what is still missing from the count: the units most likely to go, the weaker of two equals first."""
        alive = np.flatnonzero(~self.gone)
        order = alive[np.lexsort((self.score[alive], -self.p[alive]))]
        self.gone[order[: self.remove - int(self.gone.sum())]] = True
        self.p[self.gone] = 1

    def settle(self) -> Floats:
        """Return the factor of each unit's weights, [size]: 0 if it is gone, else 1, or 1 − p when the count is full.

        From then on the others stay for certain: their p is 0.
        """
        factor = 1 - self.p if self.finished else 1.0 - self.gone
        if self.finished:
            self.p = self.gone.astype(float)
        return factor


@dataclass(frozen=True)
class SPP:
    """Structured Probabilistic Pruning, on columns as in the paper or on filters.

    In plain networks the authors' code also removes a filter as soon as the next layer has lost all columns that read
    it. Here it stays, and so do its multiply-adds: layers lose columns alone, each its own count.

    Attributes:
        A: largest step of p, in (0, 1].
        u: height of the middle of Δ relative to A, in (0, 1).
        t: training steps between two updates of p, >= 1.
        unit: "columns" of the im2col matrix (the paper's) or "filters".
        recovery: the paper's claim; False cuts Δ at 0, so that p can only grow and nothing else changes.
        margin: δ in [0, 1), the layer aims at (R + δ)·N units, N − 1 at most, and stops at R·N. 0 in the published
            code's defaults; its helper scripts write 0.1, without which the last few units may wait for ever.
        averaging: γ of the score, in [0, 1), S ← γ·S + s. 0 in the published code.
        share: the part of the effort, in (0, 1], after which layers that have not finished are cut at the exact count.
        lr: constant learning rate while pruning, > 0; the paper's is not known.

    Raises ValueError naming the field, its value and the legal values; when called, for a budget that cannot be met.
    """

    name: ClassVar[str] = "spp"

    A: float = 0.05
    u: float = 0.25
    t: int = 180
    unit: str = "columns"
    recovery: bool = True
    margin: float = 0.0
    averaging: float = 0.0
    share: float = 0.5
    lr: float = 0.01

    def __post_init__(self) -> None:
        check_fields(
            self,
            self.name,
            A=FRACTION,
            u=within("(0, 1)"),
            t=integer(1),
            unit=one_of(("columns", "filters")),
            recovery=FLAG,
            margin=within("[0, 1)"),
            averaging=within("[0, 1)"),
            share=FRACTION,
            lr=POSITIVE,
        )

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Prune while training at a constant rate; the retraining of the fixed structure is the caller's.

        The history holds `p`: {group: [updates, size]}, every probability after every update until the layer was
        finished, `finished`: whether every layer reached its count by itself, and `steps`: of training.
        """
        net = copy.deepcopy(net)
        space = space_of(self.unit, net, context.data.example)
        pruning = Pruning(space, self.counts(space, budget), self)
        phase = context.constant(self.share * context.recipe.epochs, self.lr)
        spent = context.train(net, phase, pruning, self.name)
        finished = pruning.finish()
        plan = space.plan({name: np.flatnonzero(~layer.gone).tolist() for name, layer in pruning.layers.items()})
        trace = {name: np.array(rows, dtype=np.float32) for name, rows in pruning.trace.items()}
        return Pruned(space.shrink(plan), plan, spent.epochs, {"p": trace, "finished": finished, "steps": spent.steps})

    def counts(self, space: Space, budget: Budget) -> dict[str, int]:
        """How many units each group must lose, R·N_c with the same R everywhere."""
        plan = space.plan_for(scores.l1(space), budget)
        return {group.name: group.size - plan.widths[group.name] for group in space.groups}


class Pruning(Hook):
    """The training side: sample masks every step, refresh the probabilities every t steps."""

    def __init__(self, space: Space, remove: Mapping[str, int], settings: SPP) -> None:
        self.space, self.t = space, settings.t
        self.layers = {g.name: PruningProbability(g.size, remove[g.name], settings) for g in space.groups}
        self.trace: dict[str, list[Floats]] = {name: [] for name in self.layers}

    def start(self, state: State) -> None:
        """Look up, once, which parameters the masks touch."""
        self.owned = self.space.owned(state.net)
        self.momentum = [state.optimizer.state[parameter] for parameter, _ in self.owned]

    def before_step(self, state: State) -> None:
        """Refresh p where it is due; then hide the units whose g_j ~ Bernoulli(1 − p_j) is 0."""
        if state.step % self.t == 0:
            self.refresh()
            state.stop = all(layer.finished for layer in self.layers.values())
        keep = 1 - torch.from_numpy(np.concatenate([layer.p for layer in self.layers.values()])).float()
        gates = open_ended(torch.bernoulli(keep).to(self.owned[0][0]))
        self.masks = [math.prod((gates[u] for u in units), start=gates.new_ones(())) for _, units in self.owned]
        self.stored = [parameter.detach().clone() for parameter, _ in self.owned]
        with torch.no_grad():
            for (parameter, _), mask in zip(self.owned, self.masks, strict=True):
                parameter.mul_(mask)

    @torch.no_grad()
    def after_gradients(self, state: State) -> None:
        """Give hidden weights their values back, without a gradient and with their momentum erased."""
        touched = zip(self.owned, self.masks, self.stored, self.momentum, strict=True)
        for (parameter, _), mask, stored, momentum in touched:
            parameter.copy_(stored)
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
            if momentum.get("momentum_buffer") is not None:
                momentum["momentum_buffer"].mul_(mask)

    def refresh(self) -> None:
        """Update the probabilities from the stored weights; remove for good what reached p = 1."""
        norms = scores.l1(self.space)
        for name, layer in self.layers.items():
            if not layer.finished:
                layer.update(norms[name].double().cpu().numpy())
                self.trace[name].append(layer.p.copy())
        self._settle()

    def finish(self) -> bool:
        """Cut every layer that has not finished at its count; return whether all had."""
        finished = all(layer.finished for layer in self.layers.values())
        for layer in self.layers.values():
            layer.finish()
        self._settle()
        return finished

    def _settle(self) -> None:
        factors = np.concatenate([layer.settle() for layer in self.layers.values()])
        self.space.apply_gates(self.space.net, torch.from_numpy(factors))
