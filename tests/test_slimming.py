"""Liu et al., Network Slimming: the penalty, the threshold, the published lengths and widths, and the whole method."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from prunelab import cost, models
from prunelab.data import Data, load
from prunelab.methods import build
from prunelab.methods.slimming import (
    Penalty,
    Slimming,
    initialise_scales,
    protected,
    threshold_plan,
    with_channel_selection,
)
from prunelab.structure import Budget, ChannelSpace
from prunelab.training import Context, Hook, Recipe, State, fit

HALF = Budget(macs=0.5, scope="conv")
CIFAR = torch.zeros(1, 3, 32, 32)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


@pytest.fixture(scope="module")
def trained(digits: Data) -> nn.Module:
    net = models.build("convnet-bn", shape=digits.shape, seed=0)
    fit(net, digits, Recipe(epochs=4, lr=0.05, batch_size=32), seed=0, progress=False)
    return net


def context(data: Data, epochs: float = 2, **changes: object) -> Context:
    recipe = Recipe(epochs=epochs, lr=0.03, **{"batch_size": 32, **changes})
    return Context(data, recipe, seed=3, progress=False)


def chain(*sizes: int) -> tuple[nn.Sequential, ChannelSpace]:
    """Return 1x1 convolutions with batch norm, of these widths, and their space."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip((1, *sizes), sizes, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(sizes[-1] * 4, 3))
    return net, ChannelSpace(net, torch.zeros(1, 1, 2, 2))


def set_scales(net: nn.Module, values: Tensor) -> None:
    """Fill all γ of a network, in order."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm, part in zip(norms, values.split([norm.num_features for norm in norms]), strict=True):
        norm.weight.data.copy_(part)


# -- the penalty ------------------------------------------------------------------------------------------------------


def test_the_penalty_adds_lambda_times_the_sign_to_gamma_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3, affine=False), nn.Flatten(),
        nn.Linear(48, 5), nn.BatchNorm1d(5), nn.Linear(5, 2),
    )  # fmt: skip
    net[1].weight.data = torch.tensor([0.5, -2.0, 0.0, 1e-6])
    net[6].weight.data.mul_(-1)
    F.cross_entropy(net(torch.randn(6, 1, 8, 8)), torch.tensor([0, 1, 0, 1, 1, 0])).backward()
    before = {name: p.grad.clone() for name, p in net.named_parameters()}
    state = State(net, torch.optim.SGD(net.parameters(), lr=0.1), step=0, steps=1, steps_per_epoch=1)
    hook = Penalty(0.25)
    hook.start(state)
    hook.after_gradients(state)
    added = {name: p.grad - before[name] for name, p in net.named_parameters()}
    torch.testing.assert_close(added.pop("1.weight"), torch.tensor([0.25, -0.25, 0.0, 0.25]))
    torch.testing.assert_close(added.pop("6.weight"), torch.full((5,), -0.25))
    assert not any(change.any() for change in added.values())


class PenaltyInTheLoss(Hook):
    def on_loss(self, state: State, loss: Tensor) -> Tensor:
        norms = (m for m in state.net.modules() if isinstance(m, nn.BatchNorm2d))
        return loss + 0.01 * sum(norm.weight.abs().sum() for norm in norms)


def test_training_is_that_of_the_loss_with_the_penalty(digits: Data, trained: nn.Module) -> None:
    """Momentum and weight decay included."""
    nets = [copy.deepcopy(trained).double() for _ in range(2)]
    data = digits.to("cpu")
    for net, hook in zip(nets, (Penalty(0.01), PenaltyInTheLoss()), strict=True):
        images = data.normalise(data.train.images[:96]).double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        state = State(net.train(), optimizer, step=0, steps=6, steps_per_epoch=6)
        hook.start(state)
        for _ in range(6):
            optimizer.zero_grad()
            hook.on_loss(state, F.cross_entropy(net(images), data.train.labels[:96])).backward()
            hook.after_gradients(state)
            optimizer.step()
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_scales_start_at_one_half_from_scratch() -> None:
    net = models.build("vgg16", shape=(1, 8, 8), width=0.1, seed=0)
    others = {name: p.clone() for name, p in net.named_parameters() if ".weight" not in name or "bn" not in name}
    initialise_scales(net)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == 14 and all((norm.weight == 0.5).all() for norm in norms)
    assert all(torch.equal(net.get_parameter(name), value) for name, value in others.items())


# -- what is ranked, and the threshold --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "length"), [("vgg19", 5504), ("resnet164", 12_112), ("densenet40", 9048)])
def test_the_pooled_scales_have_the_papers_length(name: str, length: int) -> None:
    net = models.build(name, seed=0)
    space = ChannelSpace(with_channel_selection(net, CIFAR), CIFAR)
    assert sum(len(scores) for scores in space.scores("bn_scale").values()) == length


def test_vgg_a_has_the_papers_2752_convolution_channels() -> None:
    assert ChannelSpace(models.build("vgg11", seed=0), CIFAR).sizes.sum() == 2752


def test_each_unit_of_a_preactivation_network_is_scored_by_one_gamma() -> None:
    net = models._preactivation_resnet(models._Task(10, (1, 8, 8), 0.25), depth=20)
    chosen = with_channel_selection(net, torch.zeros(1, 1, 8, 8))
    norms = {name: m for name, m in chosen.named_modules() if isinstance(m, nn.BatchNorm2d)}
    set_scales(chosen, torch.randn(sum(norm.num_features for norm in norms.values())))
    scores = ChannelSpace(chosen, torch.zeros(1, 1, 8, 8)).scores("bn_scale")
    behind = {"select": "norm", "conv1": "bn2", "conv2": "bn3"}
    for group, score in scores.items():
        block, _, layer = group.rpartition(".")
        assert torch.equal(score, norms[f"{block}.{behind[layer]}"].weight.detach().abs())
    assert len(scores) == len(norms) == 19


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5, 0.65])
def test_without_ties_floor_nt_plus_one_channels_go(fraction: float) -> None:
    net, space = chain(6, 10, 4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    set_scales(net, (order + 1.0) * torch.tensor([1.0, -1.0]).repeat(10))  # the sign does not matter
    plan = threshold_plan(space, fraction)
    count = int(20 * Fraction(str(fraction))) + 1
    assert 20 - sum(plan.widths.values()) == count
    kept = torch.cat([order.split([6, 10, 4])[i][list(plan.keep[str(3 * i)])] for i in range(3)])
    assert kept.min() == count  # the smallest went, wherever they were


THREE_LAYERS = chain(2, 3, 4)


@given(st.lists(st.integers(0, 6), min_size=9, max_size=9), st.floats(0, 1, exclude_max=True))
def test_the_threshold_by_brute_force(scales: list[int], fraction: float) -> None:
    net, space = THREE_LAYERS
    set_scales(net, torch.tensor(scales, dtype=torch.float32))
    threshold = sorted(scales)[math.floor(9 * Fraction(str(fraction)))]
    plan, first = threshold_plan(space, fraction), 0
    for group, size in (("0", 2), ("3", 3), ("6", 4)):
        layer = scales[first : first + size]
        above = [i for i, scale in enumerate(layer) if scale > threshold]  # strictly: ties go
        assert list(plan.keep[group]) == (above or [layer.index(max(layer))])  # an empty layer keeps its best
        first += size


def test_the_cap_keeps_part_of_every_layer() -> None:
    net, space = chain(5, 8)
    set_scales(net, torch.cat([torch.arange(1, 6) / 100, torch.arange(1.0, 9)]))
    assert threshold_plan(space, 0.4).keep["0"] == (4,)
    capped = threshold_plan(space, 0.4, cap=0.5)
    assert capped.keep["0"] == (2, 3, 4)  # floor(5 / 2) may go
    assert capped.widths["3"] == 7
    scores = protected({"a": torch.tensor([1.0, 3.0, 2.0, 0.0])}, cap=0.5)["a"]
    assert scores.tolist() == [1, math.inf, math.inf, 0]


@pytest.mark.parametrize(("fraction", "cap"), [(1.0, 1.0), (-0.1, 1.0), ("0.4", 1.0), (0.5, 0.0), (0.5, 1.1)])
def test_an_illegal_fraction_is_named(fraction: float, cap: float) -> None:
    with pytest.raises(ValueError, match=r"(fraction|cap) is .*; it must be in"):
        threshold_plan(chain(2, 2)[1], fraction, cap)


# -- published widths -------------------------------------------------------------------------------------------------


def test_seventy_percent_of_vgg19_is_the_published_count() -> None:
    """The widths that the released code printed for 70% of VGG-19: floor(0.7 · 5504) + 1 = 3,853 channels gone."""
    widths = [45, 64, 128, 128, 256, 256, 249, 184, 36, 6, 2, 0, 0, 0, 5, 292]
    assert 5504 - sum(widths) == math.floor(Fraction("0.7") * 5504) + 1
    net = models.build("vgg19", seed=0)
    space = ChannelSpace(net, CIFAR)
    stays = torch.cat([torch.arange(size) < width for size, width in zip(space.sizes.tolist(), widths, strict=True)])
    set_scales(net, torch.linspace(1, 2, 5504) + 2 * stays)
    found = threshold_plan(space, 0.7).widths
    assert list(found.values()) == [max(1, width) for width in widths]  # where theirs crashes, one channel stays


def test_four_passes_over_vgg19_give_the_published_counts() -> None:
    """The fifth pass trains 1,034 of 5,504 channels, which is 95.6% fewer parameters and 77.2% fewer operations."""
    widths = [22, 62, 83, 119, 193, 168, 85, 40, 32, 32, 32, 32, 32, 32, 32, 38]
    net = models.build("vgg19", seed=0)
    space = ChannelSpace(net, CIFAR)
    plan = space.plan_for(space.scores("bn_scale"), widths)
    small = space.shrink(plan)
    assert sum(widths) == 1034 and round(100 * (1 - sum(widths) / 5504), 1) == 81.2
    assert round(100 * (1 - cost.parameters(small) / cost.parameters(net)), 1) == 95.6
    assert round(100 * (1 - space.macs(plan) / space.macs()), 1) == 77.2


def test_the_published_32_is_512_capped_four_times() -> None:
    width = 512
    for _ in range(4):
        net, space = chain(width, 10 * width)
        set_scales(net, torch.cat([torch.linspace(0, 0.1, width), torch.linspace(1, 2, 10 * width)]))
        width = threshold_plan(space, 0.5, cap=0.5).widths["0"]
    assert width == 32


def test_the_mnist_perceptron_keeps_the_published_weights() -> None:
    """784-500-300-10 with 80% of each hidden layer removed is 784-100-60-10, 84.4% fewer weights."""
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 500), nn.BatchNorm1d(500), nn.ReLU(), nn.Linear(500, 300), nn.BatchNorm1d(300),
        nn.ReLU(), nn.Linear(300, 10),
    )  # fmt: skip
    space = ChannelSpace(net, torch.zeros(1, 1, 28, 28))
    plan = space.plan_for(space.scores("bn_scale"), dict.fromkeys(("1", "4"), Fraction(1, 5)))
    assert plan.widths == {"1": 100, "4": 60}
    assert round(100 * (1 - space.macs(plan) / space.macs()), 1) == 84.4


# -- the whole method -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("passes", "cap"), [(1, 1.0), (3, 0.5)])
def test_the_pruned_network(passes: int, cap: float, digits: Data, trained: nn.Module) -> None:
    before = copy.deepcopy(trained.state_dict())
    budget = Budget(macs=0.3, scope="conv")
    method = Slimming(penalty=0.05, passes=passes, cap=cap)
    pruned, again = (method(trained, budget, context(digits)) for _ in range(2))

    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    for name, value in pruned.net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[name])
    space = ChannelSpace(trained, digits.example)
    assert [p.shape for p in space.shrink(pruned.plan).parameters()] == [p.shape for p in pruned.net.parameters()]
    assert pruned.epochs == pytest.approx(1, abs=passes / 2 / 39)  # whole steps, 39 an epoch
    assert pruned.history["widths"][-1] == pruned.plan.widths
    macs = [space.macs(widths, "conv") / space.macs(scope="conv") for widths in pruned.history["widths"]]
    targets = [0.3 ** ((i + 1) / passes) for i in range(passes)]
    assert all(target - 0.01 <= kept <= target for kept, target in zip(macs, targets, strict=True))
    sizes = space.plan({}).sizes
    for scales, widths in zip(pruned.history["scales"], pruned.history["widths"], strict=True):
        assert {name: len(scale) for name, scale in scales.items()} == dict(sizes)
        assert all(widths[name] >= math.ceil((1 - cap) * size) for name, size in sizes.items())
        sizes = widths


def test_no_pass_takes_more_of_a_layer_than_the_cap(digits: Data, trained: nn.Module) -> None:
    net = copy.deepcopy(trained)
    with torch.no_grad():
        net.get_parameter("bn1.weight").mul_(1e-4)  # by the scales alone, this layer would go first
    free, capped = (
        Slimming(penalty=0.0, passes=2, cap=cap)(net, Budget(0.25, "conv"), context(digits)).history["widths"]
        for cap in (1.0, 0.5)
    )
    assert free[0]["conv1"] < 16 == capped[0]["conv1"]


def test_every_pass_trains_with_the_penalty(monkeypatch: pytest.MonkeyPatch, digits: Data, trained: nn.Module) -> None:
    penalties: list[float] = []

    class Watched(Penalty):
        def start(self, state: State) -> None:
            super().start(state)
            penalties.append(self.penalty)

    monkeypatch.setattr("prunelab.methods.slimming.Penalty", Watched)
    Slimming(penalty=0.03, passes=3)(trained, HALF, context(digits))
    assert penalties == [0.03] * 3


def test_the_channels_that_go_are_those_of_smallest_gamma(digits: Data, trained: nn.Module) -> None:
    pruned = Slimming(penalty=0.05)(trained, HALF, context(digits))
    (scales,) = pruned.history["scales"]
    gone = {name: set(range(len(scale))) - set(pruned.plan.keep[name]) for name, scale in scales.items()}
    largest_gone = {name: scales[name][list(lost)].max() for name, lost in gone.items() if lost}
    for name, kept in pruned.plan.keep.items():
        assert scales[name][list(kept)].min() >= largest_gone.get(name, 0)
    order = sorted((scale, name) for name, values in scales.items() for scale in values.tolist())
    count = sum(map(len, gone.values()))
    # One threshold for the network, but for the last unit or two that the budget had room for.
    below = {name: sum(place == name for _, place in order[:count]) for name in scales}
    assert all(abs(below[name] - len(gone[name])) <= 1 for name in scales)


def test_a_plan_of_two_passes_names_the_channels_of_the_dense_network(digits: Data, trained: nn.Module) -> None:
    """Without training to speak of, two passes keep what one keeps, where it is capped equally often."""
    net = copy.deepcopy(trained)
    set_scales(net, torch.randperm(128, generator=torch.Generator().manual_seed(0)) / 128 + 0.5)
    still = context(digits, epochs=1e-9)
    method = Slimming(penalty=0, lr=1e-9)
    one = method(net, HALF, still)
    two = build("slimming", penalty=0, lr=1e-9, passes=2)(net, HALF, still)
    overlap = [len(set(one.plan.keep[g]) & set(two.plan.keep[g])) for g in one.plan.keep]
    assert all(abs(o - w) <= 1 for o, w in zip(overlap, one.plan.widths.values(), strict=True))


def test_a_depthwise_layer_of_one_channel_is_left_to_the_next_pass(digits: Data) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 64, 10),
    )  # fmt: skip
    nn.init.constant_(net[1].weight, 1e-3)
    nn.init.constant_(net[4].weight, 1e-3)
    pruned = Slimming(penalty=0.0, passes=3)(net, Budget(macs=0.2), context(digits, 0.1))
    assert pruned.plan.widths["0"] == 1
    assert ChannelSpace(net, digits.example).macs(pruned.plan) == cost.macs(pruned.net, digits.example)


def test_the_control_removes_the_same_share_of_every_layer(digits: Data, trained: nn.Module) -> None:
    uniform = Slimming(penalty=0.05, ranking="layer")(trained, HALF, context(digits)).plan
    space = ChannelSpace(trained, digits.example)
    assert uniform.widths == space.plan_for(space.scores("l1"), HALF).widths
    assert Slimming(penalty=0.05)(trained, HALF, context(digits)).plan.widths != uniform.widths


def test_a_larger_penalty_leaves_smaller_scales(digits: Data, trained: nn.Module) -> None:
    sums = []
    for penalty in (0.0, 0.02, 0.1):
        (scales,) = Slimming(penalty=penalty, lr=0.05)(trained, HALF, context(digits)).history["scales"]
        sums.append(sum(scale.sum() for scale in scales.values()))
    assert sums[0] > 1.1 * sums[1] > 1.1 * 1.1 * sums[2]


@pytest.mark.parametrize("name", ["preresnet", "densenet", "resnet20"])
def test_networks_with_streams(name: str, digits: Data) -> None:
    task = models._Task(10, digits.shape, 0.5)
    net = {
        "preresnet": lambda: models._preactivation_resnet(task, depth=11),
        "densenet": lambda: models._densenet(task, depth=10, growth=6),
        "resnet20": lambda: models.build("resnet20", shape=digits.shape, width=0.25, seed=0),
    }[name]()
    initialise_scales(net)  # from scratch, as in the paper
    pruned = Slimming(penalty=0.02, lr=0.05)(net, Budget(macs=0.6), context(digits))
    space = ChannelSpace(with_channel_selection(net, digits.example), digits.example)
    kept = cost.macs(pruned.net, digits.example)
    assert space.macs(pruned.plan) == kept <= 0.6 * space.macs()
    if name != "resnet20":
        assert pruned.net.conv.out_channels == net.conv.out_channels  # the stream is whole
    run = fit(pruned.net, digits, Recipe(epochs=2, lr=0.03, batch_size=32), seed=0, progress=False)
    assert run.loss[-1] < run.loss[0]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("penalty", -1e-4),
        ("penalty", math.inf),
        ("share", 0),
        ("share", 1.5),
        ("lr", 0),
        ("passes", 0),
        ("passes", 1.5),
        ("cap", 0),
        ("cap", 1.5),
        ("ranking", "both"),
    ],
)
def test_an_illegal_setting_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"slimming: {field} is .*must be"):
        build("slimming", **{field: value})


def test_bad_input_is_refused_before_any_work(digits: Data, trained: nn.Module) -> None:
    impossible = context(digits, batch_size=10**6)  # training would refuse this
    with pytest.raises(ValueError, match=r"needs a batch norm .* none follows conv1, conv2, conv3"):
        Slimming()(models.build("convnet", shape=digits.shape), HALF, impossible)
    with pytest.raises(ValueError, match="cannot be met"):
        Slimming(cap=0.5)(trained, Budget(macs=0.2, scope="conv"), impossible)
    with pytest.raises(ValueError, match="cannot be met"):
        Slimming(passes=9)(trained, Budget(macs=1e-4, scope="conv"), impossible)
