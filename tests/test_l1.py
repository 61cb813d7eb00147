"""Li et al.: the published widths and counts, the rule on shortcuts, greedy against independent, and the selections."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from prunelab import cost
from prunelab.data import Data, load
from prunelab.methods.base import SPACES
from prunelab.methods.l1 import L1, RECIPES, deciding_weights, projections, sensitivity
from prunelab.methods.random import Random
from prunelab.models import build
from prunelab.structure import Budget, ChannelSpace, ColumnSpace
from prunelab.training import Context, Recipe, evaluate

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(load("digits"), Recipe(epochs=1, lr=0.05), seed=0, progress=False)


def space_of(net: nn.Module, shape: tuple[int, int, int] = SHAPE) -> ChannelSpace:
    return ChannelSpace(net, torch.zeros(1, *shape))


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms scales, shifts and statistics that a wrong cut would not survive."""
    generator = torch.Generator().manual_seed(seed)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return net.eval()


# -- the paper's models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "widths", "macs", "parameters"),
    [
        ("vgg16-A", {(64, 32), (512, 256)}, 206_279_680, 5_397_034),
        ("resnet56-A", {(16, 14), (32, 28), (64, 57)}, 112_435_840, 773_336),
        ("resnet56-B", {(16, 6), (32, 22), (64, 57)}, 90_907_264, 735_712),
        ("resnet110-A", {(16, 8)}, 212_779_648, 1_688_522),
        ("resnet110-B", {(16, 8), (32, 19), (64, 44)}, 155_124_352, 1_168_424),
        ("resnet34-A", {(64, 44), (128, 89), (256, 179)}, 3_100_184_576, 20_151_764),
        ("resnet34-B", {(64, 32), (128, 51), (256, 153)}, 2_782_269_440, 19_469_372),
    ],
)
def test_recipe_gives_the_published_widths_macs_and_parameters(
    recipe: str, widths: set[tuple[int, int]], macs: int, parameters: int
) -> None:
    name, ratios = RECIPES[recipe]
    imagenet = name == "resnet34"
    shape, classes = ((3, 224, 224), 1000) if imagenet else ((3, 32, 32), 10)
    space = space_of(build(name, classes=classes, shape=shape, seed=0), shape)
    plan = space.plan_for(space.scores("l1"), {group: 1 - Fraction(str(p)) for group, p in ratios.items()})
    small = space.shrink(plan)

    assert {(plan.sizes[group], plan.widths[group]) for group in ratios} == widths
    assert all(plan.widths[group] == plan.sizes[group] for group in plan.sizes if group not in ratios)
    assert space.macs(plan) == cost.macs(small, torch.zeros(1, *shape)) == macs
    assert cost.parameters(small) == parameters


def test_recipe_c_cuts_the_third_stage_of_resnet34() -> None:
    space = space_of(build("resnet34", classes=1000, shape=(3, 224, 224), seed=0), (3, 224, 224))
    plan = space.plan_for(space.scores("l1"), {"layer3.0.conv2": 1 - Fraction("0.2")})
    projected = 64 * 128 * 28**2 + 128 * 204 * 14**2 + 204 * 512 * 7**2
    assert RECIPES["resnet34-C"][1] == {"layer3.0.conv2": 0.2}
    assert plan.widths["layer3.0.conv2"] == 204
    assert space.macs(plan) - projected == 3_374_446_592  # the paper prints 3.37e9, projections not counted
    whole, left = (
        sum(p.numel() for name, p in net.named_parameters() if "downsample" not in name)
        for net in (space.net, space.shrink(plan))
    )
    assert f"{left:.2e}" == "2.01e+07" and round(100 * (1 - left / whole), 1) == 7.2  # Table 1, as above


@pytest.mark.parametrize(
    ("recipe", "last", "skipped"),
    [
        ("resnet56-A", 54, {16, 20, 38, 54}),
        ("resnet56-B", 54, {16, 18, 20, 34, 38, 54}),
        ("resnet110-A", 36, {36}),  # stage 1 alone
        ("resnet110-B", 108, {36, 38, 74}),
        ("resnet34-A", 32, {2, 8, 14, 16, 26, 28, 30, 32}),
        ("resnet34-B", 32, {2, 8, 14, 16, 26, 28, 30, 32}),
    ],
)
def test_recipes_skip_the_layers_the_paper_names(recipe: str, last: int, skipped: set[int]) -> None:
    """Counted from 1 as in the paper, without projections, the even convolutions are the first of a block."""
    name, ratios = RECIPES[recipe]
    with torch.device("meta"):
        net = build(name, shape=(3, 32, 32))
    convolutions = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    pruned = {number for number, layer in enumerate(convolutions, start=1) if layer in ratios}
    assert pruned == {*range(2, last + 1, 2)} - skipped and len(pruned) == len(ratios)


def test_a_recipe_is_a_methods_ratios(context: Context) -> None:
    net = build("vgg16", shape=SHAPE, width=0.125, seed=0)
    pruned = L1(ratios=RECIPES["vgg16-A"][1])(net, Budget(1.0), context)
    assert pruned.plan.widths == {
        f"conv{i}": width // 2 if i in (1, *range(8, 14)) else width
        for i, width in enumerate((8, 8, 16, 16, 32, 32, 32, 64, 64, 64, 64, 64, 64), start=1)
    } | {"linear1": 64}


def test_ratios_are_exact(context: Context) -> None:
    # int(160 * (1 - 0.8)) is 31 in floating point, int(320 * (1 - 0.9)) too
    net = nn.Sequential(nn.Conv2d(1, 160, 1), nn.ReLU(), nn.Conv2d(160, 320, 1), nn.Flatten(), nn.Linear(320 * 64, 10))
    pruned = L1(ratios={"0": 0.8, "2": 0.9})(net, Budget(1.0), context)
    assert pruned.plan.widths == {"0": 32, "2": 32}


# -- which filters go -------------------------------------------------------------------------------------------------


def chain() -> nn.Sequential:
    """Two 1x1 convolutions of hand-chosen weights: sums of the first (3, 1), of the second (5, 4)."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 2, 1, bias=False), nn.Flatten(), nn.Linear(128, 10)
    )
    net[0].weight.data = torch.tensor([[-3.0], [1.0]]).view(2, 1, 1, 1)
    net[2].weight.data = torch.tensor([[1.0, -4.0], [-4.0, 0.0]]).view(2, 2, 1, 1)
    return net


def test_greedy_counts_only_surviving_inputs(context: Context) -> None:
    ratios = {"0": 0.5, "2": 0.5}
    independent = L1(ratios=ratios)(chain(), Budget(1.0), context).plan
    greedy = L1(ratios=ratios, order="greedy")(chain(), Budget(1.0), context).plan
    assert independent.keep == {"0": (0,), "2": (0,)}  # |1| + |-4| = 5 beats 4
    assert greedy.keep == {"0": (0,), "2": (1,)}  # without the second input, 1 against 4


def test_greedy_is_independent_when_nothing_upstream_goes(context: Context) -> None:
    plans = [
        L1(ratios={"2": 0.5}, order=order)(chain(), Budget(1.0), context).plan for order in ("independent", "greedy")
    ]
    assert plans[0] == plans[1]


def test_greedy_has_the_same_widths_on_a_network_with_projections(context: Context) -> None:
    net = build("resnet20-b", shape=SHAPE, width=0.5, seed=3)
    independent, greedy = (L1(order=o)(net, Budget(0.4), context).plan for o in ("independent", "greedy"))
    assert greedy.widths == independent.widths
    assert greedy.keep != independent.keep


def test_selection_takes_the_smallest_the_largest_or_the_seeds(context: Context) -> None:
    net = build("convnet-bn", shape=SHAPE, seed=0)
    norms = {f"conv{i}": net.get_submodule(f"conv{i}").weight.detach().abs().sum((1, 2, 3)) for i in (1, 2, 3)}
    ratios = {"conv1": 0.5, "conv2": 0.25, "conv3": 0.75}
    smallest = L1(ratios=ratios)(net, Budget(1.0), context).plan
    largest = L1(ratios=ratios, selection="largest")(net, Budget(1.0), context).plan
    for group, sums in norms.items():

        def sums_of(keep: tuple[int, ...], sums: Tensor = sums) -> tuple[Tensor, Tensor]:
            kept = torch.zeros(len(sums), dtype=torch.bool)
            kept[list(keep)] = True
            return sums[kept], sums[~kept]

        kept, gone = sums_of(smallest.keep[group])
        assert kept.min() >= gone.max()
        kept, gone = sums_of(largest.keep[group])
        assert kept.max() <= gone.min()
    random = [
        L1(selection="random")(net, Budget(0.5), Context(context.data, context.recipe, seed)).plan for seed in (0, 0, 1)
    ]
    assert random[0] == random[1] != random[2]


# -- shortcuts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("resnet20", {}),
        ("resnet20-b", {"stage2.0.conv2": ["stage2.0.shortcut.conv"], "stage3.0.conv2": ["stage3.0.shortcut.conv"]}),
        ("resnet18", {f"layer{i}.0.conv2": [f"layer{i}.0.downsample.0"] for i in (2, 3, 4)}),
        ("resnet50", {f"layer{i}.0.conv3": [f"layer{i}.0.downsample.0"] for i in (1, 2, 3, 4)}),
        ("resnet164", {f"stage{i}.0.conv3": [f"stage{i}.0.shortcut"] for i in (1, 2, 3)}),
    ],
)
def test_projections_are_told_from_bottlenecks(name: str, found: dict[str, list[str]]) -> None:
    space = space_of(build(name, shape=(3, 32, 32), seed=0), (3, 32, 32))
    sums = [g.name for g in space.groups if len(space.writers(g.name)) > 1]
    assert {g: axes for g in sums if (axes := [a.module for a in projections(space, g)])} == found


def test_the_projection_decides_for_the_whole_sum(context: Context) -> None:
    net = build("resnet20-b", shape=SHAPE, seed=0)
    plan = L1(ratios={"stage2.0.conv2": 0.5})(net, Budget(1.0), context).plan
    sums = net.get_submodule("stage2.0.shortcut.conv").weight.detach().abs().sum((1, 2, 3))
    assert plan.keep["stage2.0.conv2"] == tuple(sorted(sums.topk(16).indices.tolist()))


def test_identity_shortcuts_leave_sums_whole(context: Context) -> None:
    net = build("resnet20", shape=SHAPE, seed=0)
    plan = L1()(net, Budget(0.4), context).plan
    space = space_of(net)
    sums = {g.name for g in space.groups if deciding_weights(space, g.name) is None}
    assert sums == {"conv", "stage2.0.conv2", "stage3.0.conv2"}
    for group, width in plan.widths.items():
        assert (width == plan.sizes[group]) == (group in sums)
    with pytest.raises(ValueError, match=r"ratios\['conv'\] must be 0: with an identity shortcut"):
        L1(ratios={"conv": 0.5})(net, Budget(1.0), context)


def test_a_budget_that_whole_sums_do_not_allow_names_the_least(context: Context) -> None:
    net = build("resnet20", shape=SHAPE, seed=0)
    space = space_of(net)
    inner = {g.name: 1 for g in space.groups if g.name.endswith("conv1")}
    least = space.macs(inner) / space.macs()
    with pytest.raises(ValueError, match=f"macs=0.01 .* keeps {least:.4f} of the MACs"):
        L1()(net, Budget(0.01), context)


# -- what every method owes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg11", "resnet20", "resnet20-b"])
@pytest.mark.parametrize(
    "method", [L1(), L1(order="greedy"), L1(selection="random"), L1(unit="columns"), Random(), Random(unit="columns")]
)
def test_budget_is_met_mask_equals_shrink_and_the_net_stays(name: str, method: L1 | Random, context: Context) -> None:
    net = randomised(build(name, shape=SHAPE, width=0.5, seed=0))
    before = copy.deepcopy(net.state_dict())
    pruned = method(net, Budget(0.5, "conv"), context)
    space = SPACES[method.unit](net, context.data.example)
    kept = cost.macs(pruned.net, context.data.example, "conv") / cost.macs(net, context.data.example, "conv")
    assert kept <= 0.5
    one_more = [{**pruned.plan.widths, g: w + 1} for g, w in pruned.plan.widths.items() if w < pruned.plan.sizes[g]]
    assert max(space.macs(widths, "conv") for widths in one_more) > 0.5 * space.macs(scope="conv")
    assert space.macs(pruned.plan, "conv") == cost.macs(pruned.net, context.data.example, "conv")
    images = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(pruned.net.eval()(images), space.mask(pruned.plan).eval()(images), rtol=1e-4, atol=1e-4)
    assert pruned.epochs == 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_random_depends_on_the_seed_alone_and_cuts_alike(context: Context) -> None:
    net = build("vgg11", shape=SHAPE, width=0.5, seed=0)
    plans = [Random()(net, Budget(0.5), Context(context.data, context.recipe, seed)).plan for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert plans[0].widths == plans[2].widths == L1()(net, Budget(0.5), context).plan.widths
    for group, size in plans[0].sizes.items():
        assert plans[0].widths[group] / size == pytest.approx(plans[0].widths["conv1"] / 32, abs=1 / 32)


def test_columns_are_ranked_by_their_own_sums(context: Context) -> None:
    net = build("convnet-bn", shape=SHAPE, seed=0)
    plan = L1(unit="columns")(net, Budget(0.5, "conv"), context).plan
    sums = net.get_submodule("conv2").weight.detach().abs().sum(0).flatten()
    kept = plan.keep["conv2"]
    assert kept == tuple(sorted(sums.topk(len(kept)).indices.tolist()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unit": "rows"}, "unit is 'rows'.*'filters', 'columns'"),
        ({"selection": "best"}, "selection is 'best'.*'smallest', 'largest', 'random'"),
        ({"order": "global"}, "order is 'global'.*'independent', or 'greedy'"),
        ({"order": "greedy", "unit": "columns"}, "order is 'greedy'.*'greedy' with unit='filters'"),
        ({"ratios": {"conv1": 1.0}}, r"ratios\['conv1'\] is 1.0.*\[0, 1\)"),
    ],
)
def test_illegal_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L1(**fields)  # type: ignore[arg-type]
    if "unit" in fields and "order" not in fields:
        with pytest.raises(ValueError, match=message):
            Random(unit="rows")


def test_ratios_that_miss_the_budget_are_refused(context: Context) -> None:
    net = build("convnet-bn", shape=SHAPE, seed=0)
    with pytest.raises(ValueError, match=r"ratios keep 0\.\d+ of the MACs \(all\); the budget is 0.3"):
        L1(ratios={"conv1": 0.1})(net, Budget(0.3), context)
    with pytest.raises(ValueError, match="unknown groups"):
        L1(ratios={"conv9": 0.1})(net, Budget(1.0), context)


# -- sensitivity ------------------------------------------------------------------------------------------------------


def test_sensitivity_prunes_one_layer_at_a_time(context: Context) -> None:
    data: Data = context.data
    net = randomised(build("resnet20", shape=SHAPE, width=0.5, seed=0))
    space = space_of(net)
    table = sensitivity(space, data, (0.0, 0.5), progress=False)
    assert list(table.columns) == ["layer", "ratio", "accuracy"]
    assert list(table.layer.unique()) == [g.name for g in space.groups if g.name.endswith("conv1")]
    assert (table[table.ratio == 0].accuracy == evaluate(net, data)).all()
    layer = "stage2.1.conv1"
    masked = space.mask(space.plan_for(space.scores("l1"), {layer: 0.5}))
    row = table[(table.layer == layer) & (table.ratio == 0.5)]
    assert row.accuracy.item() == pytest.approx(evaluate(masked, data), abs=100 / len(data.val.labels))


def test_sensitivity_of_columns_covers_every_convolution(context: Context) -> None:
    net = build("convnet-bn", shape=SHAPE, width=0.25, seed=0)
    table = sensitivity(ColumnSpace(net, context.data.example), context.data, (0.5,), progress=False)
    assert list(table.layer) == ["conv1", "conv2", "conv3"]
