"""DropNet: scores and counts worked out by hand, the paper's fractions of units, and the cycles on the digits."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunelab import cost
from prunelab.data import load
from prunelab.methods.base import Pruned
from prunelab.methods.dropnet import (
    DropNet,
    EarlyStopping,
    activity,
    droppable,
    dropped,
    mean_loss,
    oracle,
    without,
)
from prunelab.models import build
from prunelab.structure import Budget, ChannelSpace
from prunelab.training import Context, Recipe, State, fit

MODEL_C = {"conv1": 64, "conv2": 64, "conv3": 128, "conv4": 128}
GLOBAL = [0.802, 0.643, 0.516, 0.414, 0.333, 0.268, 0.216, 0.174, 0.141, 0.115, 0.094]  # the authors' 15-seed runs
BY_LAYER = [0.807, 0.651, 0.526, 0.427, 0.349, 0.286, 0.234, 0.193, 0.161, 0.130, 0.109, 0.094]

Scored = dict[str, torch.Tensor]


def left_after(scores: Scored, p: float, *, by_layer: bool, seed: int = 0) -> Scored:
    """What a cycle leaves of the scores."""
    gone = dropped(scores, p, by_layer=by_layer, draw=np.random.default_rng(seed))
    assert len(set(gone)) == len(gone)
    return {
        layer: score[[unit for unit in range(len(score)) if (layer, unit) not in gone]]
        for layer, score in scores.items()
    }


# -- which units go ---------------------------------------------------------------------------------------------------


def test_the_least_go_first_by_hand() -> None:
    scores = {"a": torch.tensor([5.0, 1.0, 3.0, 9.0]), "b": torch.tensor([2.0, 0.5, 8.0, 7.0, 6.0, 4.0])}
    draw = np.random.default_rng(0)
    assert dropped(scores, 0.4, by_layer=False, draw=draw) == [("b", 1), ("a", 1), ("b", 0), ("a", 2)]
    # by layer ⌊0.5·4⌋ = 2 and ⌊0.5·6⌋ = 3 go, by turns: 1/3 of b, 1/2 of a, 2/3 of b, then both are done
    by_turns = dropped(scores, 0.5, by_layer=True, draw=draw)
    assert by_turns[:3] == [("b", 1), ("a", 1), ("b", 0)]
    assert set(by_turns[3:]) == {("a", 2), ("b", 5)}


@pytest.mark.parametrize(("by_layer", "fractions"), [(False, GLOBAL), (True, BY_LAYER)])
def test_the_papers_fractions_of_model_c(by_layer: bool, fractions: list[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    scores: Scored = {layer: torch.rand(size, generator=generator) for layer, size in MODEL_C.items()}
    found = []
    for _ in fractions:
        scores = left_after(scores, 0.2, by_layer=by_layer)
        found.append(round(sum(map(len, scores.values())) / 384, 3))
    assert found == fractions


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    percent=st.integers(1, 100),
    by_layer=st.booleans(),
    levels=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_a_cycle_drops_the_exact_number_of_least_units(
    sizes: list[int], percent: int, by_layer: bool, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.randint(levels, (size,), generator=generator).float() for i, size in enumerate(sizes)}
    left = left_after(scores, percent / 100, by_layer=by_layer, seed=seed)
    if by_layer:
        assert [len(left[name]) for name in scores] == [max(1, n - max(1, n * percent // 100)) for n in sizes]
    else:
        gone = min(max(1, sum(sizes) * percent // 100), sum(sizes) - len(sizes))
        assert sum(map(len, left.values())) == sum(sizes) - gone
    for name, score in scores.items():
        assert len(left[name]) >= 1
        assert sorted(left[name].tolist()) == sorted(score.tolist())[-len(left[name]) :]


def test_the_last_unit_of_a_layer_stays_however_low_it_is() -> None:
    scores = {"weak": torch.tensor([0.1, 0.3, 0.2]), "strong": torch.arange(10.0) + 5}
    left = left_after(scores, 0.5, by_layer=False)
    assert left["weak"].tolist() == [pytest.approx(0.3)]
    assert left["strong"].tolist() == [9, 10, 11, 12, 13, 14]  # ⌊0.5·13⌋ = 6: two weak ones and four others
    assert {name: len(score) for name, score in left_after(scores, 1.0, by_layer=False).items()} == {
        "weak": 1,
        "strong": 1,
    }


@pytest.mark.parametrize("by_layer", [False, True])
def test_ties_are_broken_at_random_and_evenly(by_layer: bool) -> None:
    scores = {"a": torch.zeros(5), "b": torch.zeros(15)}
    counts = np.zeros(20)
    for seed in range(200):
        for layer, unit in dropped(scores, 0.4, by_layer=by_layer, draw=np.random.default_rng(seed)):
            counts[unit + 5 * (layer == "b")] += 1
    np.testing.assert_allclose(counts / 200, 0.4, atol=0.1)
    again = [dropped(scores, 0.4, by_layer=by_layer, draw=np.random.default_rng(7)) for _ in range(2)]
    assert again[0] == again[1]


# -- the metric -------------------------------------------------------------------------------------------------------


def test_activity_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2))
    net[0].weight.data = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1)
    net[0].bias.data = torch.tensor([0.0, 1.0])
    images = torch.tensor([[[[1.0, 2.0], [-1.0, 0.0]]], [[[3.0, 0.0], [0.0, 0.0]]]])
    found = activity(ChannelSpace(net, images[:1]), [images[:1], images[1:]])
    # before the pool: relu(2x) = 2, 4, 0, 0 and 6, 0, 0, 0; relu(1 - x) = 0, 0, 2, 1 and 0, 1, 1, 1
    assert found["0"].tolist() == [12 / 8, 6 / 8]


def test_activity_takes_absolute_values_before_it_averages() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.LeakyReLU(0.5), nn.Flatten(), nn.Linear(4, 2))
    net[0].weight.data.fill_(1.0)
    images = torch.tensor([[[[4.0, -4.0], [0.0, -2.0]]]])
    found = activity(ChannelSpace(nn.Sequential(*net, nn.ReLU(), nn.Linear(2, 2)), images), [images])
    assert found["0"].tolist() == [(4 + 2 + 0 + 1) / 4]  # the mean of 4, -2, 0, -1 would be 0.25


def test_activity_does_not_depend_on_the_batches() -> None:
    net, images = build("model-c", shape=(1, 8, 8), width=0.1, seed=0), torch.randn(50, 1, 8, 8)
    space = ChannelSpace(net, images[:1])
    one, many = activity(space, [images]), activity(space, images.split(7))
    assert all(torch.allclose(one[name], many[name], rtol=1e-6) for name in one)


# -- Model C ----------------------------------------------------------------------------------------------------------


def test_model_c_has_384_filters_and_256_hidden_units_that_stay() -> None:
    space = ChannelSpace(build("model-c", seed=0), torch.zeros(1, 3, 32, 32))
    sizes = {group.name: group.size for group in space.groups}
    assert droppable(space, Budget(0.25, "conv")) == list(MODEL_C)
    assert droppable(space, Budget(0.25)) == [*MODEL_C, "linear1"]
    assert sizes == {**MODEL_C, "linear1": 256}
    layers = [9 * 3 * 64, 9 * 64 * 64, 9 * 64 * 128, 9 * 128 * 128]
    assert space.macs(scope="conv") == sum(n * 1024 // 4**i for i, n in enumerate(layers))
    assert cost.parameters(space.net) == sum(layers) + 384 + (512 + 1) * 256 + 257 * 10


def test_a_unit_of_a_stream_goes_in_all_layers_of_the_sum() -> None:
    """The fraction of filters, which the paper reports, is not that of the multiply-adds."""
    space = ChannelSpace(build("resnet20", width=0.5, shape=(1, 8, 8), seed=0), torch.zeros(1, 1, 8, 8))
    stream = next(group.name for group in space.groups if space.is_sum(group.name))
    inner = next(group.name for group in space.groups if not space.is_sum(group.name))
    saved = {name: space.macs() - space.macs(without(space, space.plan({}), [(name, 0)])) for name in (stream, inner)}
    assert saved[stream] > 3 * saved[inner]


# -- the oracle -------------------------------------------------------------------------------------------------------


def test_the_oracle_is_brute_force() -> None:
    images = load("digits")
    net = build("model-c", shape=images.shape, width=0.03, seed=0)
    fit(net, images, Recipe(epochs=1, lr=0.1, batch_size=64), seed=0, progress=False)
    space = ChannelSpace(net, images.example)
    found = oracle(space, images)
    pictures, labels = images.normalise(images.train.images), images.train.labels
    for group in space.groups:
        for unit in range(group.size):
            small = space.shrink(without(space, space.plan({}), [(group.name, unit)])).eval()
            with torch.no_grad():
                loss = F.cross_entropy(small(pictures), labels)
            assert float(found[group.name][unit]) == pytest.approx(float(loss), rel=1e-4)
    worst = min((float(score.min()), name) for name, score in found.items())[1]
    assert dropped(found, 1e-9, by_layer=False, draw=np.random.default_rng(0)) == [(worst, int(found[worst].argmin()))]


# -- early stopping ---------------------------------------------------------------------------------------------------


def test_training_ends_when_the_validation_loss_has_not_fallen(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5, 1.9, 1.9, 2.0, 1.8])
    monkeypatch.setattr("prunelab.methods.dropnet.mean_loss", lambda net, data, split: next(losses))
    images, net = load("digits"), build("convnet", shape=(1, 8, 8), width=0.1, seed=0)
    run = fit(
        net, images, Recipe(epochs=7, lr=0.01, batch_size=512), seed=0, hook=EarlyStopping(images, 2), progress=False
    )
    assert run.epochs == 6  # the fifth and sixth losses are not below the fourth


def test_a_training_knows_nothing_of_the_one_before() -> None:
    images, net = load("digits"), build("convnet-bn", shape=(1, 8, 8), width=0.1, seed=0)
    state = State(net, torch.optim.SGD(net.parameters(), 0.1), step=0, steps=9, steps_per_epoch=1)
    hook = EarlyStopping(images, 1)
    hook.best, hook.waited = 0.0, 1
    hook.start(state)
    hook.after_step(state)
    assert hook.best > 0 and not state.stop


def test_the_validation_loss_is_the_mean_and_leaves_the_mode() -> None:
    images, net = load("digits"), build("convnet-bn", shape=(1, 8, 8), width=0.1, seed=0).train()
    state = State(net, torch.optim.SGD(net.parameters(), 0.1), step=0, steps=9, steps_per_epoch=1)
    statistics = net.bn1.running_mean.clone()
    hook = EarlyStopping(images, 1)
    hook.start(state)
    hook.after_step(state)
    assert net.training and torch.equal(net.bn1.running_mean, statistics)
    with torch.no_grad():
        expected = F.cross_entropy(net.eval()(images.normalise(images.val.images)), images.val.labels)
    assert hook.best == pytest.approx(float(expected), rel=1e-5)
    assert mean_loss(net, images, "val") == hook.best


# -- the cycles -------------------------------------------------------------------------------------------------------

DENSE = Recipe(epochs=2, lr=0.05, batch_size=64)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Context]:
    images = load("digits")
    net = build("convnet-bn", shape=images.shape, width=0.5, seed=0)
    initial = copy.deepcopy(net)
    fit(net, images, DENSE, seed=0, progress=False)
    return net, Context(images, Recipe(1, 0.03), seed=0, progress=False, initial=initial, dense=DENSE)


def pruned(trained: tuple[nn.Module, Context], budget: float = 0.25, **fields: Any) -> Pruned:
    net, context = trained
    return DropNet(**fields)(net, Budget(budget, "conv"), context)


@pytest.mark.parametrize("metric", ["minimum", "maximum", "random", "minimum_layer", "maximum_layer", "random_layer"])
def test_cycles_end_at_the_budget_with_the_first_weights(metric: Any, trained: tuple[nn.Module, Context]) -> None:
    net, context = trained
    assert context.initial is not None
    before = copy.deepcopy(net.state_dict())
    found = pruned(trained, metric=metric, p=0.3, j=0.1)
    whole = ChannelSpace(context.initial, context.data.example)
    # reset: bit for bit what the plan leaves of the first weights, batch norm's statistics included
    reset = whole.shrink(found.plan).state_dict()
    assert all(torch.equal(tensor, reset[name]) for name, tensor in found.net.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert found.recipe == DENSE
    # each cycle but the last drops ⌊p·n⌋, and the last no more than is needed
    units, costs = found.history["units"], found.history["cost"]
    assert len(units) == len(costs)
    total = int(whole.sizes.sum())
    left = np.rint(np.array([1.0, *units]) * total).astype(int)
    if metric.endswith("_layer"):
        sizes = whole.sizes
        for n in left[1:-1]:
            sizes = sizes - np.maximum(1, sizes * 3 // 10)
            assert n == sizes.sum()
    else:
        assert all(after == before - before * 3 // 10 for before, after in itertools.pairwise(left[:-1]))
    assert costs[-1] <= 0.25 < min(costs[:-1])
    # with a unit more of any layer it would be over the budget: of some layer, as the rest may fit again
    spent = whole.spent(Budget(0.25, "conv"))
    widths = whole.widths(found.plan)
    assert max(spent(widths + step) for step in np.eye(len(widths), dtype=np.int64)) > 0.25
    assert spent(widths) == costs[-1]


def test_the_units_that_go_are_those_of_least_and_of_largest_activity(trained: tuple[nn.Module, Context]) -> None:
    net, context = trained
    space = ChannelSpace(net, context.data.example)
    batches = [context.data.normalise(context.data.train.images)]
    measured = activity(space, batches)
    for metric, least in (("minimum_layer", True), ("maximum_layer", False)):
        found = pruned(trained, 0.7, metric=metric, p=0.5)  # one cycle
        assert len(found.history["units"]) == 1 and found.epochs == 0
        for layer, score in measured.items():
            torch.testing.assert_close(found.history["activity"][0][layer], score)
            order = score.argsort(descending=not least)[: len(score) - len(found.plan.keep[layer])]
            assert set(found.plan.keep[layer]).isdisjoint(order.tolist())


def test_later_cycles_score_a_network_trained_from_the_first_weights(trained: tuple[nn.Module, Context]) -> None:
    _, context = trained
    assert context.initial is not None
    found = pruned(trained, 0.7, j=0.5)
    assert len(found.history["units"]) > 1
    space = ChannelSpace(context.initial, context.data.example)
    scores = found.history["activity"][0]
    first = without(space, space.plan({}), dropped(scores, 0.2, by_layer=False, draw=np.random.default_rng(0)))
    small = space.shrink(first)
    fit(small, context.data, Recipe(epochs=1, lr=0.05, batch_size=64), seed=0, progress=False)
    again = activity(
        ChannelSpace(small, context.data.example), [images for images, _ in context.data.batches("train", 100)]
    )
    for layer, score in found.history["activity"][1].items():
        assert torch.equal(score, again[layer])
    assert found.epochs == pytest.approx(len(found.history["units"]) - 1, abs=0.01)


@pytest.mark.parametrize("patience", [1, 2])
def test_cycles_end_early_with_the_given_patience(
    patience: int, trained: tuple[nn.Module, Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunelab.methods.dropnet.mean_loss", lambda net, data, split: 1.0)  # never falls again
    net, context = trained
    longer = dataclasses.replace(context, dense=dataclasses.replace(DENSE, epochs=5))
    found = pruned((net, longer), 0.7, j=1.0, patience=patience)
    trainings = len(found.history["units"]) - 1
    assert trainings > 0
    assert found.epochs == pytest.approx((1 + patience) * trainings)


def test_random_metrics_need_no_training(trained: tuple[nn.Module, Context]) -> None:
    found = pruned(trained, 0.2, metric="random")
    assert found.epochs == 0 and found.history["activity"] == [] and len(found.history["units"]) > 2


def test_fresh_weights_keep_the_units_alone(trained: tuple[nn.Module, Context]) -> None:
    reset, fresh = (pruned(trained, 0.7, weights=weights, j=0.5) for weights in ("initial", "fresh"))
    assert reset.plan == fresh.plan and fresh.recipe == DENSE
    assert not any(
        torch.equal(a, b)
        for (name, a), b in zip(reset.net.named_parameters(), fresh.net.parameters(), strict=True)
        if name.endswith("weight") and "bn" not in name
    )
    again = pruned(trained, 0.7, weights="fresh", j=0.5)
    assert all(torch.equal(a, b) for a, b in zip(fresh.net.parameters(), again.net.parameters(), strict=True))
    initial, whole = trained[1].initial, pruned(trained, 1.0, weights="fresh").net
    assert initial is not None  # and of the same shapes: another seed has to draw these
    assert not torch.equal(whole.get_parameter("conv1.weight"), initial.get_parameter("conv1.weight"))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metric", "median"), ("p", 0.0), ("p", 1.1), ("j", 0.0), ("j", 2.0), ("patience", 0), ("patience", 1.5),
        ("weights", "trained"),
    ],
)  # fmt: skip
def test_an_illegal_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"dropnet: {field} is "):
        DropNet(**{field: value})


@pytest.mark.parametrize("missing", ["initial", "dense"])
def test_it_needs_the_beginning(missing: Literal["initial", "dense"], trained: tuple[nn.Module, Context]) -> None:
    net, context = trained
    given = {"initial": context.initial, "dense": context.dense, missing: None}
    with pytest.raises(ValueError, match="needs the initial network and the dense recipe: Context"):
        DropNet()(net, Budget(0.5), Context(context.data, context.recipe, 0, **given))  # type: ignore[arg-type]


def test_a_budget_out_of_reach_is_refused_before_any_work(trained: tuple[nn.Module, Context]) -> None:
    with pytest.raises(ValueError, match=r"budget macs=1e-06 cannot be met: one unit in each of conv1, conv2, conv3"):
        pruned(trained, 1e-6)
