"""Pruning CNNs for Resource Efficient Inference (Molchanov et al., ICLR 2017): the first-order Taylor criterion."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from prunelab._checks import FRACTION, NOT_NEGATIVE, POSITIVE, check_fields, integer
from prunelab.masks import Masks
from prunelab.methods.base import Pruned
from prunelab.structure import Budget, ChannelSpace, Plan
from prunelab.training import Context, State


@dataclass(frozen=True)
class Taylor:
    """Alternate training and removing the filters whose loss would change least, ranked across the network.

    Every `updates` mini-batches the units of least Θ̂ - λ·Θ^flops go: Θ̂ is the mean Θ of those batches over the L2 norm
    of its group, Θ^flops the MFLOPs, two per multiply-add, that one feature map costs at the present widths. The
    multiply-adds fall by the same amount each time, the last time to the budget; what is removed stays at zero. A unit
    of a hidden linear layer counts as a feature map of one pixel.

    flops_regularisation: λ >= 0.
    updates: mini-batches between two removals, >= 1; fewer if `share` leaves too little effort for them.
    share: of the context's epochs, in (0, 1], that pruning may take.
    lr: learning rate, > 0, constant while pruning. The paper's 1e-4 and 3e-4 are for networks pretrained on
        ImageNet.

    Raises ValueError naming the field, its value and the legal range; when called, if `share` is not one update.
    `Pruned.history` has "widths": {group: units left} after each removal.
    """

    name: ClassVar[str] = "taylor"

    flops_regularisation: float = 1e-3
    updates: int = 30
    share: float = 0.5
    lr: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(
            self,
            self.name,
            flops_regularisation=NOT_NEGATIVE,
            updates=integer(1),
            share=FRACTION,
            lr=POSITIVE,
        )

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Prune a copy of the network while training it."""
        space = ChannelSpace(copy.deepcopy(net), context.data.example)
        steps = int(self.share * context.recipe.epochs * context.steps_per_epoch)
        if steps < 1:
            raise ValueError(f"taylor: share is {self.share}: of {context.recipe.epochs} epochs that is not one update")
        updates = min(self.updates, steps)
        rounds = steps // updates
        phase = context.constant(rounds * updates / context.steps_per_epoch, self.lr)
        with gated(space) as theta:
            hook = _Removal(space, theta, self, budget, updates, rounds)
            run = context.train(space.net, phase, hook, self.name)
        return Pruned(space.shrink(hook.plan), hook.plan, run.epochs, {"widths": hook.widths})


class Theta:
    """Θ of every unit, gathered over mini-batches; call `collect` after each backward pass.

    Θ(z) = |1/M Σ_m ∂C/∂z_m · z_m| of an example's feature map z of M positions, averaged over examples. Each map gets
    a gate of one, as ∂C/∂gate = Σ_m ∂C/∂z_m · z_m: at the batch norm behind the layer, or at the layer if no batch norm
    alone reads it. The paper's maps lie behind the ReLU, where Θ is the same, because ∂C/∂z_m · z_m is. (A max pool
    keeps the sum too, and all maps of a layer share M.) Where several layers write a unit, their Θ add up.

    Args:
        units: per layer, the unit that each of its channels belongs to, -1 for none.
        count: how many units there are.
    """

    def __init__(self, units: Mapping[str, Tensor], count: int) -> None:
        self._units, self._count = units, count
        self._gates: list[tuple[str, Tensor, int]] = []
        self._sums: dict[str, Tensor] = {}
        self._batches = 0

    def gate(self, layer: str, module: nn.Module, inputs: object, maps: Tensor) -> Tensor | None:
        """Put gates on the maps of a layer: a forward hook."""
        if not torch.is_grad_enabled():
            return None
        channels = maps.dim() - 1 if isinstance(module, nn.Linear) else 1
        shape = [n if dim in (0, channels) else 1 for dim, n in enumerate(maps.shape)]
        gates = maps.new_ones(shape, requires_grad=True)
        self._gates.append((layer, gates, maps.numel() // gates.numel()))
        return maps * gates

    def collect(self) -> None:
        """Add the Θ of the mini-batch whose mean loss was just differentiated."""
        for layer, gates, positions in self._gates:
            if gates.grad is None:  # the loss does not depend on these maps
                continue
            # One of T examples has T times this gradient, as the loss is a mean; the mean over examples divides by T.
            theta = gates.grad.flatten(1).float().abs().sum(0) / positions
            self._sums[layer] = self._sums[layer] + theta if layer in self._sums else theta
        self._gates.clear()
        self._batches += 1

    def take(self) -> Tensor:
        """Return the mean Θ per unit since the last call, float [units]."""
        theta = torch.zeros(self._count + 1)  # the last place gathers what belongs to no unit
        for layer, total in self._sums.items():
            theta.index_add_(0, self._units[layer] % (self._count + 1), total.cpu() / self._batches)
        self._sums.clear()
        self._batches = 0
        return theta[:-1]


@contextmanager
def gated(space: ChannelSpace) -> Iterator[Theta]:
    """Gate the maps of the space's own network in every forward pass with gradients, until the context ends."""
    writers = {axis.module: axis.units for group in space.groups for axis in space.writers(group.name)}
    theta = Theta({layer: torch.from_numpy(units) for layer, units in writers.items()}, int(space.sizes.sum()))
    seen_at = {layer: space.net.get_submodule(space.coupling.norms.get(layer, layer)) for layer in writers}
    hooks = [module.register_forward_hook(partial(theta.gate, layer)) for layer, module in seen_at.items()]
    try:
        yield theta
    finally:
        for hook in hooks:
            hook.remove()


class _Removal(Masks):
    """Every `updates` steps, remove what takes the multiply-adds one of `rounds` equal parts nearer to the budget."""

    space: ChannelSpace

    def __init__(
        self, space: ChannelSpace, theta: Theta, method: Taylor, budget: Budget, updates: int, rounds: int
    ) -> None:
        super().__init__(space, space.plan({}))
        self.theta, self.method, self.budget = theta, method, budget
        self.updates, self.rounds = updates, rounds
        self.widths: list[dict[str, int]] = []

    def after_gradients(self, state: State) -> None:
        self.theta.collect()

    def after_step(self, state: State) -> None:
        done, since = divmod(state.step + 1, self.updates)
        if since == 0:
            scores = ranking(self.space, self.theta.take(), self.plan, self.method.flops_regularisation)
            fraction = self.budget.fraction + (1 - self.budget.fraction) * (self.rounds - done) / self.rounds
            found = self.space.plan_for(scores, self.budget.at(fraction), ranking="global")
            self.plan = self.space.both(self.plan, found)  # there is no way back
            self.widths.append(dict(self.plan.widths))
        super().after_step(state)


def ranking(space: ChannelSpace, theta: Tensor, plan: Plan, flops_regularisation: float) -> dict[str, Tensor]:
    """Return Θ̂ - λ·Θ^flops, {group: [size]}, comparable across groups; minus infinity for what the plan has removed."""
    sizes = space.sizes.tolist()
    mflops = 2 * space.cost.per_unit(space.widths(plan)) / 1e6
    parts = zip(space.groups, theta.split(sizes), space.gates(plan).split(sizes), mflops.tolist(), strict=True)
    return {
        group.name: (normalised(part) - flops_regularisation * cost).masked_fill(gates == 0, -torch.inf)
        for group, part, gates, cost in parts
    }


def normalised(theta: Tensor) -> Tensor:
    """Return Θ̂ = Θ / ||Θ||₂ of one group; a group of zeros stays so."""
    return nn.functional.normalize(theta, dim=0)
