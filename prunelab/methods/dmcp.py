"""DMCP: Differentiable Markov Channel Pruning for Neural Networks (Guo et al., CVPR 2020, arXiv 2005.03354).

Unit k + 1 of a layer can stay only if unit k does: what stays is a prefix, and its length a Markov chain. The chains'
transition probabilities are trained by gradient descent on the loss and on the expected cost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from prunelab import scores as criteria
from prunelab._arrays import Ints
from prunelab._checks import NOT_NEGATIVE, POSITIVE, check_fields, one_of, real, within
from prunelab._modules import tensors_in_place
from prunelab.methods.base import Pruned
from prunelab.models import reinitialise
from prunelab.structure import Budget, ChannelSpace, Plan
from prunelab.structure.space import open_ended
from prunelab.training import Context, Hook, Recipe, State, mixed_precision

Sampling = Literal["expected", "direct"]

DEAD_ZONE = 0.95  # of the target: from there to the target the budget asks for nothing
WINDOW = 0.01  # of the target: how far below it a structure may be that is drawn
DRAWS = 10_000  # structures to draw before giving up
RATE_LEFT = 0.2  # of α's learning rate at the end: 0.5 falls to 0.1
APART = 100  # between the seeds of the dense network's weights and of fresh ones
ROUNDING = 1e-4  # as in the released code: 0.9 / 0.1 and 0.1·30 are whole numbers


@dataclass(frozen=True)
class DMCP:
    """Learn how wide every layer should be, then train a network of these widths from scratch.

    The search trains a copy of the given network for a while. Each step sums the gradients of four networks that share
    its weights: the whole one, on the labels; the narrowest and two random prefixes, on the outputs of the whole one
    (KL divergence, temperature 1). In the first `warmup` of the steps random means uniform widths, afterwards widths
    drawn from the chains. Then, and only then, each step also moves α: every channel is scaled by the probability P
    that it stays, and α descends, without weight decay, on

        L = cross entropy + λ·budget_loss(E[cost], target).

    The published search starts from random weights and takes 40 epochs; this one starts from the trained network, and
    its weights have the context's rate throughout. The released code goes on drawing many of the random widths
    uniformly after the warm-up; here they come from the chains, as in the paper.

    Channels are scaled where they are read, by the weights that read them: behind batch norm and behind the activation,
    as in the paper's figure, whether or not there is batch norm. Where activations are ReLUs it is the same function as
    scaling what batch norm puts out. Filters that are tied, as on a residual stream, have one chain.

    penalty: λ >= 0; 0.1 in the released configurations.
    lr: of α, > 0; falls by a cosine to a fifth. SGD with Nesterov momentum 0.9.
    alpha: what every α starts at; 0, the released code's, makes every transition a coin toss. A short search is better
        started where the expected cost is near its budget already: 1.5 for a quarter, 0 for a twelfth of the MACs.
    step: δ, the size of a group of channels as a fraction of a layer's, in (0, 1): `Chains`.
    least: the smallest width as a fraction, in [0, 1).
    warmup: fraction of the steps, in [0, 1), before α moves.
    sampling: "expected", every layer takes the width that is expected; "direct", the first structure drawn from the
        chains that is within the budget, by 1% of it at most (the released code trains five, up to 1% off to
        either side). Expected widths, rounded, and the nearest structure drawn where none of 10,000 is within, are
        scaled in proportion to the widest prefixes within the budget.
    share: how much the search may compute, > 0, in passes over the training images and multiples of the context's
        epochs. Every forward and backward pass of every network counts, 4 in a step and 5 with α, so a search is of
        share·epochs / (5 − warmup) epochs of images. What follows is a training of its own, and not paid from this.

    The weights of the result are fresh, as published, and `Pruned.recipe` is the dense network's training.

    Raises ValueError naming the field, its value and the legal values; when called, before any training, for a budget
    below the narrowest network, for one of latency, which has no closed form, for a context that does not tell how the
    dense network was trained, and for a search too short for a step of α.
    `Pruned.history` has "p": {group: P before and after every step of α, float32 [steps + 1, levels]}; "spent": the
    expected cost, as a fraction of the dense network's, likewise; "widths": E[c] at the end, {group: float}; "alpha":
    float64 [groups, levels].
    """

    name: ClassVar[str] = "dmcp"

    penalty: float = 0.1
    lr: float = 0.5
    alpha: float = 0.0
    step: float = 0.1
    least: float = 0.1
    warmup: float = 0.5
    sampling: Sampling = "expected"
    share: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(
            self,
            self.name,
            penalty=NOT_NEGATIVE,
            lr=POSITIVE,
            alpha=real("a finite number", math.isfinite),
            step=within("(0, 1)"),
            least=real("in [0, 1 - step]", lambda least: 0 <= least <= 1 - self.step),
            warmup=within("[0, 1)"),
            sampling=one_of(get_args(Sampling)),
            share=POSITIVE,
        )

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Search, and return an untrained network of the widths found."""
        if context.dense is None:
            raise ValueError("dmcp: it has to know how the dense network was trained: Context(dense=...)")
        space = ChannelSpace(copy.deepcopy(net), context.data.example)
        chains = Chains(space.sizes, self.step, self.least, self.alpha)
        cost = ExpectedCost(space, budget)
        narrowest = float(cost.fractions(chains.widths[:, 0]))
        if narrowest > budget.fraction:
            raise ValueError(
                f"dmcp: budget {budget.cost}={budget.fraction} cannot be met: the narrowest network, with "
                f"step={self.step} and least={self.least}, keeps {narrowest:.4f} of the {budget.what}"
            )
        recipe = self._recipe(context)
        search = Search(Supernet(space), chains, cost, budget.fraction, self)
        run = context.train(search.supernet, recipe, search, self.name)
        plan = self._plan(space, chains, cost, budget, context.seed)
        small = reinitialise(space.shrink(plan), context.seed + APART)
        passes = (4 * run.steps + search.alpha_steps) / context.steps_per_epoch
        return Pruned(small, plan, passes, search.history([group.name for group in space.groups]), context.dense)

    def _recipe(self, context: Context) -> Recipe:
        """Return the recipe of the search."""
        passes = self.share * context.recipe.epochs * context.steps_per_epoch
        steps = math.floor(passes / (5 - self.warmup))
        if math.ceil(self.warmup * steps) >= steps:
            raise ValueError(f"dmcp: none of the {steps} steps of the search moves α: raise share, now {self.share}")
        return context.constant(steps / context.steps_per_epoch, context.recipe.lr)

    def _plan(self, space: ChannelSpace, chains: Chains, cost: ExpectedCost, budget: Budget, seed: int) -> Plan:
        """Turn probabilities into widths, and those into the prefixes that stay."""
        if self.sampling == "direct":
            widths = direct_sample(chains, cost, budget.fraction, torch.Generator().manual_seed(seed))
        else:
            widths = chains.moments(chains.marginals().detach())[0].round().long()
        if _within(cost.fractions(widths), budget.fraction):
            return space.plan_for(_first(space), widths.tolist())
        return proportional_prefixes(space, chains, widths, budget)


class Chains:
    """One Markov chain for each group of a space: how far its prefix gets.

    A group of C units has c_min that always stay and G levels of g units, which stay in this order:

        g = max(1, ⌊δ·C⌋),  G = ⌊(1 − least)/δ⌋,  c_min = C − g·G,

    with fewer levels where c_min would be below max(1, least·C). Level j stays if level j − 1 does, with probability
    p_j = σ(α_j). The marginals are P_j = Π_{i≤j} p_i.

    Attributes:
        alpha: α, float64 [groups, levels], which requires a gradient; what is behind a chain's last level is not used.
        levels: G of every group, int64 [groups].
        widths: units that stay when j levels do, int64 [groups, levels + 1].

    Args:
        sizes: C of every group, int64 [groups].
        step: δ, in (0, 1).
        least: in [0, 1 − δ].
        alpha: every α at the start.
    """

    def __init__(self, sizes: Ints, step: float = 0.1, least: float = 0.1, alpha: float = 0.0) -> None:
        size = torch.from_numpy(sizes)
        per_level = (step * size + ROUNDING).long().clamp(min=1)
        room = (size - (least * size).clamp(min=1)) / per_level
        self.levels = (room + ROUNDING).long().clamp(max=int((1 - least) / step + ROUNDING))
        deepest = int(self.levels.max())
        level = torch.arange(deepest + 1).minimum(self.levels[:, None])
        self.widths = size[:, None] - per_level[:, None] * (self.levels[:, None] - level)
        self.alpha = torch.full((len(size), deepest), alpha, dtype=torch.float64, requires_grad=True)
        self.group_of = torch.arange(len(size)).repeat_interleave(size)
        self.place = torch.cat([torch.arange(n) for n in size.tolist()])  # of a unit in its group
        self.level_of = (self.place[:, None] >= self.widths[self.group_of]).sum(1)

    def marginals(self) -> Tensor:
        """Return P, float64 [groups, levels + 1], the first of which is 1: exp(Σ_{i≤j} ln σ(α_i))."""
        return F.pad(F.logsigmoid(self.alpha).cumsum(1), (1, 0)).exp()

    def gates(self, marginals: Tensor) -> Tensor:
        """Return each unit's P, [units]."""
        return marginals[self.group_of, self.level_of]

    def prefix(self, widths: Tensor) -> Tensor:
        """Return gates that keep the first units of every group, as many as `widths`, int64 [groups], says."""
        return (self.place < widths[self.group_of]).double()

    def moments(self, marginals: Tensor) -> tuple[Tensor, Tensor]:
        """Return E[c] and Var[c] of every group's width, [groups].

        E[f(c)] = Σ_j P_j·(f(W_j) − f(W_{j−1})), with W_j the width at level j and f(W_{−1}) = 0.
        """
        widths = self.widths.double()
        mean, square = ((marginals * f.diff(dim=1, prepend=f.new_zeros(len(f), 1))).sum(1) for f in (widths, widths**2))
        return mean, square - mean**2

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Run the chains `count` times, each level while the one before stays; return widths, int64 [count, groups]."""
        uniform = torch.rand(count, *self.alpha.shape, dtype=torch.float64, generator=generator)
        reached = (uniform <= self.alpha.detach().sigmoid()).cumprod(2).sum(2)
        return self._at(reached)

    def draw_uniform(self, count: int) -> Tensor:
        """Draw as many levels of each group, all equally probable; return widths, int64 [count, groups]."""
        return self._at((torch.rand(count, len(self.levels)) * (self.levels + 1)).long())

    def _at(self, reached: Tensor) -> Tensor:
        return self.widths.gather(1, reached.T).T


# -- cost -------------------------------------------------------------------------------------------------------------


class ExpectedCost:
    """The expected cost at random widths c that are independent from group to group, relative to the dense network's.

    The cost is Σ_l k_l·(R_l·c + r_l)·(W_l·c + s_l). Where a layer reads and writes the same group, as in a residual
    block of one convolution, the group's width stands squared, and E[c²] = E[c]² + Var[c]. So

        E[cost] = cost(E[c]) + Σ_l k_l·Σ_g R_lg·W_lg·Var[c_g].

    The paper's formula and its code leave the second term out.
    """

    def __init__(self, space: ChannelSpace, budget: Budget) -> None:
        if budget.latency is not None:
            raise ValueError("dmcp: an expected latency has no closed form: give a budget of macs or of parameters")
        space.spent(budget)  # which refuses what the network has nothing of
        cost = space.parameter_cost if budget.macs is None else space.cost
        counted = cost.per_pair if budget.scope == "all" else cost.per_pair * cost.conv
        parts = counted, cost.reads, cost.reads_fixed, cost.writes, cost.writes_fixed
        self.per_pair, self.reads, self.reads_fixed, self.writes, self.writes_fixed = (
            torch.from_numpy(part).double() for part in parts
        )
        self.squares = self.per_pair @ (self.reads * self.writes)
        self.dense = self._at(torch.from_numpy(space.sizes).double())

    def __call__(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Return the expected fraction of the dense cost, a scalar; E[c] and Var[c] are [groups]."""
        return (self._at(mean) + self.squares @ variance) / self.dense

    def fractions(self, widths: Tensor) -> Tensor:
        """Return the fraction of the dense cost at given widths, [..., groups] -> [...]."""
        return self._at(widths.double()) / self.dense

    def _at(self, widths: Tensor) -> Tensor:
        return (
            (widths @ self.reads.T + self.reads_fixed) * (widths @ self.writes.T + self.writes_fixed)
        ) @ self.per_pair


def budget_loss(spent: Tensor, target: float) -> Tensor:
    """Return ln|E − T| below 0.95·T, 0 from there to T, and ln|E − 0.95·T| beyond, as the released code has it.

    The paper's ln|E − T| has no bound on its slope at the target; here it is 1 / (0.05·T) at most. In which unit the
    two are only shifts the value.
    """
    low = DEAD_ZONE * target
    if low <= spent < target:
        return spent.new_zeros(())
    return (spent - (target if spent < low else low)).abs().log()


# -- the search -------------------------------------------------------------------------------------------------------


class Supernet(nn.Module):
    """A network together with all its prefixes, which share its weights and batch-norm statistics.

    Attributes:
        logits: of the whole network, at the last call, detached.
    """

    logits: Tensor

    def __init__(self, space: ChannelSpace) -> None:
        super().__init__()
        self.net = space.net
        readers = {
            id(parameter := space.net.get_parameter(axis.name)): axis.along(parameter.dim())
            for axis in space.coupling.axes
            if axis.role == "in" and (axis.units >= 0).any()
        }
        places = tensors_in_place(space.net)
        self.readers = {name: readers[id(tensor)] for name, tensor in places.items() if id(tensor) in readers}

    def forward(self, images: Tensor) -> Tensor:
        """Run the whole network."""
        logits = self.net(images)
        self.logits = logits.detach().float()
        return logits

    def gated(self, images: Tensor, gates: Tensor) -> Tensor:
        """Run the network with every channel scaled, where it is read, by its unit's gate, [units]; return logits."""
        weights = {}
        for name, units in self.readers.items():
            weight = self.net.get_parameter(name)
            weights[name] = weight * open_ended(gates)[units].to(weight)
        with mixed_precision(images.device):
            logits: Tensor = functional_call(self.net, weights, (images,), tie_weights=False)
        return logits.float()


class Search(Hook):
    """The training side: three narrower networks beside the whole one, then a step of α."""

    def __init__(self, supernet: Supernet, chains: Chains, cost: ExpectedCost, target: float, settings: DMCP) -> None:
        self.supernet, self.chains, self.cost = supernet, chains, cost
        self.target, self.settings = target, settings
        self.optimizer = torch.optim.SGD([chains.alpha], lr=settings.lr, momentum=0.9, nesterov=True)
        self.trace: list[Tensor] = []  # P before every step of α
        self.spent: list[float] = []

    @property
    def alpha_steps(self) -> int:
        """Steps of α so far."""
        return len(self.trace)

    def after_gradients(self, state: State) -> None:
        """Add the gradients of the narrowest network and of two random ones, taught by the whole."""
        draw = self.chains.draw_uniform if self._warms_up(state) else self.chains.draw
        for widths in (self.chains.widths[:, 0], *draw(2)):
            distillation(self.supernet.gated(state.images, self.chains.prefix(widths)), self.supernet.logits).backward()

    def after_step(self, state: State) -> None:
        """Move α, on the same images."""
        if self._warms_up(state):
            return
        marginals = self.chains.marginals()
        spent = self.cost(*self.chains.moments(marginals))
        self.trace.append(marginals.detach())
        self.spent.append(spent.item())
        task = F.cross_entropy(self.supernet.gated(state.images, self.chains.gates(marginals)), state.labels)
        loss = task.cpu() + self.settings.penalty * budget_loss(spent, self.target)
        (self.chains.alpha.grad,) = torch.autograd.grad(loss, self.chains.alpha)
        self.optimizer.param_groups[0]["lr"] = self.settings.lr * self._rate(state)
        self.optimizer.step()

    def history(self, names: Sequence[str]) -> dict[str, Any]:
        """Return what happened, as the method's docstring says."""
        marginals = self.chains.marginals().detach()
        mean, variance = self.chains.moments(marginals)
        trace = torch.stack([*self.trace, marginals]).float()
        levels = self.chains.levels.tolist()
        return {
            "p": {name: trace[:, i, : levels[i] + 1].numpy() for i, name in enumerate(names)},
            "spent": [*self.spent, float(self.cost(mean, variance))],
            "widths": dict(zip(names, mean.tolist(), strict=True)),
            "alpha": self.chains.alpha.detach(),
        }

    def _first_step(self, state: State) -> int:
        return math.ceil(self.settings.warmup * state.steps)

    def _warms_up(self, state: State) -> bool:
        return state.step < self._first_step(state)

    def _rate(self, state: State) -> float:
        """Fall by a cosine from 1 at the first step of α to a fifth after the last."""
        done = (state.step - self._first_step(state)) / (state.steps - self._first_step(state))
        return RATE_LEFT + (1 - RATE_LEFT) * (1 + math.cos(math.pi * done)) / 2


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over images of KL(teacher ‖ network), from logits [B, classes]."""
    return F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


# -- from probabilities to widths -------------------------------------------------------------------------------------


def direct_sample(chains: Chains, cost: ExpectedCost, target: float, generator: torch.Generator) -> Tensor:
    """Return the first of 10,000 draws from the chains that is within the budget, else the nearest; int64 [groups]."""
    drawn = chains.draw(DRAWS, generator)
    spent = cost.fractions(drawn)
    accepted = _within(spent, target).nonzero()
    return drawn[int(accepted[0]) if len(accepted) else int((spent - target).abs().argmin())]


def proportional_prefixes(space: ChannelSpace, chains: Chains, widths: Tensor, budget: Budget) -> Plan:
    """Keep the first units of every group: the widest within the budget, in proportion to `widths`, int64 [groups].

    What the chains always keep stays.
    """
    order = _first(space)
    shares = (widths / torch.from_numpy(space.sizes)).tolist()
    scores = criteria.proportional(dict(zip(order, shares, strict=True)), order)
    for score, least in zip(scores.values(), chains.widths[:, 0].tolist(), strict=True):
        score[:least] = math.inf
    return space.plan_for(scores, budget, ranking="global")


def _within(spent: Tensor, target: float) -> Tensor:
    return (spent <= target) & (spent >= (1 - WINDOW) * target)


def _first(space: ChannelSpace) -> dict[str, Tensor]:
    """Score the first unit of a group highest."""
    return {group.name: -torch.arange(group.size, dtype=torch.float64) for group in space.groups}
