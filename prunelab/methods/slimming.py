"""Learning Efficient Convolutional Networks through Network Slimming (Liu et al., ICCV 2017, arXiv 1708.06519).

The loss gets λ·Σ|γ| over the scales of all batch norms. Scales of channels that do not matter fall to zero, one global
threshold cuts them, and so the widths of the layers are found rather than set.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from prunelab._checks import FRACTION, NOT_NEGATIVE, POSITIVE, check, check_fields, integer, one_of, within
from prunelab._modules import replace_module
from prunelab.layers import ChannelSelection
from prunelab.methods.base import Pruned
from prunelab.structure import Budget, ChannelSpace, Plan
from prunelab.structure.space import Ranking, Scores, portion
from prunelab.training import Context, Hook, State

APART = 100  # between the seeds of two passes, so that neither another pass nor the fine-tuning repeats its batches


@dataclass(frozen=True)
class Slimming:
    """Train with an L1 penalty on the batch-norm scales, then remove the channels of smallest |γ|, network-wide.

    Each pass trains with the penalty and cuts; the cost falls by the same factor in every pass, in the last one to the
    budget. Where a batch norm reads a stream that others read too, as in pre-activation networks, a
    `ChannelSelection` is put in front of it: the channels that this reader needs are chosen, the stream stays whole.
    Channels that additions tie together go together, by the sum of their |γ|.

    The paper trains with the penalty from scratch, with γ = 0.5 at the start, for 160 epochs, and retrains for as long.
    Here the given network, trained already, goes on with the penalty. For the paper's way give a network as
    `initialise_scales` leaves it, and a context with enough epochs. The paper says neither what weights a second pass
    starts from nor how long it is: here they are those of the cut network, passes are equally long, and the penalised
    training of the next pass is the retraining of the last.

    penalty: λ >= 0. The paper has 1e-4 for VGG and 1e-5 for ResNet-164 and DenseNet-40; what it does to the scales
        grows with learning rate and steps, so a shorter training needs a larger one.
    share: of the context's epochs, in (0, 1], that training with the penalty may take.
    lr: learning rate, > 0, constant during that.
    passes: >= 1.
    cap: the largest fraction of a layer that one pass may remove, in (0, 1]; 0.5 in the paper's several passes. One
        channel of a layer always stays.
    ranking: "global", the paper's, lets the scales decide the widths; "layer", the control, removes the same share of
        every layer.

    Raises ValueError naming the field, its value and the legal range; when called, for a network with a layer that no
    batch norm scales, and for a budget that cannot be met, naming the least that can.
    `Pruned.plan` is of the network `with_channel_selection` returns, which is a copy of the given one where there is
    nothing to select. `Pruned.history` has, pass by pass, "scales": {group: |γ| before the cut, float [units]} and
    "widths": {group: units left after it}.
    """

    name: ClassVar[str] = "slimming"

    penalty: float = 1e-4
    share: float = 0.5
    lr: float = 0.01
    passes: int = 1
    cap: float = 1.0
    ranking: Ranking = "global"

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(
            self,
            self.name,
            penalty=NOT_NEGATIVE,
            share=FRACTION,
            lr=POSITIVE,
            passes=integer(1),
            cap=FRACTION,
            ranking=one_of(get_args(Ranking)),
        )

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Train a copy of the network with the penalty and cut it, as many times as there are passes."""
        example = context.data.example
        space = dense = ChannelSpace(with_channel_selection(net, example), example)
        fractions = [budget.fraction ** ((number + 1) / self.passes) for number in range(self.passes)]
        scores = dense.scores("bn_scale")
        dense.plan_for(scores, budget)  # before any work: what cannot be met with one channel a layer,
        dense.plan_for(protected(scores, self.cap), budget.at(fractions[0]))  # or because of the cap
        phase = context.constant(self.share * context.recipe.epochs / self.passes, self.lr)
        plan, spent = dense.plan({}), 0.0
        history: dict[str, list[Any]] = {"scales": [], "widths": []}
        for number, fraction in enumerate(fractions):
            seed = context.seed + APART * number
            run = context.train(space.net, phase, Penalty(self.penalty), self.name, seed)
            scores = space.scores("bn_scale")
            present = dense.spent(budget)(dense.widths(plan))
            left = budget.at(min(1.0, fraction / present))
            chosen = space.plan_for(protected(scores, self.cap), left, self.ranking)
            # A depthwise layer of one channel is a group of its own from now on, and stays.
            plan = dense.plan({name: [kept[i] for i in chosen.keep[name]] for name, kept in plan.keep.items()})
            space = ChannelSpace(space.shrink(chosen), example)
            spent += run.epochs
            history["scales"].append({name: score.numpy() for name, score in scores.items()})
            history["widths"].append(plan.widths)
        return Pruned(space.net, plan, spent, history)


class Penalty(Hook):
    """Sub-gradient descent on λ·Σ|γ|: γ.grad += λ·sign(γ), with sign(0) = 0, for every batch norm that has scales.

    As in the released code it is added to the gradient, so it passes through the momentum, and the recipe's weight
    decay acts on γ as well.
    """

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def start(self, state: State) -> None:
        """Look up the scales once."""
        self.scales = _scales(state.net)

    @torch.no_grad()
    def after_gradients(self, state: State) -> None:
        """Add the sub-gradient."""
        for scale in self.scales:
            if scale.grad is not None:
                scale.grad.add_(scale.sign(), alpha=self.penalty)


def initialise_scales(net: nn.Module, scale: float = 0.5) -> None:
    """Set γ of every batch norm, in place: to 0.5 before training with the penalty from scratch, as in the paper."""
    for parameter in _scales(net):
        nn.init.constant_(parameter, scale)


def _scales(net: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]


def with_channel_selection(net: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy in which each batch norm that does not stand alone right behind a layer chooses its channels.

    Such a batch norm becomes a `ChannelSelection` and itself, named "select" and "norm": the channels that it scales
    can then go for its own reader, and what it reads stays whole. The authors' code chooses behind the batch norm: the
    function is the same, and in front is cheaper.

    Args:
        net: a network that torch.fx can trace; it stays as it is.
        example: an input, float [N, C, H, W].

    Raises:
        UntraceableError: the network cannot be cut safely.
    """
    coupling = ChannelSpace(net, example).coupling
    behind_layers = {coupling.norms.get(axis.module) for axis in coupling.axes if axis.role == "out"}
    net = copy.deepcopy(net)
    for name, norm in list(net.named_modules()):
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and name not in behind_layers:
            chosen = OrderedDict(select=ChannelSelection(norm.num_features), norm=norm)
            replace_module(net, name, nn.Sequential(chosen).train(norm.training))
    return net


def protected(scores: Scores, cap: float) -> dict[str, Tensor]:
    """Make the best units of each group infinitely good, all but floor(cap·size) of them and at least one."""
    found = {}
    for name, score in scores.items():
        stay = max(1, len(score) - portion(len(score), cap))
        best = score.argsort(descending=True, stable=True)[:stay]
        found[name] = score.index_fill(0, best, torch.inf)
    return found


def threshold_plan(space: ChannelSpace, fraction: float, cap: float = 1.0) -> Plan:
    """Keep the channels with |γ| above one threshold for the whole network, the paper's percentage form.

    All n values are sorted in ascending order, and the one at place floor(n·fraction), counted from 0, is the
    threshold: it goes, all below it go, and all equal to it. So without ties floor(n·fraction) + 1 channels go, one for
    fraction 0, except for those that `cap` holds back, and the best channel of each group.

    Args:
        space: of a network with a batch norm behind every layer.
        fraction: of the channels to remove, in [0, 1).
        cap: the largest fraction of a group to remove, in (0, 1].

    Raises:
        ValueError: a fraction outside its range, or a layer that no batch norm scales.
    """
    check("fraction", fraction, within("[0, 1)"))
    check("cap", cap, FRACTION)
    scores = space.scores("bn_scale")
    pooled = torch.cat(list(scores.values())).sort().values
    threshold = pooled[portion(len(pooled), fraction)]
    stays = {name: (score > threshold).nonzero() for name, score in protected(scores, cap).items()}
    return space.plan({name: kept.flatten().tolist() for name, kept in stays.items()})
