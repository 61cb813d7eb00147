"""SPP against its acceptance list: the curve, the probabilities, the masks, the count."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from prunelab import cost, data, models, scores
from prunelab.methods import build
from prunelab.methods.base import space_of
from prunelab.methods.spp import SPP, Pruning, PruningProbability, increment
from prunelab.structure import Budget, ChannelSpace, ColumnSpace
from prunelab.training import Context, Hook, Recipe, State, evaluate, fit

A, U = 0.05, 0.25


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits")


@pytest.fixture(scope="module")
def trained(digits: data.Data) -> nn.Module:
    net = models.build("convnet-bn", shape=digits.shape, seed=0)
    fit(net, digits, Recipe(epochs=4, lr=0.05, batch_size=32), seed=0, progress=False)
    return net


# -- Δ(r) ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [3, 288, 400, 720])
def test_the_curve_has_the_values_the_paper_imposes(target: int) -> None:
    centre = -math.log(U) / (math.log(2 / U) / target)
    assert centre == pytest.approx(2 / 3 * target)  # u = 1/4
    assert increment(np.array([0.0, centre, target]), target) == pytest.approx([A, U * A, 0], abs=1e-15)


def test_the_curve_falls_everywhere_and_is_symmetric_about_its_centre() -> None:
    target, centre = 300, 200.0
    ranks = np.linspace(0, 400, 4001)
    assert (np.diff(increment(ranks, target)) < 0).all()
    offset = np.linspace(0, 200, 101)
    assert increment(centre - offset, target) + increment(centre + offset, target) == pytest.approx(2 * U * A)


@pytest.mark.parametrize(
    ("part", "value"),
    [(0, 0.0500), (0.25, 0.0297), (0.5, 0.0177), (2 / 3, 0.0125), (0.75, 0.0101), (0.9, 0.0047), (1, 0.0),
     (1.2, -0.0129), (4 / 3, -0.025), (1.5, -0.0457), (2, -0.175)],
)  # fmt: skip
def test_the_curve_against_the_table_of_the_sheet(part: float, value: float) -> None:
    assert increment(np.array([part * 600]), 600)[0] == pytest.approx(value, abs=5.1e-5)


@pytest.mark.parametrize("target", [1, 7, 100, 511])
def test_exactly_as_many_ranks_are_punished_as_must_go(target: int) -> None:
    change = increment(np.arange(1200.0), target)
    assert (change[:target] > 0).all()
    assert abs(change[target]) < 1e-15
    assert (change[target + 1 :] < 0).all()


def test_far_ranks_do_not_overflow() -> None:
    assert np.isfinite(increment(np.arange(5000.0), 1)).all()


# -- p ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "margin", "updates"), [(0.5, 0.0, 162), (0.75, 0.0, 172), (0.5, 0.1, 71), (0.75, 0.1, 79)]
)
def test_updates_until_a_layer_of_800_columns_is_finished(ratio: float, margin: float, updates: int) -> None:
    score = np.random.default_rng(0).permutation(800).astype(float)
    layer = PruningProbability(800, int(800 * ratio), SPP(margin=margin))
    done = 0
    while not layer.finished:
        layer.update(score)
        done += 1
    assert done == updates
    assert set(np.flatnonzero(layer.gone)) == set(np.argsort(score)[: int(800 * ratio)])


def test_probabilities_stay_in_range_fall_back_to_zero_and_never_return_from_one() -> None:
    rng = np.random.default_rng(1)
    layer = PruningProbability(100, 60, SPP())
    fell_to_zero = False
    for _ in range(400):
        before, gone = layer.p.copy(), layer.gone.copy()
        layer.update(rng.random(100))
        assert ((layer.p >= 0) & (layer.p <= 1)).all()
        assert layer.gone[gone].all()
        assert (layer.p[gone] == 1).all()
        fell_to_zero |= bool(((before > 0) & (layer.p == 0)).any())
    assert fell_to_zero
    assert layer.gone.sum() <= 60


def test_without_recovery_no_probability_ever_falls() -> None:
    rng = np.random.default_rng(2)
    layer = PruningProbability(100, 60, SPP(recovery=False))
    while not layer.finished:
        before = layer.p.copy()
        layer.update(rng.random(100))
        assert (layer.p >= before).all()


def test_several_units_that_reach_one_together_go_weakest_first_and_stop_at_the_count() -> None:
    layer = PruningProbability(4, 2, SPP(A=1.0, u=0.9, margin=0.25, recovery=False))
    layer.p[:] = 0.99
    layer.update(np.array([3.0, 1.0, 2.0, 4.0]))  # ranks 2, 0, 1, 3: the three weakest reach 1
    assert np.flatnonzero(layer.gone).tolist() == [1, 2]
    assert layer.p == pytest.approx([0.99, 1.0, 1.0, 0.99])  # the third stays, and p = 1 would scale it to zero


def test_no_margin_aims_at_the_last_unit() -> None:
    """Of four, three must go, and a margin of a half aims at five: the best of them is still not punished."""
    layer = PruningProbability(4, 3, SPP(margin=0.5))
    layer.update(np.array([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(layer.p, increment(np.arange(4.0), 3), atol=1e-12)
    assert layer.p[2] > layer.p[3] == pytest.approx(0, abs=1e-12)


def test_forced_finish_takes_the_likeliest_and_of_equals_the_weaker() -> None:
    layer = PruningProbability(5, 3, SPP())
    layer.update(np.array([0.0, 5.0, 3.0, 4.0, 9.0]))
    layer.p[:] = [0.2, 0.7, 0.7, 0.1, 0.7]
    layer.finish()
    assert np.flatnonzero(layer.gone).tolist() == [1, 2, 4]
    layer = PruningProbability(3, 1, SPP())
    layer.update(np.array([2.0, 1.0, 3.0]))
    layer.p[:] = 0.5
    layer.finish()
    assert np.flatnonzero(layer.gone).tolist() == [1]


def test_averaging_sums_scores_with_decay() -> None:
    layer = PruningProbability(2, 1, SPP(averaging=0.5))
    for score in ([1.0, 2.0], [4.0, 8.0]):
        layer.update(np.array(score))
    assert layer.score.tolist() == [4.5, 9.0]


# -- masks -----------------------------------------------------------------------------------------------------------


class Watching(Hook):
    """Runs SPP's hook and checks every step against the definition of its masks."""

    def __init__(self, pruning: Pruning, layer: str) -> None:
        self.pruning, self.layer, self.hidden_once = pruning, layer, 0

    def start(self, state: State) -> None:
        self.pruning.start(state)
        self.weight = state.net.get_submodule(self.layer).get_parameter("weight")

    def before_step(self, state: State) -> None:
        kept = self.weight.detach().clone()
        due = state.step % self.pruning.t == 0
        self.pruning.before_step(state)
        index = [p is self.weight for p, _ in self.pruning.owned].index(True)
        self.mask = self.pruning.masks[index].expand_as(self.weight).bool()
        self.kept = self.pruning.stored[index] if due else kept
        assert torch.equal(self.pruning.stored[index], self.kept)
        assert torch.equal(self.weight * ~self.mask, torch.zeros_like(self.weight))
        assert torch.equal(self.weight[self.mask], self.kept[self.mask])
        columns = self.mask.flatten(1)
        assert torch.equal(columns, columns[:1].expand_as(columns))  # one draw per column, for all filters

    def after_gradients(self, state: State) -> None:
        self.pruning.after_gradients(state)
        assert torch.equal(self.weight, self.kept)  # hidden weights come back
        assert self.weight.grad is not None
        assert not self.weight.grad[~self.mask].any()
        momentum = state.optimizer.state[self.weight].get("momentum_buffer")
        assert momentum is None or not momentum[~self.mask].any()
        self.hidden_once += int((~self.mask).any())

    def after_step(self, state: State) -> None:
        group = state.optimizer.param_groups[0]
        decayed = self.kept * (1 - group["lr"] * group["weight_decay"] * 1.9)  # Nesterov: the decay counts 1.9 times
        torch.testing.assert_close(self.weight[~self.mask], decayed[~self.mask])


def test_every_step_hides_columns_as_the_paper_says(digits: data.Data, trained: nn.Module) -> None:
    net = copy.deepcopy(trained)
    space = ColumnSpace(net, digits.example)
    settings = SPP(t=3, margin=0.1)
    watching = Watching(Pruning(space, settings.counts(space, Budget(macs=0.25, scope="conv")), settings), "conv2")
    recipe = Recipe(epochs=2, lr=0.01, schedule="constant", batch_size=32)
    fit(net, digits, recipe, seed=0, hook=watching, progress=False)
    assert watching.hidden_once > 30


@pytest.mark.parametrize("unit", ["columns", "filters"])
def test_a_layer_that_finishes_zeroes_what_goes_and_scales_the_rest_once(
    unit: str, digits: data.Data, trained: nn.Module
) -> None:
    net = copy.deepcopy(trained)
    space = space_of(unit, net, digits.example)
    pruning = Pruning(space, {group.name: group.size // 2 for group in space.groups}, SPP(unit=unit))
    rng = np.random.default_rng(0)
    for layer in pruning.layers.values():
        layer.p = rng.random(len(layer.p))
    gates = torch.from_numpy(np.concatenate([1 - layer.p for layer in pruning.layers.values()]))
    scaled = copy.deepcopy(net)
    space.apply_gates(scaled, gates)

    assert not pruning.finish()  # no layer had come to its count by itself
    for layer in pruning.layers.values():
        assert layer.p.tolist() == layer.gone.astype(float).tolist()
    plan = space.plan({name: np.flatnonzero(~layer.gone).tolist() for name, layer in pruning.layers.items()})
    space.apply_gates(scaled, space.gates(plan))
    for left, expected in zip(net.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(left, expected)

    settled = copy.deepcopy(net)
    assert pruning.finish()
    for left, again in zip(net.parameters(), settled.parameters(), strict=True):
        assert torch.equal(left, again)


@pytest.mark.parametrize("unit", ["columns", "filters"])
def test_a_unit_that_is_paid_for_is_not_zero(unit: str, digits: data.Data, trained: nn.Module) -> None:
    net = copy.deepcopy(trained)
    space = space_of(unit, net, digits.example)
    settings = SPP(unit=unit, A=1.0, u=0.9, margin=0.3, recovery=False)
    pruning = Pruning(space, {group.name: group.size // 2 for group in space.groups}, settings)
    for layer in pruning.layers.values():
        layer.p[:] = 0.99  # with such steps more units reach 1 than may go
    pruning.refresh()
    assert pruning.finish()
    for name, norm in scores.l1(space).items():
        assert norm.count_nonzero() == (~pruning.layers[name].gone).sum()


@pytest.mark.parametrize("unit", ["columns", "filters"])
def test_probabilities_rise_in_the_order_of_the_l1_norms(unit: str, digits: data.Data, trained: nn.Module) -> None:
    space = space_of(unit, copy.deepcopy(trained), digits.example)
    pruning = Pruning(space, {group.name: group.size // 2 for group in space.groups}, SPP(unit=unit))
    pruning.refresh()
    for group in space.groups:
        weakest_first = space.unit_weights(group.name).abs().sum(1).argsort(stable=True).numpy()
        expected = increment(np.arange(float(group.size)), group.size // 2).clip(min=0)
        np.testing.assert_allclose(pruning.layers[group.name].p[weakest_first], expected, atol=1e-12)


def test_masks_are_drawn_with_the_right_probability(digits: data.Data, trained: nn.Module) -> None:
    net = copy.deepcopy(trained)
    space = ColumnSpace(net, digits.example)
    pruning = Pruning(space, {g.name: g.size // 2 for g in space.groups}, SPP())
    pruning.layers["conv2"].p[:] = 0.3
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    state = State(net, optimizer, step=1, steps=10**9, steps_per_epoch=1)
    pruning.start(state)
    torch.manual_seed(0)
    hidden = total = 0
    for _ in range(200):
        pruning.before_step(state)
        columns = pruning.masks[1].flatten()
        hidden, total = hidden + int((columns == 0).sum()), total + len(columns)
        with torch.no_grad():
            for (parameter, _), stored in zip(pruning.owned, pruning.stored, strict=True):
                parameter.copy_(stored)
    assert hidden / total == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / total))


# -- the whole method --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["columns", "filters"])
@pytest.mark.parametrize("recovery", [True, False])
def test_the_pruned_network(unit: str, recovery: bool, digits: data.Data, trained: nn.Module) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    context = Context(digits, Recipe(epochs=6, lr=0.03, batch_size=32), seed=3, progress=False)
    budget = Budget(macs=0.25, scope="conv")
    method = build("spp", t=1, margin=0.1, unit=unit, recovery=recovery)
    pruned, again = method(trained, budget, context), method(trained, budget, context)

    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    dense = cost.macs(trained, digits.example, scope="conv")
    kept = cost.macs(pruned.net, digits.example, scope="conv") / dense
    assert 0.24 <= kept <= 0.25
    space = (ColumnSpace if unit == "columns" else ChannelSpace)(trained, digits.example)
    assert kept * dense == space.macs(pruned.plan, scope="conv")
    assert pruned.epochs <= 3 + 1 / 33
    assert pruned.plan == again.plan
    for name, value in pruned.net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[name])

    for name, trace in pruned.history["p"].items():
        assert trace.shape[1] == pruned.plan.sizes[name]
        falls = bool((np.diff(trace, axis=0) < 0).any())
        assert falls == recovery
    assert evaluate(pruned.net, digits, "val") > 50  # far above the 10% of chance, before any retraining


def test_half_of_every_convolution_is_exactly_half_of_the_macs() -> None:
    net = models.build("convnet")
    space = ColumnSpace(net, torch.zeros(1, 3, 32, 32))
    assert 2 * space.cost(space.sizes / 2, "conv") == space.cost(space.sizes, "conv")
    plan = space.plan_for(space.scores("l1"), [37 if g.name == "conv1" else Fraction(1, 2) for g in space.groups])
    assert plan.widths == {"conv1": 37, "conv2": 400, "conv3": 400}  # 75 columns do not halve
    even = {g.name: list(range(g.size // 2)) for g in space.groups if g.name != "conv1"}
    cut, whole = space.plan(even), space.plan({})
    conv1 = 75 * 32 * 32 * 32
    assert (space.macs(whole, scope="conv") - conv1) == 2 * (space.macs(cut, scope="conv") - conv1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("A", 0),
        ("A", 1.5),
        ("u", 1),
        ("t", 0),
        ("t", 2.5),
        ("unit", "rows"),
        ("margin", 1),
        ("averaging", -0.1),
        ("share", 0),
        ("lr", 0),
    ],
)
def test_an_illegal_setting_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"spp: {field} is .*must be"):
        build("spp", **{field: value})
