"""AutoCompress: actions that meet their target, annealing, purification that changes nothing, the whole on digits."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunelab import cost
from prunelab.admm import ADMM
from prunelab.data import load
from prunelab.masks import Masks
from prunelab.methods.autocompress import Actions, AutoCompress, acceptance, anneal, quick
from prunelab.methods.base import Pruned, space_of
from prunelab.models import build
from prunelab.purification import Measure, purify, strength, weakest_gone, without_dead
from prunelab.structure import Budget, ChannelSpace, Plan, RowColumnSpace, Space
from prunelab.training import Context, History, Hook, Recipe, fit

EXAMPLE = torch.zeros(1, 3, 8, 8)
UNITS = ["filters", "columns", "filters+columns"]


def space_for(unit: str, name: str = "convnet-bn") -> Space:
    return space_of(unit, build(name, shape=(3, 8, 8), seed=1).eval(), EXAMPLE)


def batch(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


# -- actions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("name", "target"), [("convnet-bn", 0.5), ("convnet-bn", 0.1), ("resnet20", 0.3)])
def test_actions_meet_the_target_within_one_unit_and_grow_with_the_layer(unit: str, name: str, target: float) -> None:
    space = space_for(unit, name)
    budget = Budget(target, "conv")
    actions = Actions(space, space.plan({}), budget)
    draw = np.random.default_rng(3)
    rates = actions.random(draw)
    weights = [space.unit_weights(group.name).numel() for group in space.groups]
    for _ in range(2):
        for groups in actions.order:
            assert (np.diff([weights[g] for g in groups]) >= 0).all()
            assert (np.diff(rates[groups]) >= 0).all()
        widths = actions.widths(rates)
        spent = space.macs(scope="conv") * target
        assert space.cost(widths, "conv") <= spent
        for g in np.flatnonzero(widths < actions.most):  # not one unit more would fit
            more = widths.copy()
            more[g] += 1
            room = space.widths(dict(zip(space.plan({}).keep, more.tolist(), strict=True)))
            assert room[g] == widths[g] or space.cost(more, "conv") > spent
        plan = actions.plan(rates)
        assert space.widths(plan).tolist() == widths.tolist()
        assert cost.macs(space.shrink(plan), EXAMPLE, "conv") == space.macs(plan, "conv")
        rates = actions.neighbour(rates, 0.35, draw)


@pytest.mark.parametrize(("fraction", "rounds"), [(0.9, 1), (0.5, 1), (0.4, 1), (0.3, 2), (0.25, 2), (0.125, 3)])
def test_each_round_about_halves_the_cost(fraction: float, rounds: int) -> None:
    assert AutoCompress().rounds_to(ANNEALED, Budget(fraction, "conv")) == rounds


@pytest.mark.parametrize("budget", [Budget(0.9), Budget(0.9, "conv"), Budget(parameters=0.9)], ids=str)
def test_each_round_can_remove_a_unit_by_the_budgets_own_measure(budget: Budget) -> None:
    space = space_for("filters")
    one_less = [space.plan({group.name: range(1, group.size)}) for group in space.groups]
    left = [space.spent(budget)(space.widths(plan)) for plan in one_less]
    most = int(math.log(0.9) / math.log(max(share for share in left if share < 1)))
    assert AutoCompress(rounds=most).rounds_to(space, budget) == most
    with pytest.raises(ValueError, match=f"there can be {most} at most"):
        AutoCompress(rounds=most + 1).rounds_to(space, budget)


def test_an_extreme_target_does_not_hang() -> None:
    space = space_for("filters+columns")
    actions = Actions(space, space.plan({}), Budget(0.001, "conv"))
    draw = np.random.default_rng(0)
    for _ in range(3):
        assert space.cost(actions.widths(actions.random(draw)), "conv") <= 0.001 * space.macs(scope="conv")


@pytest.mark.parametrize("unit", UNITS)
def test_uniform_rates_differ_by_single_units(unit: str) -> None:
    space = space_for(unit)
    actions = Actions(space, space.plan({}), Budget(0.4, "conv"))
    rates = actions.uniform()
    assert (rates == rates[0]).all()
    widths = actions.widths(rates)
    room = actions._readable(widths) if unit == "filters+columns" else actions.most
    whole = np.where(actions.columns, room, actions.most)
    assert np.abs(widths - whole * (1 - rates)).max() <= 1
    assert 0.39 <= space.cost(widths, "conv") / space.macs(scope="conv") <= 0.4


def test_rates_are_of_what_is_left() -> None:
    space = space_for("filters+columns")
    present = space.plan({"conv1": range(0, 32, 2), "conv2 columns": range(500)})
    space.apply_gates(space.net, space.gates(present))
    actions = Actions(space, present, Budget(0.15, "conv"))
    assert actions.most.tolist() == space.widths(present).tolist()
    plan = actions.plan(actions.random(np.random.default_rng(0)))
    for name, kept in plan.keep.items():
        assert set(kept) <= set(present.keep[name])
    assert 0.14 <= space.macs(plan, "conv") / space.macs(scope="conv") <= 0.15


# -- annealing --------------------------------------------------------------------------------------------------------


def test_acceptance_by_hand() -> None:
    assert acceptance(0.0, 1.0) == acceptance(-3.0, 0.1) == 1.0
    assert acceptance(2.0, 2.0) == pytest.approx(math.exp(-1))
    assert acceptance(6.0, 2.0) == pytest.approx(math.exp(-3))
    assert acceptance(1.0, 1e-9) == 0.0


def annealed(seed: int = 0, **more: Any) -> tuple[list[Any], list[Plan]]:
    """Anneal on a function of the plan alone: points lost per filter of conv1 that goes."""
    space, plans = ANNEALED, []

    def measure(plan: Plan) -> float:
        plans.append(plan)
        return 100.0 - (32 - plan.widths["conv1"])

    actions = Actions(space, space.plan({}), Budget(0.4, "conv"))
    return anneal(actions, measure, AutoCompress(**more), np.random.default_rng(seed)), plans


ANNEALED = ChannelSpace(build("convnet-bn", shape=(3, 8, 8), seed=1).eval(), EXAMPLE)


@pytest.mark.parametrize("seed", range(4))
def test_evaluations_are_bounded_and_temperatures_fall(seed: int) -> None:
    tried, plans = annealed(seed, evaluations=12, start_temperature=8.0, stop_temperature=0.5)
    assert len(tried) == len(plans) == 12
    temperatures = [action.temperature for action in tried]
    assert temperatures[0] == 8.0 and temperatures[-1] == pytest.approx(0.5)
    np.testing.assert_allclose(np.divide(temperatures[1:], temperatures[:-1]), (0.5 / 8) ** (1 / 11))
    assert tried[0].accepted
    current = tried[0].accuracy
    for action in tried[1:]:
        assert action.accepted or action.accuracy < current  # what is no worse is always accepted
        current = action.accuracy if action.accepted else current


def test_worse_actions_are_accepted_as_often_as_the_formula_says() -> None:
    chances: list[float] = []
    accepted = []
    for seed in range(8):
        tried, _ = annealed(seed, evaluations=25, start_temperature=3.0, stop_temperature=3.0)
        current = tried[0].accuracy
        for action in tried[1:]:
            if action.accuracy < current:
                chances.append(math.exp((action.accuracy - current) / 3.0))
                accepted.append(action.accepted)
            current = action.accuracy if action.accepted else current
    assert len(chances) > 40
    spread = math.sqrt(sum(p * (1 - p) for p in chances))
    assert abs(sum(accepted) - sum(chances)) < 3 * spread


def test_changes_shrink_with_the_temperature() -> None:
    bounds = []

    class Noted(np.random.Generator):
        def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
            bounds.append(high)
            return super().uniform(low, high, size)

    settings = AutoCompress(evaluations=4, start_temperature=8.0, stop_temperature=1.0, perturbation=0.4)
    actions = Actions(ANNEALED, ANNEALED.plan({}), Budget(0.4, "conv"))
    anneal(actions, lambda plan: 50.0, settings, Noted(np.random.PCG64(0)))
    assert bounds == pytest.approx([1.0, 0.2, 0.1, 0.05])  # T is 8, 4, 2, 1; the first is drawn from U(0, 1)


def test_the_search_finds_better_rates_than_its_first() -> None:
    gains = []
    for seed in range(3):
        tried, _ = annealed(seed, evaluations=20)
        gains.append(max(action.accuracy for action in tried) - tried[0].accuracy)
    assert min(gains) >= 0 and np.mean(gains) > 2


def test_the_same_seed_gives_the_same_actions() -> None:
    (first, _), (second, _), (other, _) = annealed(1), annealed(1), annealed(2)
    assert [a.accuracy for a in first] == [a.accuracy for a in second] != [a.accuracy for a in other]
    assert all(np.array_equal(a.rates, b.rates) for a, b in zip(first, second, strict=True))


# -- purification -----------------------------------------------------------------------------------------------------


def unsettle(net: nn.Module) -> None:
    """Give batch norm statistics and shifts, so that a filter of zeros leaves a constant."""
    generator = torch.Generator().manual_seed(5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                assert isinstance(tensor, Tensor)
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)


def test_what_nobody_reads_is_dead_and_the_outputs_stay() -> None:
    space = space_for("filters+columns")
    unsettle(space.net)
    net = space.net
    with torch.no_grad():
        net.get_parameter("conv2.weight")[:, 3] = 0  # no column of conv2 reads filter 3 of conv1
        net.get_parameter("conv3.weight")[:, 7, 2] = 0  # five columns
        net.get_parameter("conv1.weight")[9] = 0  # leaves the constant of its batch norm
        for name in ("conv2.weight", "bn2.weight", "bn2.bias"):
            net.get_parameter(name)[4] = 0  # zero, whatever comes in
    before = net(batch())
    assert before.abs().sum() > 0
    plan = without_dead(space, space.plan({}))
    assert set(range(32)) - set(plan.keep["conv1"]) == {3}
    assert set(range(32)) - set(plan.keep["conv2"]) == {4}
    gone = set(range(800)) - set(plan.keep["conv3 columns"])
    assert gone == {*range(4 * 25, 5 * 25), *(7 * 25 + 2 * 5 + x for x in range(5))}
    assert set(range(800)) - set(plan.keep["conv2 columns"]) == {*range(3 * 25, 4 * 25)}
    torch.testing.assert_close(net(batch()), before, atol=1e-6, rtol=0)
    torch.testing.assert_close(space.shrink(plan)(batch()), before, atol=1e-5, rtol=1e-5)


def test_death_spreads_backwards() -> None:
    space = ChannelSpace(build("convnet-bn", shape=(3, 8, 8), seed=1).eval(), EXAMPLE)
    with torch.no_grad():
        linear = space.net.get_parameter("linear.weight")
        pixels = linear.shape[1] // 64
        linear[:, : 63 * pixels] = 0  # only the last filter of conv3 is read,
        space.net.get_parameter("conv3.weight")[63, 1:] = 0  # and it reads only the first of conv2
    before = space.net(batch())
    plan = without_dead(space, space.plan({}))
    assert plan.keep["conv3"] == (63,) and plan.keep["conv2"] == (0,) and len(plan.keep["conv1"]) == 32
    torch.testing.assert_close(space.shrink(plan)(batch()), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unit", UNITS)
def test_nothing_is_dead_in_a_network_without_zeros(unit: str) -> None:
    space = space_for(unit, "resnet20")
    assert without_dead(space, space.plan({})) == space.plan({})


def test_a_stream_of_an_addition_is_dead_only_if_no_reader_is_left() -> None:
    space = space_for("filters", "resnet20")
    assert isinstance(space, ChannelSpace)
    stream = next(group.name for group in space.groups if space.is_sum(group.name))
    units = space.units(stream)
    with torch.no_grad():
        readers = [a for a in space.coupling.axes if a.role == "in" and (a.units == units.start).any()]
        assert len(readers) > 2
        for i, axis in enumerate(readers):
            weight = space.net.get_parameter(axis.name)
            weight[:, np.flatnonzero(axis.units == units.start)] = 0
            alone = without_dead(space, space.plan({})) == space.plan({})
            assert alone == (i < len(readers) - 1)


def test_strength_by_hand() -> None:
    net = build("convnet-bn", shape=(3, 8, 8), seed=1).eval()
    with torch.no_grad():
        for name, value in (
            ("conv1.weight", 1.0),
            ("conv2.weight", 1.0),
            ("conv3.weight", 1.0),
            ("linear.weight", 1.0),
        ):
            net.get_parameter(name).fill_(value)
        net.get_parameter("conv1.weight")[0] *= 9  # mean norm 40/32 of the others'
        net.get_parameter("conv2.weight")[:, 5] *= 0.5  # all columns that read filter 5 of conv1
    space = ChannelSpace(net, EXAMPLE)
    found = strength(space, space.plan({}))
    torch.testing.assert_close(found[0], torch.tensor(32 / 31.5))  # read by columns of norm 1 in a mean of 31.5/32
    torch.testing.assert_close(found[1], torch.tensor(32 / 40))
    torch.testing.assert_close(found[5], torch.tensor(0.5 * 32 / 31.5))
    present = space.plan({"conv1": range(16)})
    space.apply_gates(net, space.gates(present))
    found = strength(space, present)
    torch.testing.assert_close(found[1], torch.tensor(16 / 24))  # the mean is that of the filters that are there
    assert not found[16:32].any()


@pytest.mark.parametrize("unit", UNITS)
def test_the_weakest_go_and_the_target_is_met(unit: str) -> None:
    space = space_for(unit)
    present = space.plan_for(space.scores("l2"), Budget(0.5, "conv"))
    space.apply_gates(space.net, space.gates(present))
    strengths = strength(space, present)
    plan = weakest_gone(space, present, strengths, Budget(0.4, "conv"))
    assert all(set(kept) <= set(present.keep[name]) for name, kept in plan.keep.items())
    assert 0.39 <= space.macs(plan, "conv") / space.macs(scope="conv") <= 0.4


def test_purification_stops_at_epsilon_or_at_the_budget() -> None:
    def run(epsilon: float, budget: float) -> tuple[float, dict[str, float]]:
        space = space_for("filters+columns")

        def measure(plan: Plan) -> float:  # a point for every percent of the multiply-adds
            return 100 * space.macs(plan, "conv") / space.macs(scope="conv")

        present = space.plan_for(space.scores("l2"), Budget(0.6, "conv"))
        _, plan, report = purify(space, present, Budget(budget, "conv"), measure, epsilon)
        assert space.gates(plan).sum() < len(space.gates(plan))
        assert torch.equal(space.net(batch()), space.mask(plan)(batch()))
        return measure(plan), report

    within, report = run(4.0, budget=0.3)
    assert 55 <= within <= 58 and report["before"] - report["after"] <= 4 and report["tau"] > 0
    assert run(0.0, budget=0.3)[0] == pytest.approx(60, abs=0.3)
    assert 54 <= run(math.inf, budget=0.55)[0] <= 55
    assert 60 * 0.99**16 - 1 <= run(math.inf, budget=0.1)[0] <= 60 * 0.99**16


def test_purification_may_cost_just_epsilon() -> None:
    space = space_for("columns")
    present = space.plan_for(space.scores("l2"), Budget(0.6, "conv"))
    accuracies = iter([70.0, 69.5, 69.0, 68.9])
    _, plan, report = purify(space, present, Budget(0.1, "conv"), lambda plan: next(accuracies), epsilon=1.0)
    assert report["before"] == 70 and report["after"] == 69
    assert space.macs(plan, "conv") / space.macs(scope="conv") == pytest.approx(0.6 * 0.99**2, abs=0.002)


# -- the method -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(load("digits"), Recipe(epochs=1.0, lr=0.03, batch_size=64), seed=0, progress=False)


@pytest.fixture(scope="module")
def trained(context: Context) -> nn.Module:
    net = build("convnet-bn", classes=10, shape=context.data.shape, seed=0)
    fit(net, context.data, Recipe(epochs=2, lr=0.05, batch_size=64), seed=0, progress=False)
    return net


def compressed(net: nn.Module, context: Context, budget: float = 0.25, **more: Any) -> Pruned:
    given = {"evaluations": 3, "updates": 2, "rho": 1.0, "images": 50, **more}
    return AutoCompress(**given)(net, Budget(budget, "conv"), context)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("purification", [False, True])
def test_the_budget_is_met_on_digits(trained: nn.Module, context: Context, unit: str, purification: bool) -> None:
    before = copy.deepcopy(trained.state_dict())
    pruned = compressed(trained, context, unit=unit, purification=purification)
    space = space_of(unit, trained, context.data.example)
    assert 0.24 <= space.macs(pruned.plan, "conv") / space.macs(scope="conv") <= 0.25
    assert cost.macs(pruned.net, context.data.example, "conv") == space.macs(pruned.plan, "conv")
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert pruned.epochs == pytest.approx(0.5, abs=0.1)
    assert [len(tried) for tried in pruned.history["actions"]] == [3, 3]  # two rounds of 2x
    assert ("purification" in pruned.history) == purification
    (cut, *purified), (final, *_) = pruned.history["fractions"]
    assert 0.49 <= cut <= 0.5 and 0.24 <= final <= 0.25
    assert purified == sorted(purified, reverse=True) and all(0.25 <= fraction <= cut for fraction in purified)


def test_the_budget_is_met_on_a_residual_network(context: Context) -> None:
    net = build("resnet20", classes=10, shape=context.data.shape, seed=0)
    pruned = compressed(net, context, 0.4, rounds=1, images=10, evaluations=1, share=0.2, updates=1, purification=False)
    space = RowColumnSpace(net, context.data.example)
    assert 0.39 <= space.macs(pruned.plan, "conv") / space.macs(scope="conv") <= 0.4
    assert cost.macs(pruned.net, context.data.example, "conv") == space.macs(pruned.plan, "conv")


def test_the_same_seed_gives_the_same_network(trained: nn.Module, context: Context) -> None:
    first, second = (compressed(trained, context, 0.6, unit="filters") for _ in range(2))
    assert first.plan == second.plan
    assert all(torch.equal(a, b) for a, b in zip(first.net.parameters(), second.net.parameters(), strict=True))


def test_without_evaluations_rates_are_uniform(trained: nn.Module, context: Context) -> None:
    pruned = compressed(trained, context, 0.5, evaluations=0, unit="filters", purification=False)
    assert pruned.history["actions"] == [[]]
    (rates,) = pruned.history["rates"]
    assert max(rates.values()) - min(rates.values()) < 3 / 32


def test_what_is_pruned_to_is_the_best_action(trained: nn.Module, context: Context) -> None:
    pruned = compressed(trained, context, 0.5, evaluations=8, unit="filters", purification=False)
    (tried,), (rates,) = pruned.history["actions"], pruned.history["rates"]
    best = max(tried, key=lambda action: action.accuracy)
    assert best is not tried[-1]
    space = space_of("filters", trained, context.data.example)
    actions = Actions(space, space.plan({}), Budget(0.5, "conv"))
    assert [*rates.values()] == pytest.approx(1 - actions.widths(best.rates) / actions.most)


@dataclass(frozen=True)
class Noted(Context):
    """A context that notes the hook of every training."""

    hooks: list[Hook] = field(default_factory=list)

    def train(self, net: nn.Module, recipe: Recipe, hook: Hook, label: str, seed: int | None = None) -> History:
        self.hooks.append(hook)
        return super().train(net, recipe, hook, label, seed)


def test_a_round_is_admm_with_a_growing_rho_and_the_retraining_of_what_its_cut_leaves(
    trained: nn.Module, context: Context
) -> None:
    noted = Noted(**vars(context))
    pruned = compressed(
        trained, noted, 0.5, unit="filters", evaluations=1, rho=0.5, growth=1.5, updates=2, purification=False
    )
    admm, masked = noted.hooks
    assert isinstance(admm, ADMM) and admm.rho == pytest.approx(0.5 * 1.5**2)
    assert type(masked) is Masks and masked.plan == pruned.plan
    retrained = masked.space.mask(masked.plan).state_dict()
    assert all(torch.equal(tensor, retrained[name]) for name, tensor in masked.space.net.state_dict().items())


def test_epsilon_is_what_a_purification_may_cost(
    trained: nn.Module, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def noted(space: Space, present: Plan, budget: Budget, measure: Measure, epsilon: float) -> Any:
        given.append(epsilon)
        return purify(space, present, budget, measure, epsilon)

    monkeypatch.setattr("prunelab.methods.autocompress.purify", noted)
    compressed(trained, context, 0.25, unit="filters", evaluations=1, epsilon=0.25)
    assert given == [0.25, 0.25]


def test_a_quick_evaluation_sees_the_first_validation_images(trained: nn.Module, context: Context) -> None:
    space, images = space_of("filters", copy.deepcopy(trained), context.data.example), context.data
    plan = space.plan_for(space.scores("l2"), Budget(0.3, "conv"))
    with torch.no_grad():
        right = space.mask(plan)(images.normalise(images.val.images)).argmax(1) == images.val.labels
    first, all_of_them = (100 * found.double().mean().item() for found in (right[:50], right))
    assert quick(space, context, 50)(plan) == pytest.approx(first) != pytest.approx(all_of_them)


def test_the_search_sees_as_many_validation_images_as_asked_and_no_others(trained: nn.Module, context: Context) -> None:
    blank = copy.deepcopy(context.data)
    blank.test.images.zero_()
    blank.val.images[50:] = 0
    found, blind = (
        compressed(trained, Context(images, context.recipe, seed=0, progress=False), 0.6, unit="filters", images=50)
        for images in (context.data, blank)
    )
    assert found.plan == blind.plan
    (tried,), (again,) = found.history["actions"], blind.history["actions"]
    assert [action.accuracy for action in tried] == [action.accuracy for action in again]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("unit", "blocks"), ("rounds", 0), ("rounds", 1.5), ("evaluations", -1), ("stop_temperature", 0.0),
        ("start_temperature", 0.1), ("start_temperature", math.inf), ("perturbation", 0.0), ("images", 0), ("rho", 0.0),
        ("growth", 0.9), ("updates", 0), ("epsilon", -1.0), ("purification", 0.5),
        ("share", 0.0), ("share", 1.5), ("lr", 0.0),
    ],
)  # fmt: skip
def test_an_illegal_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"autocompress: {field} is "):
        AutoCompress(**{field: value})


def test_reversed_temperatures_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"start_temperature is 0\.5; it must be a finite number >= stop_temp\w+, 5\.0"
    ):
        AutoCompress(start_temperature=0.5, stop_temperature=5.0)


def test_what_cannot_be_done_is_refused_before_any_work(trained: nn.Module, context: Context) -> None:
    with pytest.raises(ValueError, match=r"rounds is 5000; each must remove something.* there can be \d+ at most"):
        compressed(trained, context, rounds=5000, unit="filters")
    with pytest.raises(ValueError, match="there can be 0 at most"):
        compressed(trained, context, 1.0, rounds=1)
    with pytest.raises(ValueError, match="cannot be met"):
        compressed(trained, context, 1e-6)
    with pytest.raises(ValueError, match=r"each of 4 trainings gets \d+ steps, fewer than updates=50"):
        compressed(trained, context, updates=50)


def test_a_budget_just_below_one_removes_something(trained: nn.Module, context: Context) -> None:
    pruned = compressed(trained, context, 0.9999, unit="filters")
    assert cost.macs(pruned.net, context.data.example, "conv") < cost.macs(trained, context.data.example, "conv")
    assert len(pruned.history["fractions"]) == 1


def test_a_frozen_layer_is_named_before_training(trained: nn.Module, context: Context) -> None:
    net = copy.deepcopy(trained)
    net.conv2.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="ADMM: a layer that it prunes is frozen"):
        compressed(net, context)


def test_a_budget_of_one_changes_nothing(trained: nn.Module, context: Context) -> None:
    pruned = compressed(trained, context, 1.0)
    assert pruned.epochs == 0 and set(map(len, pruned.plan.keep.values())) == set(pruned.plan.sizes.values())
