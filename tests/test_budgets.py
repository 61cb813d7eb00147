"""Budgets in MACs, parameters and latency: closed forms equal to counts, and one search for all three."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_channels import TINY, network, plans, tiny
from torch import Tensor, nn

from prunelab import cost, models
from prunelab.structure import Budget, ChannelSpace, ColumnSpace, RowColumnSpace, Space

EXAMPLE = torch.zeros(1, 3, 32, 32)
NETS = "convnet-bn", "model-c", "vgg16", "resnet20", "densenet40", "mobilenet_v2", "regnet_y_400mf", "convnext_tiny"


def assert_parameters_are_counted(space: Space) -> None:
    assert space.parameters() == cost.parameters(space.net)
    for plan in plans(space).values():
        assert space.parameters(plan) == space.parameters(plan.widths) == cost.parameters(space.shrink(plan))


# Parameters in closed form


@pytest.mark.parametrize("name", NETS)
def test_parameters_of_filters(name: str) -> None:
    assert_parameters_are_counted(ChannelSpace(*network(name)))


@pytest.mark.parametrize("kind", [ColumnSpace, RowColumnSpace])
@pytest.mark.parametrize("name", ["convnet-bn", "resnet20-b"])
def test_parameters_of_columns(name: str, kind: type[Space]) -> None:
    assert_parameters_are_counted(kind(*network(name)))


@pytest.mark.parametrize("case", TINY)
def test_parameters_of_every_kind_of_tie(case: str) -> None:
    assert_parameters_are_counted(ChannelSpace(*tiny(case)))


SPACES = {
    kind.kind: kind(models.build("resnet20-b", width=0.5, seed=0), EXAMPLE) for kind in (ChannelSpace, ColumnSpace)
}


@pytest.mark.parametrize("kind", SPACES)
@settings(max_examples=20)
@given(data=st.data())
def test_parameters_at_any_widths(kind: str, data: st.DataObject) -> None:
    space = SPACES[kind]
    widths = np.array([data.draw(st.integers(1, size)) for size in space.sizes.tolist()])
    plan = space.plan({g.name: range(width) for g, width in zip(space.groups, widths.tolist(), strict=True)})
    assert space.parameter_cost(widths) == cost.parameters(space.shrink(plan))
    both = space.parameter_cost(np.stack([widths, space.sizes]))
    assert both.tolist() == [space.parameters(plan), space.parameters()]


def test_parameters_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 2))
    space = ChannelSpace(net, torch.zeros(1, 3, 6, 6))
    # One filter: 27 weights, a bias, a scale and a shift, and 9 weights in each of the two filters behind it.
    assert space.parameters({"0": 1, "2": 2}) == (27 + 1 + 2) + 2 * (9 * 1 + 1) + 2 * (2 * 4 + 1)
    columns = ColumnSpace(net, torch.zeros(1, 3, 6, 6))
    assert columns.parameters({"0": 5, "2": 7}) == 4 * 5 + 4 + 2 * 4 + 5 * 7 + 5 + 2 * 20 + 2


class Sharing(nn.Module):
    """Two layers with one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(x))


def test_a_shared_tensor_counts_once() -> None:
    space = ChannelSpace(Sharing(), torch.zeros(1, 3, 6, 6))
    assert space.parameters() == 4 * 27 + 4 + 4 + 2 * 36 + 2
    assert space.parameters({"a": 3}) == 3 * 27 + 3 + 3 + 2 * 27 + 2


# Budgets of parameters


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.1])
def test_a_budget_of_parameters_is_used_up_to_the_last_unit(kind: str, ranking: str, fraction: float) -> None:
    space = SPACES[kind]
    plan = space.plan_for(space.scores("l1"), Budget(parameters=fraction), ranking)
    allowed = fraction * cost.parameters(space.net)
    assert cost.parameters(space.shrink(plan)) <= allowed
    more = space.widths(plan) + np.eye(len(space.groups), dtype=int)
    more = more[(more <= space.sizes).all(axis=1)]
    assert (space.parameter_cost(more) > allowed).any()


def test_a_budget_of_parameters_that_cannot_be_met_names_the_least() -> None:
    space = SPACES["channels"]
    least = space.parameters({group.name: 1 for group in space.groups}) / space.parameters()
    with pytest.raises(ValueError, match=rf"budget parameters=0.001 cannot .* keeps {least:.4f} of the parameters"):
        space.plan_for(space.scores("l1"), Budget(parameters=0.001))


def test_what_widths_have_spent() -> None:
    space = SPACES["channels"]
    widths = space.sizes // 2
    plan = dict(zip([group.name for group in space.groups], widths.tolist(), strict=True))
    assert space.spent(Budget(0.5))(widths) == space.macs(plan) / space.macs()
    assert space.spent(Budget(0.5, "conv"))(widths) == space.macs(plan, "conv") / space.macs(scope="conv")
    assert space.spent(Budget(parameters=0.5))(widths) == space.parameters(plan) / space.parameters()


# Budgets of latency


class Clock:
    """Seconds of a forward pass that are a function of the network, and how often networks were compared."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, per_step: int) -> None:
        self.per_step, self.comparisons = per_step, 0
        monkeypatch.setattr(cost, "_seconds", self.seconds)
        measure = cost.latencies
        monkeypatch.setattr(cost, "latencies", lambda nets, x: self.counted() or measure(nets, x, repeats=3, warmup=0))

    def counted(self) -> None:
        self.comparisons += 1

    def seconds(self, net: nn.Module, example: Tensor) -> float:
        """Grow with the parameters in steps, and not steadily: every second step is faster than the one before."""
        steps = cost.parameters(net) // self.per_step
        return 1.0 + (steps - 2 * (steps % 2)) * len(example)


@pytest.mark.parametrize("per_step", [1, 500])
@pytest.mark.parametrize("fraction", [0.7, 0.4])
@pytest.mark.parametrize("kind", SPACES)
def test_a_budget_of_latency_is_met_by_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, kind: str, fraction: float, per_step: int
) -> None:
    space, clock = SPACES[kind], Clock(monkeypatch, per_step)
    plan = space.plan_for(space.scores("l1"), Budget(latency=fraction))
    times = {id(net): clock.seconds(net, space.example) for net in (space.net, space.shrink(plan))}
    dense, cut = times.values()
    assert cut <= fraction * dense
    assert clock.comparisons <= 2 + np.log2(space.sizes.sum())
    if per_step == 1:  # then it falls almost steadily, and the budget is used up
        assert cut > 0.95 * fraction * dense


def test_a_latency_that_cannot_be_met_names_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    space, clock = SPACES["channels"], Clock(monkeypatch, 1)
    smallest = space.shrink(space.plan({group.name: [0] for group in space.groups}))
    best = clock.seconds(smallest, EXAMPLE) / clock.seconds(space.net, EXAMPLE)
    with pytest.raises(ValueError, match=rf"budget latency=0.001 cannot .* keeps {best:.4f} of the latency"):
        space.plan_for(space.scores("l1"), Budget(latency=0.001))
    assert clock.comparisons == 1


def test_latency_is_measured_of_the_units_that_the_scores_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 4.0, 3.0, 2.0]).view(4, 1, 1, 1))
    space = ChannelSpace(net, torch.zeros(1, 1, 1, 1))
    monkeypatch.setattr(cost, "_seconds", lambda net, x: float(net[0].weight.detach().sum()))
    assert space.spent(Budget(latency=0.5), space.scores("l1"))(np.array([2])) == (4 + 3) / 10
    assert space.spent(Budget(latency=0.5))(np.array([2])) == (1 + 4) / 10


# What a budget is


def test_a_budget_is_of_one_cost() -> None:
    assert Budget(0.25, "conv") == Budget(macs=0.25, scope="conv")
    budgets = Budget(0.5), Budget(parameters=0.5), Budget(latency=0.5)
    assert [budget.cost for budget in budgets] == ["macs", "parameters", "latency"]
    assert [budget.fraction for budget in budgets] == [0.5] * 3
    assert [budget.what for budget in budgets] == ["MACs (all)", "parameters", "latency"]
    assert [budget.at(0.75) for budget in budgets] == [Budget(0.75), Budget(parameters=0.75), Budget(latency=0.75)]
    assert Budget(0.5, "conv").at(1.0) == dataclasses.replace(Budget(0.5, "conv"), macs=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a budget is one of macs, parameters, latency: got none"),
        ({"macs": 0.5, "latency": 0.5}, r"a budget is one of .*: got \{'macs': 0.5, 'latency': 0.5\}"),
        ({"parameters": 0.0}, r"budget parameters=0.0: the fraction of parameters to keep must be in \(0, 1\]"),
        ({"latency": float("nan")}, r"budget latency=nan: the fraction of latency to keep must be in \(0, 1\]"),
        ({"latency": 1.5}, "budget latency=1.5"),
        ({"parameters": 0.5, "scope": "conv"}, "scope='conv' says which MACs are counted: the budget is of parameters"),
        ({"parameters": 0.5, "scope": "linear"}, "scope is 'linear'; it must be one of 'all', 'conv'"),
    ],
)
def test_bad_budgets_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**arguments)


def test_a_budget_of_what_the_network_has_nothing_of_is_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    space = ChannelSpace(net, torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"Sequential has no MACs \(conv\), of which"):
        space.plan_for(space.scores("l1"), Budget(0.5, "conv"))
    assert space.macs(space.plan_for(space.scores("l1"), Budget(0.5))) == 0.5 * space.macs()
