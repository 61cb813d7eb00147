"""Rethinking the value of pruning: the released rule for epochs, the pruned twin, fresh and inherited weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from prunelab.data import load
from prunelab.methods import build
from prunelab.methods.base import Pruned
from prunelab.methods.l1 import L1
from prunelab.methods.scratch import APART, FineTune, Scratch
from prunelab.methods.slimming import threshold_plan
from prunelab.models import build as network
from prunelab.models import reinitialise
from prunelab.structure import Budget, ChannelSpace
from prunelab.training import Context, Recipe, fit, learning_rate

QUARTER = Budget(macs=0.25, scope="conv")
CIFAR = Recipe(160, 0.1, "step", 64, 0.9, nesterov=False, weight_decay=1e-4)
IMAGENET = Recipe(90, 0.1, "step", 256, 0.9, nesterov=False, weight_decay=1e-4, milestones=(1 / 3, 2 / 3))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Context]:
    images = load("digits")
    net = network("convnet-bn", shape=images.shape, seed=0)
    initial, dense = copy.deepcopy(net), Recipe(epochs=2, lr=0.05, batch_size=64)
    fit(net, images, dense, seed=0, progress=False)
    after = Recipe(epochs=1, lr=0.03, batch_size=64)
    return net, Context(images, after, seed=0, progress=False, initial=initial, dense=dense)


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = state(a), state(b)
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def fresh(trained: tuple[nn.Module, Context], seed: int = 0, **fields: Any) -> Pruned:
    net, known = trained
    context = Context(known.data, known.recipe, seed, progress=False, initial=known.initial, dense=known.dense)
    return Scratch(**fields)(net, QUARTER, context)


# -- how long ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "dense", "left", "epochs"),
    [
        (CIFAR, 313_463_808, 206_279_680, 243),  # VGG-16-A
        (CIFAR, 125_485_696, 112_435_840, 178),  # ResNet-56-A and B
        (CIFAR, 125_485_696, 90_907_264, 220),
        (CIFAR, 252_887_680, 212_779_648, 190),  # ResNet-110-A and B
        (CIFAR, 252_887_680, 155_124_352, 260),
        (IMAGENET, 3_663_761_408, 3_100_184_576, 106),  # ResNet-34-A and B
        (IMAGENET, 3_663_761_408, 2_782_269_440, 118),
    ],
)
def test_equal_computation_takes_the_epochs_of_the_released_rule(
    recipe: Recipe, dense: int, left: int, epochs: int
) -> None:
    for cap in (2, math.inf):
        assert Scratch(schedule="B", cap=cap).recipe(recipe, dense / left).epochs == epochs
    assert Scratch(schedule="E").recipe(recipe, dense / left).epochs == recipe.epochs


def test_the_imagenet_rule_doubles_at_most() -> None:
    capped = Scratch(schedule="B", cap=2)
    assert [capped.recipe(IMAGENET, ratio).epochs for ratio in (1, 1.19, 1.999, 2, 2.01, 5)] == [
        90, 107, 179, 180, 180, 180
    ]  # fmt: skip
    assert Scratch(schedule="B", cap=math.inf).recipe(IMAGENET, 5).epochs == 450
    assert capped.recipe(Recipe(0.5, 0.1), 1.5).epochs == 0.5  # never shorter than E, whatever is rounded


def test_milestones_stretch_with_the_run() -> None:
    # 160 epochs: a tenth from 80, a hundredth from 120; 243 epochs: from 121.5 and 182.25
    longer = Scratch(schedule="B", cap=math.inf).recipe(CIFAR, 313_463_808 / 206_279_680)
    for epoch, rate in ((0, 0.1), (121, 0.1), (122, 0.01), (182, 0.01), (183, 0.001), (242, 0.001)):
        assert learning_rate(longer, epoch / 243) == pytest.approx(rate)
    kept = ("schedule", "lr", "batch_size", "momentum", "nesterov", "weight_decay", "milestones")
    assert all(getattr(longer, field) == getattr(CIFAR, field) for field in kept)
    assert Scratch(lr=0.01).recipe(CIFAR, 4).lr == 0.01


def test_epochs_of_a_call_by_hand(trained: tuple[nn.Module, Context]) -> None:
    # 15, 15 and 32 of 32, 32 and 64 filters of 5x5, on maps of 8x8, 4x4 and 2x2 pixels, then a linear layer on 1x1
    dense = 25 * (64 * 32 + 16 * 32 * 32 + 4 * 32 * 64) + 64 * 10
    left = 25 * (64 * 15 + 16 * 15 * 15 + 4 * 15 * 32) + 32 * 10
    found = {schedule: fresh(trained, schedule=schedule, cap=math.inf) for schedule in "EB"}
    net, context = trained
    space = ChannelSpace(net, context.data.example)
    assert found["B"].plan.widths == {"conv1": 15, "conv2": 15, "conv3": 32}
    assert (space.macs(), space.macs(found["B"].plan)) == (dense, left)
    assert [found[schedule].recipe.epochs for schedule in "EB"] == [2, math.floor(2 * dense / left)]  # type: ignore[union-attr]
    assert all(pruned.epochs == 0 for pruned in found.values())


# -- how wide ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "budget"), [("convnet-bn", 0.25), ("vgg11", 0.5), ("resnet20", 0.5)])
def test_uniform_widths_and_filters_are_those_of_l1(
    trained: tuple[nn.Module, Context], name: str, budget: float
) -> None:
    _, context = trained
    net = network(name, shape=context.data.shape, seed=1, width=1.0 if name == "convnet-bn" else 0.25)
    twin = L1()(net, Budget(budget), context).plan
    for method in (Scratch(), Scratch(weights="initial"), FineTune()):
        context = Context(context.data, context.recipe, 0, progress=False, initial=net, dense=CIFAR)
        assert method(net, Budget(budget), context).plan == twin


def test_the_scales_decide_automatic_widths(trained: tuple[nn.Module, Context]) -> None:
    net, context = trained
    space = ChannelSpace(net, context.data.example)
    plan = fresh(trained, widths="scales").plan
    scales = space.scores("bn_scale")
    kept = torch.cat([scales[name][list(units)] for name, units in plan.keep.items()])
    gone = torch.cat([scales[name][sorted({*range(plan.sizes[name])} - {*units})] for name, units in plan.keep.items()])
    # slimming's threshold; after it a group may get one unit back where the budget has room
    assert (kept < gone.max()).sum() <= len(space.groups)
    one_threshold = threshold_plan(space, float((len(gone) - 0.5) / (len(gone) + len(kept)))).widths
    assert all(abs(one_threshold[name] - width) <= 1 for name, width in plan.widths.items())
    assert plan == FineTune(widths="scales")(net, QUARTER, context).plan


def test_random_widths_differ_by_seed_and_meet_the_budget(trained: tuple[nn.Module, Context]) -> None:
    net, context = trained
    space = ChannelSpace(net, context.data.example)
    plans = [fresh(trained, seed, widths="random").plan for seed in (0, 0, 1, 2, 3, 4)]
    assert plans[0] == plans[1]
    assert len({tuple(plan.widths.values()) for plan in plans}) == 5
    for plan in plans:
        assert 0.24 <= space.macs(plan, "conv") / space.macs(scope="conv") <= 0.25


@pytest.mark.parametrize("widths", ["uniform", "scales", "random"])
def test_residual_streams_stay_whole(trained: tuple[nn.Module, Context], widths: Any) -> None:
    _, known = trained
    net = network("resnet20", shape=known.data.shape, width=0.5, seed=0)
    context = Context(known.data, known.recipe, 0, progress=False, initial=net, dense=known.dense)
    plan = Scratch(widths=widths)(net, Budget(0.4), context).plan
    space = ChannelSpace(net, known.data.example)
    assert 0.37 <= space.macs(plan) / space.macs() <= 0.4
    streams = [group.name for group in space.groups if space.is_sum(group.name)]
    assert len(streams) == 3 and all(plan.widths[name] == plan.sizes[name] for name in streams)


# -- which weights ----------------------------------------------------------------------------------------------------


def test_fresh_weights_are_nobodys(trained: tuple[nn.Module, Context]) -> None:
    net, context = trained
    assert context.initial is not None
    example = context.data.example
    runs = [fresh(trained, seed) for seed in (0, 0, 1)]
    assert same(runs[0].net, runs[1].net)
    assert not same(runs[0].net, runs[2].net)
    for source in (net, context.initial):
        inherited = ChannelSpace(source, example).shrink(runs[0].plan)
        for name, weight in runs[0].net.named_parameters():
            if not name.startswith("bn"):
                assert not torch.equal(weight, inherited.get_parameter(name)), name
    wide = reinitialise(copy.deepcopy(net), APART)
    assert not same(wide, context.initial)


def test_a_cut_network_is_drawn_as_one_built_so(trained: tuple[nn.Module, Context]) -> None:
    _, context = trained
    fully = network("convnet-bn", shape=context.data.shape, seed=7)
    before = torch.random.get_rng_state()
    assert same(reinitialise(network("convnet-bn", shape=context.data.shape, seed=3), 7), fully)
    assert torch.equal(before, torch.random.get_rng_state())
    # N(0, 2 / (5·5·C_out)) of the filters that are left, γ = 1, β = 0, no statistics
    vgg = network("vgg11", seed=0)
    space = ChannelSpace(vgg, torch.zeros(1, 3, 32, 32))
    small = reinitialise(space.shrink(space.plan_for(space.scores("l1"), {"conv5": 100, "conv6": 300})), 0)
    assert small.conv6.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 300)), rel=0.01)
    assert small.conv5.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 100)), rel=0.01)
    assert (small.bn6.weight == 1).all() and (small.bn6.bias == 0).all() and (small.bn6.running_mean == 0).all()


def test_statistics_of_a_norm_without_weights_start_anew() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False))
    net(torch.randn(8, 1, 4, 4))
    reinitialise(net, 0)
    assert net[1].num_batches_tracked == 0 and not net[1].running_mean.any() and (net[1].running_var == 1).all()


def test_a_module_that_cannot_be_drawn_anew_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.ones(1))

    net = nn.Sequential(nn.Conv2d(1, 1, 1), Scale())
    before = state(net)
    with pytest.raises(ValueError, match="Sequential cannot be drawn anew: no reset_parameters in 1"):
        reinitialise(net, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_ticket_has_its_first_weights_bit_for_bit(trained: tuple[nn.Module, Context]) -> None:
    net, context = trained
    initial = context.initial
    assert initial is not None
    pruned = fresh(trained, weights="initial")
    keep = [list(units) for units in pruned.plan.keep.values()]
    # L1 of the trained weights chose, filter by filter
    assert set(keep[0]) == set(net.conv1.weight.abs().sum((1, 2, 3)).topk(15).indices.tolist())
    assert torch.equal(pruned.net.conv1.weight, initial.conv1.weight[keep[0]])
    assert torch.equal(pruned.net.conv2.weight, initial.conv2.weight[keep[1]][:, keep[0]])
    assert torch.equal(pruned.net.conv3.weight, initial.conv3.weight[keep[2]][:, keep[1]])
    assert torch.equal(pruned.net.linear.weight, initial.linear.weight[:, keep[2]])
    assert torch.equal(pruned.net.bn2.weight, torch.ones(15)) and (pruned.net.bn2.running_mean == 0).all()


def test_nothing_that_was_given_changes(trained: tuple[nn.Module, Context]) -> None:
    net, context = trained
    assert context.initial is not None
    before = state(net), state(context.initial)
    for method in (Scratch(), Scratch(weights="initial"), FineTune()):
        pruned = method(net, QUARTER, context)
        fit(pruned.net, context.data, Recipe(0.1, 0.1, batch_size=64), seed=0, progress=False)
    for tensors, source in zip(before, (net, context.initial), strict=True):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in source.state_dict().items())


def test_fine_tuning_inherits_and_has_its_own_rate(trained: tuple[nn.Module, Context]) -> None:
    net, context = trained
    twin = L1()(net, QUARTER, context)
    papers, restarted = (
        FineTune()(net, QUARTER, context),
        FineTune(lr=0.05, schedule="one-cycle")(net, QUARTER, context),
    )
    assert same(papers.net, twin.net) and same(restarted.net, twin.net)
    assert papers.recipe is not None and restarted.recipe is not None
    assert [learning_rate(papers.recipe, done) for done in (0, 0.5, 1)] == [0.001] * 3
    assert [learning_rate(restarted.recipe, done) for done in (0, 0.25, 1)] == [0, 0.05, 0]
    assert papers.recipe.epochs == restarted.recipe.epochs == context.recipe.epochs


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "field", "value", "says"),
    [
        ("scratch", "widths", "slim", "scratch: widths is 'slim'; it must be one of 'uniform', 'scales', 'random'"),
        ("scratch", "schedule", "C", "scratch: schedule is 'C'; it must be one of 'E', 'B'"),
        ("scratch", "cap", 0.5, "scratch: cap is 0.5; it must be a number >= 1"),
        ("scratch", "cap", math.nan, "scratch: cap is nan"),
        ("scratch", "weights", "old", "scratch: weights is 'old'; it must be one of 'fresh', 'initial'"),
        ("scratch", "lr", 0.0, "scratch: lr is 0.0; it must be a finite number > 0, or None"),
        ("finetune", "widths", "slim", "finetune: widths is 'slim'"),
        ("finetune", "lr", 0.0, "lr is 0.0; it must be a finite number > 0"),
        ("finetune", "schedule", "E", "schedule is 'E'; it must be one of 'one-cycle', 'step', 'constant'"),
    ],
)
def test_illegal_fields_are_named(method: str, field: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build(method, **{field: value})


def test_a_context_that_knows_too_little_is_refused(trained: tuple[nn.Module, Context]) -> None:
    net, known = trained
    bare = Context(known.data, known.recipe, 0, progress=False, initial=known.initial)
    with pytest.raises(ValueError, match=r"how the dense network was trained: Context\(dense"):
        Scratch()(net, QUARTER, bare)
    without = Context(known.data, known.recipe, 0, progress=False, dense=known.dense)
    with pytest.raises(ValueError, match=r"needs the initial network: Context\(initial"):
        Scratch(weights="initial")(net, QUARTER, without)
    assert Scratch()(net, QUARTER, without).recipe == known.dense
    with pytest.raises(ValueError, match="cannot be met: the smallest legal plan"):
        Scratch()(net, Budget(1e-6), known)
    with pytest.raises(ValueError, match="bn_scale needs a batch norm"):
        FineTune(widths="scales")(network("convnet", shape=known.data.shape), QUARTER, known)
