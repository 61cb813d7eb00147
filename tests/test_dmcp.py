"""DMCP: chains and costs against brute force, gates against hooks and cut networks, and the search on the digits."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunelab import cost
from prunelab.data import Data, load
from prunelab.methods.base import Pruned
from prunelab.methods.dmcp import (
    DMCP,
    Chains,
    ExpectedCost,
    Search,
    Supernet,
    budget_loss,
    direct_sample,
    distillation,
)
from prunelab.models import PreActivationBottleneck, build
from prunelab.structure import Budget, ChannelSpace, Plan
from prunelab.training import Context, Recipe, State, fit

SHAPE = (3, 8, 8)


def space_of(name: str, width: float = 1.0) -> ChannelSpace:
    return ChannelSpace(build(name, shape=SHAPE, seed=0, width=width).double(), torch.zeros(1, *SHAPE).double())


def random_chains(sizes: Any, seed: int = 0, **settings: float) -> Chains:
    chains = Chains(np.array(sizes), **settings)
    with torch.no_grad():
        chains.alpha += torch.randn(chains.alpha.shape, generator=torch.Generator().manual_seed(seed))
    return chains


def expectation(cost_of: ExpectedCost, chains: Chains) -> float:
    mean, variance = chains.moments(chains.marginals().detach())
    return cost_of(mean, variance).item()


def prefix_plan(space: ChannelSpace, widths: Tensor) -> Plan:
    return space.plan({group.name: range(n) for group, n in zip(space.groups, widths.tolist(), strict=True)})


# -- chains -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "least", "per_level"),
    [(64, 10, 6), (128, 20, 12), (256, 31, 25), (512, 53, 51), (1024, 106, 102), (2048, 212, 204)],
)
def test_groups_are_those_of_the_released_resnet_configurations(size: int, least: int, per_level: int) -> None:
    chains = Chains(np.array([size]))
    assert chains.widths.tolist() == [[least + j * per_level for j in range(10)]]
    assert chains.widths[0, -1] == size


def test_groups_are_those_of_the_released_mobilenet_configuration() -> None:
    chains = Chains(np.array([48, 144, 1920]), step=0.1 / 1.5, least=0.1 / 1.5)  # the supernet is 1.5 times as wide
    assert chains.levels.tolist() == [14, 14, 14]
    assert chains.widths[:, 0].tolist() == [6, 18, 128]
    assert chains.widths.diff(dim=1)[:, 0].tolist() == [3, 9, 128]


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=5), st.floats(0.01, 0.5), st.floats(0, 0.5), st.integers(0, 99)
)
def test_chains_of_any_size(sizes: list[int], step: float, least: float, seed: int) -> None:
    chains = random_chains(sizes, seed, step=step, least=least)
    assert chains.widths[:, -1].tolist() == sizes
    assert (chains.widths.diff(dim=1) >= 0).all()
    assert (chains.widths[:, 0] >= (least * torch.tensor(sizes)).clamp(min=1) - 1e-3).all()
    marginals = chains.marginals().detach()
    assert (marginals[:, 0] == 1).all() and (marginals.diff(dim=1) <= 0).all()
    torch.testing.assert_close(marginals[:, 1:], chains.alpha.detach().sigmoid().cumprod(1))
    gates = chains.gates(marginals).split(sizes)
    for i, gate in enumerate(gates):  # unit by unit, P of the first level whose width exceeds its place
        expected = [marginals[i, int((chains.widths[i] <= k).sum())] for k in range(sizes[i])]
        assert gate.tolist() == torch.stack(expected).tolist()


def test_a_chain_by_hand() -> None:
    chains = Chains(np.array([3]))  # one unit that stays, two that may
    with torch.no_grad():
        chains.alpha.copy_(torch.tensor([[0.0, math.log(3)]]))  # transitions 1/2 and 3/4
    assert chains.widths.tolist() == [[1, 2, 3]]
    assert chains.gates(chains.marginals().detach()).tolist() == pytest.approx([1, 1 / 2, 3 / 8])
    mean, variance = chains.moments(chains.marginals().detach())  # P(c = 1, 2, 3) = 4/8, 1/8, 3/8
    assert mean.item() == pytest.approx(15 / 8)
    assert variance.item() == pytest.approx((4 + 4 + 27) / 8 - (15 / 8) ** 2)


def test_log_space_survives_what_a_product_does_not() -> None:
    chains = Chains(np.array([64]), alpha=-300.0)
    marginals = chains.marginals()
    marginals.sum().backward()
    assert chains.alpha.grad is not None
    assert marginals.isfinite().all() and chains.alpha.grad.isfinite().all()
    assert float(marginals.log()[0, 2].detach()) == pytest.approx(-600)


def test_moments_are_those_of_the_draws() -> None:
    chains = random_chains([16, 64, 7, 1])
    drawn = chains.draw(200_000, torch.Generator().manual_seed(0)).double()
    mean, variance = chains.moments(chains.marginals().detach())
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0.005, atol=0)
    torch.testing.assert_close(drawn.var(0, correction=0), variance, rtol=0.02, atol=0)


def test_uniform_draws_take_every_level_alike() -> None:
    chains = Chains(np.array([64, 4, 1]))
    torch.manual_seed(0)
    drawn = chains.draw_uniform(40_000)
    for group, levels in enumerate([10, 4, 1]):
        found, counts = drawn[:, group].unique(return_counts=True)
        assert found.tolist() == chains.widths[group, :levels].tolist()
        np.testing.assert_allclose(counts / 40_000, 1 / levels, rtol=0.06)


# -- expected cost ----------------------------------------------------------------------------------------------------

BUDGETS = [Budget(0.5), Budget(0.5, "conv"), Budget(parameters=0.5)]


@pytest.mark.parametrize("budget", BUDGETS, ids=["macs", "conv", "parameters"])
@pytest.mark.parametrize("ends", [math.inf, -math.inf])
def test_expected_cost_at_both_limits(budget: Budget, ends: float) -> None:
    for name in ("convnet-bn", "resnet20", "densenet40"):
        space = space_of(name)
        chains = Chains(space.sizes, alpha=math.copysign(700.0, ends))
        expected = expectation(ExpectedCost(space, budget), chains)
        widths = chains.widths[:, -1 if ends > 0 else 0]
        small = space.shrink(prefix_plan(space, widths))
        counted = (
            cost.parameters(small) / cost.parameters(space.net)
            if budget.macs is None
            else cost.macs(small, space.example, budget.scope) / cost.macs(space.net, space.example, budget.scope)
        )
        assert expected == pytest.approx(counted, rel=1e-12)
        if ends > 0:
            assert expected == 1


class Tied(nn.Module):
    """A stream that two layers write and one layer reads and writes, a depthwise layer, and a free one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.direct = nn.Conv2d(3, 3, 3, padding=1)  # reads the stream and writes it
        self.up, self.deep, self.down = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, 3, padding=2)
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.direct(x) + x)
        x = F.relu(self.down(F.relu(self.deep(F.relu(self.up(x))))) + x)
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize("budget", BUDGETS, ids=["macs", "conv", "parameters"])
def test_expected_cost_is_that_of_all_structures(budget: Budget) -> None:
    torch.manual_seed(0)
    space = ChannelSpace(Tied(), torch.zeros(1, 2, 6, 6))
    assert {g.name: g.size for g in space.groups} == {"stem": 3, "up": 4}
    chains = random_chains(space.sizes, step=0.3)
    transitions = chains.alpha.detach().sigmoid()
    total = 0.0
    for levels in itertools.product(*[range(int(n) + 1) for n in chains.levels]):
        probability = 1.0
        for group, level in enumerate(levels):
            probability *= transitions[group, :level].prod().item()
            if level < chains.levels[group]:
                probability *= 1 - transitions[group, level].item()
        widths = chains.widths[torch.arange(len(levels)), torch.tensor(levels)]
        small = space.shrink(prefix_plan(space, widths))
        macs = cost.macs(small, space.example, budget.scope)
        total += probability * (cost.parameters(small) if budget.macs is None else macs)
    dense = space.parameters() if budget.macs is None else space.macs(scope=budget.scope)
    expected = ExpectedCost(space, budget)
    mean, variance = chains.moments(chains.marginals().detach())
    assert expected(mean, variance).item() == pytest.approx(total / dense, rel=1e-12)
    assert expected(mean, 0 * variance).item() < 0.99 * total / dense  # what leaving the variance out gives


def test_expected_cost_is_the_mean_over_draws() -> None:
    space = space_of("resnet20")
    chains = random_chains(space.sizes)
    expected = ExpectedCost(space, Budget(0.5))
    drawn = chains.draw(50_000, torch.Generator().manual_seed(1))
    of_all = space.cost(drawn.numpy()) / space.macs()
    np.testing.assert_allclose(expected.fractions(drawn).numpy(), of_all, rtol=1e-12)
    assert expectation(expected, chains) == pytest.approx(of_all.mean(), rel=0.005)


@pytest.mark.parametrize(("name", "dense", "start"), [("resnet18", 1814, 121), ("resnet50", 4089, 227)])
def test_millions_of_multiply_adds_where_an_imagenet_search_starts(name: str, dense: int, start: int) -> None:
    """Derived from the released configurations, δ = least = 0.1, for α = 0; the paper has no such table."""
    space = ChannelSpace(build(name, classes=1000, shape=(3, 224, 224), seed=0), torch.zeros(1, 3, 224, 224))
    spent = expectation(ExpectedCost(space, Budget(0.5)), Chains(space.sizes))
    assert round(space.macs() / 1e6) == dense
    assert round(spent * space.macs() / 1e6) == start


# -- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spent", "value", "slope"),
    [
        (0.2, math.log(0.3), -1 / 0.3),
        (0.47, math.log(0.03), -1 / 0.03),
        (0.475, 0.0, 0.0),
        (0.49, 0.0, 0.0),
        (0.5, math.log(0.025), 1 / 0.025),
        (0.8, math.log(0.325), 1 / 0.325),
    ],
)
def test_the_budget_loss_by_hand(spent: float, value: float, slope: float) -> None:
    at = torch.tensor(spent, dtype=torch.float64, requires_grad=True)
    loss = budget_loss(at, 0.5)
    assert loss.item() == pytest.approx(value)
    if slope:
        loss.backward()
        assert at.grad is not None and at.grad.item() == pytest.approx(slope)
    else:
        assert not loss.requires_grad


@pytest.mark.parametrize(("target", "sign"), [(0.9, -1), (0.05, 1)])
def test_the_budget_moves_every_chain_towards_it(target: float, sign: int) -> None:
    space = space_of("convnet-bn")
    chains = random_chains(space.sizes)
    budget_loss(ExpectedCost(space, Budget(0.5))(*chains.moments(chains.marginals())), target).backward()
    assert chains.alpha.grad is not None
    assert (chains.alpha.grad.sign() == sign).all()


# -- gates ------------------------------------------------------------------------------------------------------------


def scaled_behind_batch_norm(space: ChannelSpace, gates: Tensor) -> nn.Module:
    """The definition: what each writer's batch norm puts out, times P."""
    net = copy.deepcopy(space.net)
    units = {axis.module: torch.from_numpy(axis.units) for axis in space.coupling.axes if axis.role == "out"}
    ended = torch.cat([gates, gates.new_ones(1)])

    def scale(factor: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda module, args, output: output * factor.view(-1, 1, 1)

    for layer, norm in space.coupling.norms.items():
        net.get_submodule(norm).register_forward_hook(scale(ended[units[layer]]))
    return net


@pytest.mark.parametrize("name", ["convnet-bn", "resnet20", "resnet20-b", "vgg11"])
def test_scaling_what_reads_is_scaling_behind_batch_norm(name: str) -> None:
    space = space_of(name, width=0.5)
    chains = random_chains(space.sizes)
    gates = chains.gates(chains.marginals())
    images = torch.randn(6, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    space.net.train()
    soft, defined = Supernet(space).gated(images, gates), scaled_behind_batch_norm(space, gates)(images)
    torch.testing.assert_close(soft, defined.float())
    (ours,) = torch.autograd.grad(soft.square().sum(), chains.alpha, retain_graph=True)
    (theirs,) = torch.autograd.grad(defined.square().sum(), chains.alpha)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(soft, space.net(images).float(), rtol=1e-3)


def pre_activation() -> nn.Module:
    torch.manual_seed(0)
    blocks = [PreActivationBottleneck(8, 4, 8, 1, nn.Identity()) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "convnet": (lambda: build("convnet", shape=SHAPE, seed=0), SHAPE),
    "convnet-bn": (lambda: build("convnet-bn", shape=SHAPE, seed=0), SHAPE),
    "resnet20": (lambda: build("resnet20", shape=SHAPE, seed=0), SHAPE),
    "pre-activation": (pre_activation, SHAPE),
    "densenet40": (lambda: build("densenet40", shape=SHAPE, seed=0, width=0.25), SHAPE),
    "mobilenet_v3_small": (lambda: build("mobilenet_v3_small", shape=(3, 32, 32), seed=0), (3, 32, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_gated_prefix_is_the_cut_network(name: str) -> None:
    make, shape = NETWORKS[name]
    space = ChannelSpace(make().double(), torch.zeros(1, *shape).double())
    images = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chains, supernet = random_chains(space.sizes), Supernet(space)
    widths = chains.draw(1, torch.Generator().manual_seed(0))[0]
    small = space.shrink(prefix_plan(space, widths))
    for mode in (True, False):  # in training too, where batch norm sees the batch
        for net in (supernet, small):
            net.train(mode)
            for module in net.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
        torch.testing.assert_close(supernet.gated(images, chains.prefix(widths)), small(images).float())


@pytest.mark.parametrize("name", ["convnet", "convnet-bn", "resnet20"])
def test_with_p_of_one_the_soft_network_is_the_plain_one(name: str) -> None:
    space = space_of(name)
    chains, supernet = Chains(space.sizes, alpha=60.0), Supernet(space)
    images = torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = supernet(images)
    torch.testing.assert_close(supernet.gated(images, chains.gates(chains.marginals())), plain.float())
    torch.testing.assert_close(supernet.logits, plain.detach().float())


# -- the search -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


def test_distillation_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    assert distillation(student, teacher).item() == pytest.approx(0.5 * math.log(4 / 3))  # ½ln(½/¼) + ½ln(½/¾)


class Recorded(Search):
    """A search that keeps its gradients, and the networks and batch that they belong to."""

    def after_gradients(self, state: State) -> None:
        self.before, self.batch = copy.deepcopy(state.net.net), (state.images, state.labels)
        self.of_whole = {name: p.grad.clone() for name, p in state.net.net.named_parameters()}
        self.drawn: list[Tensor] = []
        prefix = self.chains.prefix
        self.chains.prefix = lambda widths: self.drawn.append(widths) or prefix(widths)  # type: ignore[method-assign]
        super().after_gradients(state)
        self.summed = {name: p.grad.clone() for name, p in state.net.net.named_parameters()}
        state.stop = True


@pytest.mark.parametrize(("name", "warmup"), [("convnet-bn", 0.9), ("resnet20", 0.0)])
def test_the_gradient_is_the_sum_over_four_networks(name: str, warmup: float, digits: Data) -> None:
    net = build(name, shape=digits.shape, seed=0, width=0.5)
    space = ChannelSpace(net, digits.example)
    chains = random_chains(space.sizes)
    search = Recorded(Supernet(space), chains, ExpectedCost(space, Budget(0.5)), 0.5, DMCP(warmup=warmup))
    fit(search.supernet, digits, Recipe(1, lr=0.01, batch_size=64), seed=0, hook=search, progress=False)
    assert len(search.drawn) == 3 and torch.equal(search.drawn[0], chains.widths[:, 0])
    assert len({tuple(widths.tolist()) for widths in search.drawn}) == 3

    images, labels = (part.double() if part.is_floating_point() else part for part in search.batch)
    expected = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in search.before.named_parameters()}
    whole = ChannelSpace(search.before.double().train(), digits.example.double())
    teacher = whole.net(images).detach()
    places = {n: torch.arange(p.numel()).view_as(p).double() for n, p in whole.net.named_parameters()}
    everything = torch.from_numpy(whole.sizes)
    for widths in (everything, *search.drawn):
        plan = prefix_plan(whole, widths)
        cut = whole.shrink(plan)
        logits = cut(images)
        taught = F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="batchmean")
        (F.cross_entropy(logits, labels) if widths is everything else taught).backward()
        at = whole.cut(plan, places)
        for n, p in cut.named_parameters():
            assert p.grad is not None
            expected[n].view(-1).index_add_(0, at[n].flatten().long(), p.grad.flatten())
    for n, gradient in expected.items():
        found = search.summed[n].double()
        assert (found - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, n
        assert not torch.equal(search.summed[n], search.of_whole[n])


@pytest.mark.parametrize(("warmup", "from_chains"), [(0.9, False), (0.0, True)])
def test_random_networks_are_uniform_in_the_warm_up_and_the_chains_after_it(
    warmup: float, from_chains: bool, digits: Data
) -> None:
    space = ChannelSpace(build("convnet-bn", shape=digits.shape, seed=0, width=0.5), digits.example)
    chains = Chains(space.sizes, alpha=-60.0)  # which draw the narrowest network only
    search = Recorded(Supernet(space), chains, ExpectedCost(space, Budget(0.5)), 0.5, DMCP(warmup=warmup))
    fit(search.supernet, digits, Recipe(1, lr=0.01, batch_size=64), seed=0, hook=search, progress=False)
    _, *random = search.drawn
    assert [torch.equal(widths, chains.widths[:, 0]) for widths in random] == [from_chains, from_chains]


def test_warm_up_leaves_alpha_alone_and_alpha_leaves_the_weights_alone(digits: Data) -> None:
    recipe = Recipe(10 * 32 / len(digits.train.labels), lr=0.01, batch_size=32)

    def weights(warmup: float, penalty: float) -> tuple[Search, dict[str, Tensor]]:
        space = ChannelSpace(build("convnet-bn", shape=digits.shape, seed=0, width=0.5), digits.example)
        settings = DMCP(warmup=warmup, penalty=penalty)
        search = Search(Supernet(space), Chains(space.sizes), ExpectedCost(space, Budget(0.5)), 0.5, settings)
        seen: list[Tensor] = []
        search.before_step = lambda state: seen.append(search.chains.alpha.detach().clone())  # type: ignore[method-assign]
        fit(search.supernet, digits, recipe, seed=0, hook=search, progress=False)
        moved = [not torch.equal(a, b) for a, b in itertools.pairwise([*seen, search.chains.alpha.detach()])]
        assert moved == [step >= math.ceil(warmup * len(moved)) for step in range(len(moved))]
        assert search.alpha_steps == sum(moved) == len(search.spent)
        return search, {n: p.detach() for n, p in space.net.named_parameters()}

    weights(0.5, 0.1)
    (first, one), (second, other) = weights(0.9, 0.0), weights(0.9, 5.0)  # one step of α, the last
    assert not torch.equal(first.chains.alpha, second.chains.alpha)
    assert all(torch.equal(one[n], other[n]) for n in one)


class OneStep(Search):
    """A search that ends after one step of α, and keeps the network and the α before it."""

    def after_step(self, state: State) -> None:
        self.before, self.alpha_before = copy.deepcopy(self.supernet.net), self.chains.alpha.detach().clone()
        super().after_step(state)
        self.batch, state.stop = (state.images, state.labels), True


@pytest.mark.parametrize("target", [0.05, 0.9])  # below and above what is expected
def test_alpha_descends_on_the_cross_entropy_and_a_tenth_of_the_budget_loss(target: float, digits: Data) -> None:
    space = ChannelSpace(build("convnet-bn", shape=digits.shape, seed=0, width=0.5), digits.example)
    chains, cost = random_chains(space.sizes), ExpectedCost(space, Budget(0.5))
    search = OneStep(Supernet(space), chains, cost, target, DMCP(warmup=0))
    fit(search.supernet, digits, Recipe(1, lr=0.01, batch_size=64), seed=0, hook=search, progress=False)

    alpha = search.alpha_before.requires_grad_()
    marginals = torch.cat([torch.ones(len(alpha), 1), alpha.sigmoid().cumprod(1)], dim=1)
    soft = scaled_behind_batch_norm(ChannelSpace(search.before, digits.example), chains.gates(marginals).float())
    images, labels = search.batch
    task = F.cross_entropy(soft(images), labels)
    (of_task,) = torch.autograd.grad(task, alpha, retain_graph=True)
    (of_budget,) = torch.autograd.grad(budget_loss(cost(*chains.moments(marginals)), target), alpha)
    assert chains.alpha.grad is not None
    torch.testing.assert_close(chains.alpha.grad, of_task + 0.1 * of_budget, rtol=1e-3, atol=1e-6)
    assert min(of_task.norm(), 0.1 * of_budget.norm()) > 0.01 * chains.alpha.grad.norm()  # neither is lost in the other


def test_alpha_moves_by_nesterovs_momentum_without_decay(digits: Data) -> None:
    """Of the speed v and the gradient g: v ← 0.9·v + g, then α ← α − lr·(g + 0.9·v)."""
    space = ChannelSpace(build("convnet-bn", shape=digits.shape, seed=0, width=0.25), digits.example)
    search = Search(Supernet(space), random_chains(space.sizes), ExpectedCost(space, Budget(0.5)), 0.5, DMCP(warmup=0))
    alpha, speed = search.chains.alpha.detach().clone(), torch.zeros_like(search.chains.alpha)
    moved: list[Tensor] = []

    def follow(state: State) -> None:
        if not search.alpha_steps:
            return
        gradient = search.chains.alpha.grad
        assert gradient is not None
        speed.mul_(0.9).add_(gradient)
        alpha.sub_(search.optimizer.param_groups[0]["lr"] * (gradient + 0.9 * speed))
        moved.append(search.chains.alpha.detach() - alpha)

    search.before_step = follow  # type: ignore[method-assign]
    recipe = Recipe(6 * 64 / len(digits.train.labels), lr=0.01, batch_size=64)
    fit(search.supernet, digits, recipe, seed=0, hook=search, progress=False)
    assert len(moved) >= 4 and max(float(gap.abs().max()) for gap in moved) < 1e-12
    assert speed.abs().max() > 0


def test_the_rate_of_alpha_falls_from_a_half_to_a_tenth(digits: Data) -> None:
    space = ChannelSpace(build("convnet-bn", shape=digits.shape, seed=0, width=0.25), digits.example)
    search = Search(Supernet(space), Chains(space.sizes), ExpectedCost(space, Budget(0.5)), 0.5, DMCP())
    state = State(space.net, search.optimizer, step=50, steps=100, steps_per_epoch=10)
    rates = [search.settings.lr * search._rate(State(**{**vars(state), "step": step})) for step in (50, 75, 100)]
    assert rates == pytest.approx([0.5, 0.3, 0.1])


# -- from probabilities to widths -------------------------------------------------------------------------------------


def test_direct_sampling_is_the_first_draw_within_the_budget() -> None:
    space = space_of("resnet20")
    chains = random_chains(space.sizes)
    expected = ExpectedCost(space, Budget(0.2))
    found = direct_sample(chains, expected, 0.2, torch.Generator().manual_seed(3))
    drawn = chains.draw(10_000, torch.Generator().manual_seed(3))
    spent = [space.macs(dict(zip([g.name for g in space.groups], w, strict=True))) for w in drawn[:500].tolist()]
    accepted = [i for i, macs in enumerate(spent) if 0.198 <= macs / space.macs() <= 0.2]
    assert found.tolist() == drawn[accepted[0]].tolist()


def test_direct_sampling_gives_up_with_the_nearest() -> None:
    space = space_of("convnet-bn")
    chains = Chains(space.sizes, alpha=-60.0)
    found = direct_sample(chains, ExpectedCost(space, Budget(0.9)), 0.9, torch.Generator().manual_seed(0))
    assert torch.equal(found, chains.widths[:, 0])


def test_expected_sampling_rounds_the_expected_widths() -> None:
    space = space_of("resnet20")
    chains = random_chains(space.sizes)
    mean, _ = chains.moments(chains.marginals().detach())
    widths = mean.round().long()
    assert (widths > mean).any() and (widths < mean).any()
    expected = ExpectedCost(space, Budget(0.5))
    plan = DMCP()._plan(space, chains, expected, Budget(expected.fractions(widths).item()), seed=0)
    assert space.widths(plan).tolist() == widths.tolist()


def test_direct_sampling_is_a_draw_and_not_the_expected_widths() -> None:
    space = space_of("resnet20")
    chains, budget = random_chains(space.sizes), Budget(0.2)
    expected = ExpectedCost(space, budget)
    drawn = direct_sample(chains, expected, 0.2, torch.Generator().manual_seed(7))
    direct = DMCP(sampling="direct")._plan(space, chains, expected, budget, seed=7)
    mean = DMCP(sampling="expected")._plan(space, chains, expected, budget, seed=7)
    assert space.widths(direct).tolist() == drawn.tolist() != space.widths(mean).tolist()


def searched(digits: Data, name: str, budget: Budget, **settings: Any) -> tuple[ChannelSpace, Context, Pruned]:
    net = build(name, shape=digits.shape, seed=0, width=0.5)
    before = copy.deepcopy(net.state_dict())
    recipe = Recipe(0.5, lr=0.03, batch_size=32)
    context = Context(digits, recipe, seed=0, progress=False, dense=Recipe(2, lr=0.05))
    pruned = DMCP(**settings)(net, budget, context)
    assert all(torch.equal(tensor, before[n]) for n, tensor in net.state_dict().items())
    return ChannelSpace(net, digits.example), context, pruned


@pytest.mark.parametrize(
    ("name", "budget", "sampling"),
    [
        ("convnet-bn", Budget(0.25, "conv"), "expected"),
        ("convnet-bn", Budget(0.25, "conv"), "direct"),
        ("convnet-bn", Budget(1.0), "expected"),
        ("resnet20", Budget(0.4), "expected"),
        ("resnet20-b", Budget(parameters=0.5), "direct"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.cost}-{value.fraction}",
)
def test_the_budget_is_met(name: str, budget: Budget, sampling: str, digits: Data) -> None:
    space, context, pruned = searched(digits, name, budget, sampling=sampling)
    spent = space.spent(budget)(space.widths(pruned.plan))
    assert budget.fraction - 0.01 <= spent <= budget.fraction
    assert all(kept == tuple(range(len(kept))) for kept in pruned.plan.keep.values())
    assert cost.macs(pruned.net, digits.example) == space.macs(pruned.plan)
    assert (space.widths(pruned.plan) >= Chains(space.sizes).widths[:, 0].numpy()).all()
    assert pruned.recipe == context.dense


def test_effort_and_history(digits: Data) -> None:
    space, context, pruned = searched(digits, "convnet-bn", Budget(0.25), share=2.0)
    assert 1.0 - 5 / context.steps_per_epoch < pruned.epochs <= 1.0
    names, history = [group.name for group in space.groups], pruned.history
    steps = len(history["spent"])
    chains = Chains(space.sizes)
    for i, name in enumerate(names):
        assert history["p"][name].shape == (steps, int(chains.levels[i]) + 1)
        assert history["p"][name][0].tolist() == [0.5**j for j in range(int(chains.levels[i]) + 1)]
    chains.alpha.data.copy_(history["alpha"])
    mean, variance = chains.moments(chains.marginals().detach())
    assert list(history["widths"].values()) == pytest.approx(mean.tolist())
    assert history["spent"][-1] == pytest.approx(ExpectedCost(space, Budget(0.25))(mean, variance).item())


def test_the_chains_are_those_that_the_settings_say(digits: Data) -> None:
    _, _, pruned = searched(digits, "convnet-bn", Budget(0.5), alpha=1.5, step=0.2, least=0.4, share=2.0)
    for p in pruned.history["p"].values():  # three levels of a fifth, above the two fifths that stay
        assert p[0].tolist() == pytest.approx([(1 / (1 + math.exp(-1.5))) ** j for j in range(4)])


def test_no_weight_is_inherited_and_the_seed_decides_all(digits: Data) -> None:
    _, _, first = searched(digits, "convnet-bn", Budget(0.25))
    _, _, second = searched(digits, "convnet-bn", Budget(0.25))
    assert first.plan == second.plan and torch.equal(first.history["alpha"], second.history["alpha"])
    for one, other in zip(first.net.parameters(), second.net.parameters(), strict=True):
        assert torch.equal(one, other)
    weight = first.net.get_submodule("conv2").get_parameter("weight")
    # drawn at the present width: normal with variance 2 / fan-out
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (25 * len(weight))), rel=0.1)
    inherited = (
        build("convnet-bn", shape=digits.shape, seed=0, width=0.5).get_submodule("conv2").get_parameter("weight")
    )
    assert not torch.isin(weight, inherited).any()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("penalty", -0.1), ("penalty", math.inf), ("lr", 0.0), ("lr", math.nan), ("alpha", math.inf), ("step", 0.0),
        ("step", 1.0), ("least", -0.1), ("least", 0.95), ("warmup", 1.0), ("warmup", -0.5), ("sampling", "best"),
        ("share", 0.0), ("share", math.inf),
    ],
)  # fmt: skip
def test_an_illegal_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"dmcp: {field} is "):
        DMCP(**{field: value})


def test_a_budget_out_of_reach_is_refused_before_any_work(digits: Data) -> None:
    space = ChannelSpace(build("convnet-bn", shape=digits.shape, width=0.5), digits.example)
    least = space.cost(Chains(space.sizes).widths[:, 0].numpy()) / space.macs()
    with pytest.raises(ValueError, match=rf"step=0\.1 and least=0\.1, keeps {least:.4f} of the MACs \(all\)"):
        searched(digits, "convnet-bn", Budget(0.01))
    with pytest.raises(ValueError, match="give a budget of macs or of parameters"):
        searched(digits, "convnet-bn", Budget(latency=0.5))


def test_a_search_too_short_is_refused(digits: Data) -> None:
    with pytest.raises(ValueError, match=r"none of the 0 steps of the search moves α: raise share, now 0\.2"):
        searched(digits, "convnet-bn", Budget(0.25), share=0.2)


def test_the_dense_recipe_is_needed(digits: Data) -> None:
    net = build("convnet-bn", shape=digits.shape, width=0.25)
    with pytest.raises(ValueError, match="how the dense network was trained"):
        DMCP()(net, Budget(0.5), Context(digits, Recipe(1, lr=0.1), seed=0))
