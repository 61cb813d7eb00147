"""ABCPruner: published structures by their counts, the bees' moves, and the search on the digits."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prunelab import cost, scores
from prunelab.data import load
from prunelab.methods.abcpruner import APART, ABCPruner, Code, Colony, Source, Structures
from prunelab.methods.base import Pruned
from prunelab.models import build
from prunelab.structure import Budget, ChannelSpace
from prunelab.training import Context, Recipe, evaluate, fit, recalibrate

FOUND = "5 7 3 6 6 6 7 6 3 6 2 7 1 2 1 5 5 5 7 4 7 6 2 4 5 3 6"  # alpha = 0.7, the authors' notes


def structures(name: str, budget: float = 1.0, alpha: float = 1.0, seed: int = 0, **more: Any) -> Structures:
    net = build(name, seed=0)
    space = ChannelSpace(net, torch.zeros(1, 3, 32, 32))
    return Structures(space, Budget(budget), alpha, more.get("inherit", "random"), np.random.default_rng(seed))


def colony(fitness: Callable[[Code], float], length: int = 5, most: int = 10, seed: int = 0, **more: Any) -> Colony:
    """A colony on a function of the code alone."""

    def evaluate(code: Code) -> Source:
        return Source(code, None, nn.Identity(), fitness(code))  # type: ignore[arg-type]

    return Colony(length, most, ABCPruner(**more), evaluate, np.random.default_rng(seed))


def channels(net: nn.Module) -> int:
    """The paper's count: output channels of all convolutions, projections too."""
    return sum(m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d))


# -- what a code stands for -------------------------------------------------------------------------------------------


def test_the_published_structure_has_the_published_counts() -> None:
    found = structures("resnet56", alpha=0.7)
    assert len(found.layers) == 27
    assert all(layer.endswith("conv1") for layer in found.layers)
    plan = found.plan(np.array([int(tenths) for tenths in FOUND.split()]))
    small = found.space.shrink(plan)
    assert channels(small) == 1482
    assert round(cost.parameters(small) / 1e6, 2) == 0.39


@pytest.mark.parametrize(("name", "expected"), [
    ("resnet18", 4800), ("resnet34", 8512), ("resnet50", 26560), ("resnet101", 52672), ("resnet152", 75712),
    ("resnet56", 2032),  # the authors' notes
    ("resnet110", 16 + 36 * (16 + 32 + 64)),  # 2701 are left where the table removes 33.28%
])  # fmt: skip
def test_whole_residual_networks_have_the_published_channels(name: str, expected: int) -> None:
    """What the tables' percentages are of."""
    with torch.device("meta"):
        assert channels(build(name, shape=(3, 224, 224))) == expected


@pytest.mark.parametrize(("name", "papers", "more"), [
    ("resnet56", 27, 0),
    ("resnet110", 54, 0),
    ("vgg16", 13, 1),  # the hidden linear layer
    ("resnet50", 16, 17),  # the inner convolutions of a bottleneck apart, and the first convolution
])  # fmt: skip
def test_the_search_has_the_papers_dimensions_and_those_declared(name: str, papers: int, more: int) -> None:
    assert len(structures(name).layers) == papers + more


def test_without_a_budget_a_code_is_tenths() -> None:
    space = structures("convnet-bn").space
    for tenths in (1, 3, 7, 10):
        widths = structures("convnet-bn").plan(np.full(len(space.groups), tenths)).widths
        assert widths == {group.name: max(1, group.size * tenths // 10) for group in space.groups}


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.125])
def test_under_a_budget_a_code_is_proportions(budget: float) -> None:
    found = structures("vgg16", budget)
    space = found.space
    code = np.random.default_rng(1).integers(1, 11, len(found.layers))
    widths = found.plan(code).widths
    assert budget - 0.01 <= space.macs(widths) / space.macs() <= budget
    share = [widths[layer] / (len(space.units(layer)) * c) for layer, c in zip(found.layers, code, strict=True)]
    one = [1 / (len(space.units(layer)) * c) for layer, c in zip(found.layers, code, strict=True)]
    whole = [widths[layer] == len(space.units(layer)) for layer in found.layers]
    # one scale s explains all widths but for a unit each, and layers that are whole
    low = max(s - 2 * unit for s, unit in zip(share, one, strict=True))
    high = min(s + 2 * unit if not full else math.inf for s, unit, full in zip(share, one, whole, strict=True))
    assert low <= high


def test_alpha_bounds_every_layer_under_a_budget_too() -> None:
    found = structures("vgg16", 0.3, alpha=0.7)
    for seed in range(20):
        widths = found.plan(np.random.default_rng(seed).integers(1, 8, len(found.layers))).widths
        assert all(widths[layer] <= found.most[layer] for layer in found.layers)


def test_proportional_scores_by_hand() -> None:
    order = {"a": torch.tensor([3.0, 9.0]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0]), "c": torch.tensor([1.0])}
    found = scores.proportional({"a": 1.0, "b": 2.0}, order)
    assert found["a"].tolist() == [1.0, 2.0]  # p·C/k: 1·2/2, 1·2/1
    assert found["b"].tolist() == [2.0, 8 / 3, 4.0, 8.0]
    assert found["c"].tolist() == [math.inf]


def test_every_filter_can_be_inherited_the_last_too() -> None:
    found = structures("convnet-bn")
    kept = {
        (name, index)
        for _ in range(60)
        for name, indices in found.plan(np.full(len(found.layers), 3)).keep.items()
        for index in indices
    }
    assert len(kept) == sum(group.size for group in found.space.groups)


def test_l1_inherits_the_largest_filters() -> None:
    found = structures("convnet-bn", inherit="l1")
    norms = found.space.scores("l1")
    for name, kept in found.plan(np.full(len(found.layers), 4)).keep.items():
        assert set(kept) == set(norms[name].topk(len(kept)).indices.tolist())


# -- the bees ---------------------------------------------------------------------------------------------------------


def test_a_move_by_hand() -> None:
    bees = colony(lambda code: 0.0, length=1, sources=2, changed=1)
    bees.sources = [bees.evaluate(np.array([4])), bees.evaluate(np.array([8]))]
    # G = 4 + r·(4 − 8), r in (−1, 1): 0 to 8, nearest tenth, clipped at 1
    moves = [int(bees.neighbour(0)[0]) for _ in range(4000)]
    counts = np.bincount(moves, minlength=9) / len(moves)
    assert counts[0] == 0
    expected = [0, 1.5 / 8, *[1 / 8] * 6, 0.5 / 8]
    np.testing.assert_allclose(counts, expected, atol=0.02)
    # rounding to nearest does not drift: truncation would lose half a tenth a move
    inner = [m for m in moves if 2 <= m <= 6]
    assert abs(np.mean(inner) - 4) < 0.1


def test_every_place_is_changed_and_codes_stay_legal() -> None:
    bees = colony(lambda code: 0.0, length=4, most=7, sources=3, changed=2)
    bees.sources = [bees.evaluate(np.array(code)) for code in ([1, 7, 3, 5], [7, 1, 6, 1], [4, 4, 1, 7])]
    changed = np.zeros(4, bool)
    for _ in range(300):
        found = bees.neighbour(0)
        assert ((found >= 1) & (found <= 7)).all()
        assert (found != bees.sources[0].code).sum() <= 2
        changed |= found != bees.sources[0].code
    assert changed.all()
    drawn = np.stack([bees.random_code() for _ in range(500)])
    assert (drawn.min(0) == 1).all() and (drawn.max(0) == 7).all()


def test_a_source_is_replaced_by_a_fitter_one_only() -> None:
    bees = colony(lambda code: float(code.sum()), seed=3, sources=3)
    bees.sources = [bees.evaluate(bees.random_code()) for _ in range(3)]
    for _ in range(30):
        before = [source.fitness for source in bees.sources]
        trials = [source.trials for source in bees.sources]
        bees.employed()
        for j, source in enumerate(bees.sources):
            assert source.fitness > before[j] or (source.fitness == before[j] and source.trials == trials[j] + 1)


def test_the_scout_gives_up_the_worn_source_alone() -> None:
    bees = colony(lambda code: -1.0, sources=3, limit=2)
    bees.sources = [bees.evaluate(bees.random_code()) for _ in range(3)]
    first = list(bees.sources)
    first[1].trials, first[2].trials = 2, 1
    bees.scout()
    assert bees.sources == first  # 2 is not more than the limit
    first[1].trials = 3
    bees.scout()
    assert bees.sources[0] is first[0] and bees.sources[2] is first[2] and bees.sources[1] is not first[1]
    assert bees.sources[1].trials == 0


def test_onlookers_prefer_the_fit() -> None:
    bees = colony(lambda code: 0.0, sources=2)
    tried = [0, 0]
    bees.improve = lambda j: tried.__setitem__(j, tried[j] + 1)  # type: ignore[method-assign]
    bees.sources = [bees.evaluate(np.ones(5, int)), bees.evaluate(np.ones(5, int))]
    bees.sources[0].fitness, bees.sources[1].fitness = 80.0, 40.0
    for _ in range(4000):
        bees.onlookers()
    assert tried[0] == 4000  # P = 0.9·1 + 0.1
    assert tried[1] / 4000 == pytest.approx(0.55, abs=0.03)  # 0.9·0.5 + 0.1


def test_a_cycle_is_employed_bees_then_onlookers_then_the_scout(monkeypatch: pytest.MonkeyPatch) -> None:
    bees, phases = colony(lambda code: 0.0, sources=2, cycles=2), ["employed", "onlookers", "scout"]
    seen: list[str] = []
    for phase in phases:
        monkeypatch.setattr(bees, phase, partial(seen.append, phase))
    bees.search()
    assert seen == 2 * phases


def test_the_colony_finds_the_best_of_a_small_space() -> None:
    target = np.array([2, 5, 1])
    tried: list[float] = []

    def fitness(code: Code) -> float:
        tried.append(-float(((code - target) ** 2).sum()) + 100)
        return tried[-1]

    colony(fitness, length=3, most=5, seed=1, sources=8, cycles=40, limit=5).search()
    best = max(-sum((np.array(code) - target) ** 2) + 100 for code in product(range(1, 6), repeat=3))
    assert max(tried) == best == 100


@pytest.mark.parametrize("seed", range(5))
def test_the_number_of_evaluations_is_bounded(seed: int) -> None:
    tried: list[Code] = []

    def fitness(code: Code) -> float:
        tried.append(code)
        return 0.0

    bees = colony(fitness, seed=seed, sources=4, cycles=3, limit=0)
    bees.search()
    assert 4 + 3 * 4 <= len(tried) <= bees.settings.evaluations == 4 + 3 * 9


# -- the method -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Context]:
    images = load("digits")
    net = build("convnet-bn", classes=10, shape=images.shape, seed=0)
    initial, recipe = copy.deepcopy(net), Recipe(epochs=2, lr=0.05, batch_size=64)
    fit(net, images, recipe, seed=0, progress=False)
    after = Recipe(epochs=2, lr=0.03, batch_size=64)
    return net, Context(images, after, seed=0, progress=False, initial=initial, dense=recipe)


def searched(trained: tuple[nn.Module, Context], budget: float = 0.25, **more: Any) -> Pruned:
    net, context = trained
    return ABCPruner(**{"sources": 2, "cycles": 1, **more})(net, Budget(budget, "conv"), context)


def test_the_best_structure_keeps_its_own_weights(trained: tuple[nn.Module, Context]) -> None:
    net, context = trained
    before = copy.deepcopy(net.state_dict())
    pruned = searched(trained)
    space = ChannelSpace(net, context.data.example)
    assert 0.24 <= space.macs(pruned.plan, "conv") / space.macs(scope="conv") <= 0.25
    assert cost.macs(pruned.net, context.data.example) == space.macs(pruned.plan)
    best = int(np.argmax(pruned.history["fitness"]))
    again = Structures(space, Budget(0.25, "conv"), 1.0, "l1", np.random.default_rng(0))
    assert again.plan(pruned.history["codes"][best]).widths == pruned.plan.widths
    assert pruned.history["best"] == list(np.maximum.accumulate(pruned.history["fitness"]))
    assert evaluate(pruned.net, context.data) == max(pruned.history["fitness"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_fitness_is_measured_with_batch_norm_recalibrated(trained: tuple[nn.Module, Context]) -> None:
    pruned, (net, context) = searched(trained, sources=1, cycles=0), trained
    recipe = dataclasses.replace(context.recipe, epochs=0.5 * context.recipe.epochs, schedule="constant")
    small = ChannelSpace(net, context.data.example).shrink(pruned.plan)
    fit(small, context.data, recipe, seed=context.seed + APART, progress=False)
    stale = evaluate(small, context.data)
    recalibrate(small, context.data, 4, recipe.batch_size, context.seed + APART)
    assert pruned.history["fitness"] == [evaluate(small, context.data)] != [stale]


def test_codes_stay_within_alpha(trained: tuple[nn.Module, Context]) -> None:
    pruned = searched(trained, budget=1.0, alpha=0.4)
    codes = pruned.history["codes"]
    assert codes.min() >= 1 and codes.max() == 4
    assert all(width <= pruned.plan.sizes[name] * 4 // 10 for name, width in pruned.plan.widths.items())


def test_the_effort_is_counted(trained: tuple[nn.Module, Context]) -> None:
    _, context = trained
    pruned = searched(trained, share=0.5)
    per_epoch = len(context.data.train.labels) // 64
    steps = round(0.5 * 2 / 7 * per_epoch)  # at most 2 + 1·(2·2 + 1) trainings
    assert pruned.epochs == pytest.approx(len(pruned.history["fitness"]) * steps / per_epoch)


def test_the_same_seed_gives_the_same_search(trained: tuple[nn.Module, Context]) -> None:
    first, second = searched(trained), searched(trained)
    assert first.plan == second.plan and first.history["fitness"] == second.history["fitness"]


def test_without_cycles_it_is_random_search(trained: tuple[nn.Module, Context]) -> None:
    pruned = searched(trained, sources=3, cycles=0)
    assert len(pruned.history["fitness"]) == 3


def test_nothing_is_inherited_from_the_trained_network_with_none(trained: tuple[nn.Module, Context]) -> None:
    net, context = trained
    found = ABCPruner(inherit="none")._weights(net, context)
    assert context.initial is not None
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), context.initial.parameters(), strict=True))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", 0.0), ("alpha", 0.55), ("alpha", 1.1), ("sources", 0), ("sources", 1), ("cycles", -1), ("limit", -1),
        ("changed", 0), ("inherit", "best"), ("share", 0.0), ("share", 1.5),
    ],
)  # fmt: skip
def test_an_illegal_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"abcpruner: {field} is "):
        ABCPruner(**{field: value})


def test_a_budget_out_of_reach_is_refused(trained: tuple[nn.Module, Context]) -> None:
    with pytest.raises(ValueError, match=r"alpha is 0\.3, which keeps 0\.\d+ of the MACs \(conv\) at most"):
        searched(trained, 0.5, alpha=0.3)
    with pytest.raises(ValueError, match=r"cannot be met"):
        searched(trained, 1e-6)
    with pytest.raises(ValueError, match=r"0\.\d+ steps"):
        searched(trained, sources=50)


def test_no_inheritance_needs_the_initial_network(trained: tuple[nn.Module, Context]) -> None:
    net, context = trained
    with pytest.raises(ValueError, match="needs a context with the initial network"):
        ABCPruner(inherit="none")(net, Budget(0.5), Context(context.data, context.recipe, 0, progress=False))
