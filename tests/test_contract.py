"""What every method in `prunelab.methods` keeps to, whatever the paper: a new file there is tested here by itself."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from prunelab import cost, data, models
from prunelab.methods import METHODS, Pruned, build
from prunelab.methods.base import SPACES
from prunelab.methods.ssl import ZERO
from prunelab.structure import Budget, ChannelSpace
from prunelab.training import Context, History, Hook, Recipe, fit

NETWORKS = {"convnet-bn": 0.5, "resnet20": 0.5}  # name -> width
BUDGET = Budget(0.5, "conv")
DENSE = Recipe(epochs=1, lr=0.05, batch_size=64)
AFTER = Recipe(epochs=2, lr=0.02, batch_size=32)
QUICK = {"hrank": {"g": 64}, "channel-pruning": {"images": 200}}  # fewer images than the defaults, to be quick

digits = cache(lambda: data.load("digits", image_size=16))


@cache
def trained(name: str) -> tuple[nn.Module, Context]:
    images = digits()
    initial = models.build(name, shape=images.shape, width=NETWORKS[name], seed=0)
    net = copy.deepcopy(initial)
    fit(net, images, DENSE, seed=0, progress=False)
    return net, Context(images, AFTER, seed=0, progress=False, initial=initial, dense=DENSE)


@cache
def pruned(method: str, name: str) -> Pruned:
    net, context = trained(name)
    before = copy.deepcopy(net.state_dict()), copy.deepcopy(context.initial.state_dict())
    found = build(method, **QUICK.get(method, {}))(net, BUDGET, context)
    for given, kept in zip((net, context.initial), before, strict=True):
        assert given.state_dict().keys() == kept.keys()
        assert all(torch.equal(tensor, kept[key]) for key, tensor in given.state_dict().items())
    return found


DEFAULTS: dict[str, dict[str, Any]] = {
    # The papers': Algorithm 1 of SPP; Taylor's λ, and its updates for VGG-16 on Birds-200; Slimming's VGG; DropNet's
    # CIFAR-10; the fine-tuning of "Rethinking the Value of Network Pruning". SPP's zeros are of the released code.
    "spp": {"A": 0.05, "u": 0.25, "t": 180, "margin": 0.0, "averaging": 0.0},
    "taylor": {"flops_regularisation": 1e-3, "updates": 30},
    "slimming": {"penalty": 1e-4},
    "dropnet": {"p": 0.2, "patience": 5},
    "finetune": {"lr": 1e-3, "schedule": "constant"},
    # Of the released code, and for DMCP its ResNet configurations.
    "channel-pruning": {"images": 5000, "positions": 10},
    "abcpruner": {"changed": 2},
    "dmcp": {"penalty": 0.1, "lr": 0.5, "alpha": 0.0, "step": 0.1, "least": 0.1, "warmup": 0.5},
    # The rate of the released code, which has g = 640: ours is smaller.
    "hrank": {"g": 500, "lr": 0.01},
    # ρ and its growth are of the same group's ADMM code, the perturbation is NNI's; the paper's are not known.
    "autocompress": {"rho": 1e-3, "growth": 1.3, "perturbation": 0.35},
}

cases = pytest.mark.parametrize("name", NETWORKS)
methods = pytest.mark.parametrize("method", [name for name in METHODS if name != "dense"])


@pytest.mark.parametrize("method", DEFAULTS)
def test_the_defaults_are_the_published_ones(method: str) -> None:
    assert {name: getattr(build(method), name) for name in DEFAULTS[method]} == DEFAULTS[method]


def test_ssl_zeroes_the_weights_that_the_released_code_does() -> None:
    assert ZERO == 1e-4


@methods
@cases
def test_the_budget_is_met(method: str, name: str) -> None:
    """Within the budget, and no further below it than a percentage point or the filter that costs most."""
    net, context = trained(name)
    example = context.data.example
    kept = cost.macs(pruned(method, name).net, example, "conv") / cost.macs(net, example, "conv")
    space = ChannelSpace(net, example)
    filters = [1 - space.spent(BUDGET)(space.widths({g.name: g.size - 1})) for g in space.groups]
    assert BUDGET.fraction - max(0.01, *filters) < kept <= BUDGET.fraction


@methods
def test_the_network_is_what_the_plan_leaves(method: str) -> None:
    """The same tensors, of the same shapes, as cutting the dense network by the plan gives."""
    net, context = trained("convnet-bn")
    found = pruned(method, "convnet-bn")
    space = next(space for space in SPACES.values() if space.kind == found.plan.space)(net, context.data.example)
    shapes = {key: tensor.shape for key, tensor in space.shrink(found.plan).state_dict().items()}
    assert {key: tensor.shape for key, tensor in found.net.state_dict().items() if key in shapes} == shapes


@dataclass(frozen=True)
class Noted(Context):
    """A context that notes the seed of every training."""

    seeds: list[int | None] = field(default_factory=list)

    def train(self, net: nn.Module, recipe: Recipe, hook: Hook, label: str, seed: int | None = None) -> History:
        self.seeds.append(seed)
        return super().train(net, recipe, hook, label, seed)


@pytest.mark.parametrize(
    ("method", "settings", "count"),
    [
        ("hrank", {"g": 64}, 3),  # layers
        ("slimming", {"passes": 2}, 2),
        ("autocompress", {"rounds": 2, "evaluations": 1, "updates": 1}, 4),  # in a round ADMM, and what is left
    ],
)
def test_no_training_repeats_the_batches_of_another(method: str, settings: dict[str, object], count: int) -> None:
    net, context = trained("convnet-bn")
    noted = Noted(**vars(context))
    build(method, **settings)(net, BUDGET, noted)
    assert len(noted.seeds) == len(set(noted.seeds)) == count


@methods
@cases
def test_the_effort_is_not_exceeded(method: str, name: str) -> None:
    """What a method spends before the caller's fine-tuning, plus what it asks for, is in the open."""
    found = pruned(method, name)
    assert 0 <= found.epochs <= AFTER.epochs + 1e-9
    assert found.recipe is None or found.recipe.epochs <= (AFTER if method == "finetune" else DENSE).epochs


class Idle(nn.Module):
    """A network beside a convolution whose output nobody reads."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.idle = net, nn.Conv2d(1, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.idle(x)
        return self.net(x)


@methods
def test_a_layer_without_effect_is_cut_or_named(method: str) -> None:
    net, context = trained("convnet-bn")
    assert context.initial is not None
    idle = Idle(copy.deepcopy(net))
    context = replace(context, initial=Idle(copy.deepcopy(context.initial)))
    try:
        found = build(method, **QUICK.get(method, {}))(idle, BUDGET, context)
    except ValueError as error:
        assert "idle" in str(error) or "the loss does not depend on it" in str(error)
    else:
        example = context.data.example
        assert cost.macs(found.net, example, "conv") <= 0.5 * cost.macs(idle, example, "conv")


@methods
@cases
def test_the_network_can_be_trained_on(method: str, name: str) -> None:
    """No hook, mask or frozen parameter is left behind, and a short training helps."""
    net = copy.deepcopy(pruned(method, name).net)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in net.parameters())
    run = fit(net, digits(), Recipe(epochs=2, lr=0.05, batch_size=64), seed=1, progress=False)
    assert run.loss[-1] < run.loss[0]


@methods
def test_runs_repeat_bit_for_bit(method: str) -> None:
    net, context = trained("convnet-bn")
    first, again = pruned(method, "convnet-bn"), build(method, **QUICK.get(method, {}))(net, BUDGET, context)
    assert first.plan == again.plan
    assert first.epochs == again.epochs
    assert all(torch.equal(tensor, again.net.state_dict()[key]) for key, tensor in first.net.state_dict().items())
