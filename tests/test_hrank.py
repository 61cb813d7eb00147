"""HRank: the rank of maps known by hand, where maps are seen, the published counts, and what the pruning leaves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor, nn

from prunelab import scores
from prunelab.data import load
from prunelab.masks import Masks
from prunelab.methods.base import Pruned
from prunelab.methods.hrank import RATES, Count, HRank, alone, by_layer, count, gaps, removed
from prunelab.models import DenseLayer, build
from prunelab.structure import Budget, ChannelSpace, ColumnSpace
from prunelab.structure.maps import mean_over_maps
from prunelab.training import Context, Recipe, State, fit

SHAPE = (1, 8, 8)
EPSILON = 2.0**-23  # of float32


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(load("digits"), Recipe(epochs=1, lr=0.05, batch_size=64), seed=0, progress=False)


def space_of(net: nn.Module, shape: tuple[int, int, int] = SHAPE) -> ChannelSpace:
    return ChannelSpace(net, torch.zeros(1, *shape))


def shaken(net: nn.Module) -> nn.Module:
    """Give batch norms scales, shifts and statistics that differ."""
    generator = torch.Generator().manual_seed(0)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight, generator=generator)
            nn.init.normal_(norm.bias, generator=generator)
            nn.init.uniform_(norm.running_var, 0.5, 1.5, generator=generator)
    return net.eval()


def images(number: int, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(0))


# -- the rank of a map ------------------------------------------------------------------------------------------------


def test_ranks_known_by_hand() -> None:
    ramp = torch.arange(1.0, 9.0)
    maps = {
        0: torch.zeros(8, 8),
        1: torch.outer(ramp, ramp),
        2: torch.outer(ramp, ramp) + torch.outer(ramp**2, 1 / ramp),
        3: torch.diag(torch.tensor([1.0, -2, 3, 0, 0, 0, 0, 0])),
        8: torch.eye(8),
        7: torch.eye(8) - 1 / 8,  # the mean is taken out of every row
    }
    assert scores.map_rank(torch.stack(list(maps.values()))).tolist() == list(maps)
    assert scores.map_rank(torch.full((5, 3), 2.0)).item() == 1
    assert scores.map_rank(torch.ones(2, 3, 1, 1)).tolist() == [[1] * 3] * 2


def test_what_counts_as_zero_is_the_size_times_the_precision_of_float32() -> None:
    """Singular values above max(H, W)·ε·σ₁ count: 1 and twice or half that much."""
    least = 8 * EPSILON
    maps = torch.zeros(2, 8, 5)
    maps[:, 0, 0] = 1
    maps[:, 1, 1] = torch.tensor([2 * least, least / 2])
    assert scores.map_rank(maps).tolist() == [2, 1]
    assert scores.map_rank(1e-3 * maps.double()).tolist() == [2, 1]  # whatever the scale and the precision given


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 12), st.integers(0, 2**31))
def test_a_sum_of_k_outer_products_has_rank_k(height: int, width: int, k: int, seed: int) -> None:
    k = min(k, height, width)
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(3, height, height, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(3, width, width, generator=generator))
    maps = left[..., :k] @ right[..., :k].mT  # all k singular values are 1
    assert scores.map_rank(maps).tolist() == [k] * 3
    assert scores.map_rank(maps.mT).tolist() == scores.map_rank(100 * maps.flip(1)).tolist() == [k] * 3


# -- where maps are seen ----------------------------------------------------------------------------------------------


def seen(net: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    return mean_over_maps(space_of(net, tuple(batches[0].shape[1:])), lambda maps: maps.mean((2, 3)), batches)


def captured(net: nn.Module, x: Tensor, *places: str) -> list[Tensor]:
    """Return the mean map, [C], of modules' outputs."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, maps: outputs.update({name: maps.detach().mean((0, 2, 3)).double()})

    hooks = [net.get_submodule(place).register_forward_hook(keep(place)) for place in places]
    net(x)
    for hook in hooks:
        hook.remove()
    return [outputs[place] for place in places]


@pytest.mark.parametrize("inplace", [False, True])
def test_maps_are_behind_batch_norm_and_relu(inplace: bool) -> None:
    net = shaken(nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace), nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 2), nn.AvgPool2d(2), nn.ReLU(inplace), nn.Flatten(),
        nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 10),
    ))  # fmt: skip
    x = images(7)
    found = seen(net, [x])
    expected = [net[:end](x).flatten(2).mean(2) if end < 8 else net[:end](x) for end in (3, 7, 10)]
    for group, maps in zip(("0", "4", "8"), expected, strict=True):
        torch.testing.assert_close(found[group], maps.double().mean(0))


def test_batches_of_any_size_give_one_mean() -> None:
    net, x = shaken(build("convnet-bn", shape=SHAPE, seed=0)), images(9)
    whole, parts = seen(net, [x]), seen(net, [x[:4], x[4:5], x[5:]])
    for group in whole:
        torch.testing.assert_close(whole[group], parts[group])


def test_a_residual_block_is_seen_behind_the_sum() -> None:
    """A group of several layers takes the mean of all places; a projection has no place of its own."""
    net, x = shaken(build("resnet20-b", shape=SHAPE, width=0.25, seed=0)), images(5)
    found = seen(net, [x])
    inner, *blocks = captured(net, x, "stage2.0.relu1", "stage2.0.relu2", "stage2.1.relu2", "stage2.2.relu2")
    torch.testing.assert_close(found["stage2.0.conv1"], inner)
    torch.testing.assert_close(found["stage2.0.conv2"], torch.stack(blocks).mean(0))


def test_a_group_may_be_part_of_wider_maps() -> None:
    """Option-A shortcuts: the stem's 4 channels lie behind 2 zeros in stage 2, behind 6 in stage 3."""
    net, x = shaken(build("resnet20", shape=SHAPE, width=0.25, seed=0)), images(5)
    places = ["relu", *(f"stage{stage}.{block}.relu2" for stage in (1, 2, 3) for block in range(3))]
    maps = captured(net, x, *places)
    first = [0, *[0] * 3, *[2] * 3, *[6] * 3]
    expected = torch.stack([m[start : start + 4] for m, start in zip(maps, first, strict=True)]).mean(0)
    torch.testing.assert_close(seen(net, [x])["conv"], expected)


def test_densenet_is_seen_in_the_next_layer() -> None:
    net, x = shaken(build("densenet40", shape=SHAPE, width=0.25, seed=0)), images(3)
    found = seen(net, [x])
    following, last = captured(net, x, "stage1.1.relu", "relu3")
    torch.testing.assert_close(found["stage1.0.conv"], following[-3:])
    torch.testing.assert_close(found["stage3.11.conv"], last[-3:])


def test_without_an_activation_the_batch_norm_is_the_place() -> None:
    net, x = shaken(build("mobilenet_v2", shape=(3, 32, 32), seed=0)), images(3, (3, 32, 32))
    expand, depthwise, projected = captured(net, x, "features.2.conv.0.2", "features.2.conv.1.2", "features.1.conv.2")
    found = seen(net, [x])
    torch.testing.assert_close(found["features.1.conv.1"], projected)
    torch.testing.assert_close(found["features.2.conv.0.0"], (expand + depthwise) / 2)


def test_functional_activations_and_concatenations_are_followed() -> None:
    """GoogLeNet calls F.relu inside each branch, before the branches are joined."""
    net, x = shaken(build("googlenet", shape=(3, 32, 32), seed=0)), images(2, (3, 32, 32))
    (joined,) = captured(net, x, "inception3a")
    found = seen(net, [x])
    branches = [found[f"inception3a.{name}.conv"] for name in ("branch1", "branch2.1", "branch3.1", "branch4.1")]
    torch.testing.assert_close(torch.cat(branches), joined)


def test_the_network_is_left_as_it_was() -> None:
    net = build("convnet-bn", shape=SHAPE, seed=0).train()
    net.bn2.eval()
    before = copy.deepcopy(net.state_dict())
    seen(net, [images(4)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [name for name, module in net.named_modules() if not module.training] == ["bn2"]


def test_dropout_by_function_is_off() -> None:
    class Dropping(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](F.dropout(F.relu(self[0](x)), 0.5, self.training).flatten(1))

    torch.manual_seed(0)
    net, x = Dropping(nn.Conv2d(1, 5, 3), nn.Linear(5 * 36, 10)).train(), images(4)
    torch.testing.assert_close(seen(net, [x])["0"], F.relu(net[0](x)).mean((0, 2, 3)).double())


@pytest.mark.parametrize("height", [8, 10])  # as many as there are channels, or not
def test_channels_that_are_last_are_not_taken_for_lines(height: int) -> None:
    class ChannelsLast(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](F.relu(self[1](F.relu(self[0](x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)).flatten(1)

    net = ChannelsLast(nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 8), nn.Conv2d(8, 2, 1))
    with pytest.raises(ValueError, match="to see of 0, 1: its channels are rearranged"):
        seen(net, [torch.rand(2, 1, height, 6)])


def test_what_cannot_be_seen_is_refused() -> None:
    net = build("convnet-bn", shape=SHAPE, seed=0)
    with pytest.raises(ValueError, match="at least one: got none"):
        space_of(net).scores(scores.feature_rank(torch.zeros(0, *SHAPE)))
    with pytest.raises(ValueError, match="feature maps belong to channels; this space has columns"):
        ColumnSpace(net, torch.zeros(1, *SHAPE)).scores(scores.feature_rank(images(1)))


# -- the score --------------------------------------------------------------------------------------------------------


def selector(*chosen: tuple[int, ...]) -> nn.Sequential:
    """A 1x1 convolution whose filter j adds up the chosen inputs; the classifier sees all of the 3x3 maps."""
    net = nn.Sequential(
        nn.Conv2d(3, len(chosen), 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(9 * len(chosen), 10)
    )
    net[0].weight.data = torch.tensor([[float(i in those) for i in range(3)] for those in chosen])[..., None, None]
    return net


def test_the_score_is_the_average_rank_over_images() -> None:
    """Inputs of rank 1 each in the first image, of ranks 3, 0 and 1 in the second."""
    rows = torch.eye(3)[:, :, None] * torch.ones(3)  # input i is row i of ones
    other = torch.stack([torch.eye(3), torch.zeros(3, 3), torch.ones(3, 3)])
    net = selector((0,), (1,), (2,), (0, 1))
    found = space_of(net, (3, 3, 3)).scores(scores.feature_rank(torch.stack([rows, other])))["0"]
    # row 0 and row 1 are the same row of ones in two places: their sum still has rank 1
    assert found.tolist() == [(1 + 3) / 2, (1 + 0) / 2, (1 + 1) / 2, (1 + 3) / 2]


def test_of_equal_ranks_the_earlier_filter_stays() -> None:
    """Saturated: every map has full rank, and the order of the filters decides, whichever end stays."""
    net, picture = selector((0,), (0, 1), (1,), (2,)), torch.stack([torch.eye(3)] * 3)[None]
    space = space_of(net, (3, 3, 3))
    full = space.scores(scores.feature_rank(picture))
    assert full["0"].tolist() == [3, 3, 3, 3]
    for ranked in (full["0"], -full["0"]):
        plan = space.plan_for({"0": ranked}, {"0": 2})
        assert plan.keep["0"] == (0, 1)
        assert gaps({"0": ranked}, plan) == {"0": 0}


def test_the_gap_is_between_the_last_that_stays_and_the_first_that_goes() -> None:
    space = space_of(selector((0,), (1,), (2,), (0, 1)), (3, 3, 3))
    ranks = {"0": torch.tensor([1.0, 3.0, 2.5, 0.0])}
    assert gaps(ranks, space.plan_for(ranks, {"0": 2})) == {"0": 1.5}
    assert gaps(ranks, space.plan({})) == {}


def test_ranks_are_stable_over_batches(context: Context) -> None:
    """Two disjoint sets of 500 images order a trained network's filters alike."""
    net = build("convnet-bn", shape=SHAPE, seed=0)
    fit(net, context.data, Recipe(epochs=3, lr=0.05, batch_size=32), seed=0, progress=False)
    drawn, _ = next(context.data.batches("train", 1000, torch.Generator().manual_seed(0)))
    first, second = (space_of(net).scores(scores.feature_rank(half)) for half in drawn.split(500))
    for group in ("conv1", "conv2"):
        assert spearmanr(first[group], second[group]).statistic > 0.95
        assert (first[group] - second[group]).abs().max() < 0.15  # of 4 at most


# -- the published rows -----------------------------------------------------------------------------------------------


def published(
    row: str, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10
) -> tuple[ChannelSpace, dict[str, float]]:
    model, rates = RATES[row]
    space = space_of(build(model, shape=shape, classes=classes, seed=0), shape)
    return space, by_layer(space, rates)


def layers(space: ChannelSpace) -> list[str]:
    return [product.module for product in space.coupling.products]


@pytest.mark.parametrize(
    ("row", "printed", "narrowed"),
    [
        ("resnet56-2", ("62.72M", "0.49M"), ("48.44M", "0.41M")),
        ("resnet110-1", ("156.88M", "1.05M"), ("126.87M", "0.85M")),
    ],
)
def test_residual_networks(row: str, printed: tuple[str, str], narrowed: tuple[str, str]) -> None:
    """What the tables print counts every input; without the lost ones there are a quarter fewer."""
    space, rates = published(row)
    assert tuple(f"{n / 1e6:.2f}M" for n in count(space, rates)) == printed
    assert tuple(f"{n / 1e6:.2f}M" for n in count(space, rates, layers(space))) == narrowed


def test_vgg16() -> None:
    """Printed: 108.61M and 2.64M. The linear layers, which the sheet's count leaves out, have 0.27M."""
    space, rates = published("vgg16-2")
    linear = 512 * 512 + 512 * 10
    assert count(space, rates) == Count(109_089_792, 2_921_580)
    assert (109_089_792 - linear, 2_921_580 - linear) == (108_822_528, 2_654_316)
    cut = count(space, rates, layers(space))
    assert cut == Count(41_506_132, 759_649)
    whole_linear1 = (512 - 103) * 512  # kept where conv13's lost maps stay inputs of the first linear layer
    assert f"{(cut.macs + whole_linear1) / 1e6:.1f}M" == "41.7M"


def test_vgg16_whose_last_convolution_stays_whole() -> None:
    """The authors' script sets the 13th rate to 0: 116.6M and 4.81M, which are not the printed counts."""
    space, rates = published("vgg16-2")
    found = count(space, {**rates, "conv13": 0.0})
    assert (f"{found.macs / 1e6:.1f}M", f"{found.weights / 1e6:.2f}M") == ("116.6M", "4.81M")


def test_vgg16_first_row_lists_what_stays() -> None:
    """Printed: 145.61M and 2.51M. Read as what goes, the rates leave five times the parameters."""
    space = space_of(build("vgg16", seed=0), (3, 32, 32))
    written = [0.7] * 7 + [0.1] * 6
    widths = {p.module: len(p.writes) for p in space.coupling.products if p.kind == "conv"}
    stays = {layer: 1 - Fraction(removed(c, r), c) for (layer, c), r in zip(widths.items(), written, strict=True)}
    kept = count(space, stays)  # type: ignore[arg-type]
    assert [f"{(n - 267_264) / 1e6:.2f}M" for n in kept] == ["144.75M", "2.50M"]
    assert count(space, by_layer(space, tuple(written))).weights > 12e6


def test_resnet50() -> None:
    """Printed: 1.55B and 13.77M."""
    space, rates = published("resnet50-2", (3, 224, 224), 1000)
    assert count(space, rates) == Count(1_549_651_456, 13_772_764)


def test_densenet40_of_the_authors_subtracts_in_transitions() -> None:
    """Printed: 282.92M whole, 167.41M and 0.66M pruned. The authors' stem has 24 channels."""
    parts, channels = [nn.Conv2d(3, 24, 3, padding=1, bias=False)], 24
    for stage in (1, 2, 3):
        parts += [DenseLayer(channels + 12 * i, 12) for i in range(12)]
        channels += 144
        parts += [nn.BatchNorm2d(channels), nn.ReLU()]
        parts += [nn.Conv2d(channels, channels, 1, bias=False), nn.AvgPool2d(2)] if stage < 3 else []
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    space = space_of(net, (3, 32, 32))
    rates = by_layer(space, RATES["densenet40-1"][1])
    transitions = [layer for layer in rates if net.get_submodule(layer).kernel_size == (1, 1)]
    assert len(transitions) == 2
    assert f"{count(space, {}).macs / 1e6:.2f}M" == "282.92M"
    assert f"{count(space, rates).macs / 1e6:.1f}M" == "181.0M"
    printed = count(space, rates, transitions)
    assert (f"{printed.macs / 1e6:.1f}M", f"{printed.weights / 1e6:.2f}M") == ("167.4M", "0.66M")


def test_what_is_counted_is_what_a_cut_network_costs() -> None:
    """Where no layers share a sum, the count without lost inputs is that of the network cut by `HRank.rates`."""
    for row in ("vgg16-2", "densenet40-1"):
        space, rates = published(row)
        assert alone(space, rates) == rates
        widths = {group.name: group.size - removed(group.size, rates.get(group.name, 0)) for group in space.groups}
        assert count(space, rates, layers(space)).macs == space.macs(widths)


def test_a_sum_keeps_its_width() -> None:
    """The second convolutions lose filters of their own in the paper's count; no cut network has such a sum."""
    space, rates = published("resnet56-2")
    inner = alone(space, rates)
    assert set(inner) == {f"stage{s}.{b}.conv1" for s in (1, 2, 3) for b in range(9)}
    widths = {layer: len(space.units(layer)) - removed(len(space.units(layer)), rate) for layer, rate in inner.items()}
    assert space.macs(widths) == count(space, inner, layers(space)).macs == 65_065_600


def test_rates_belong_to_convolutions() -> None:
    space = space_of(build("convnet-bn", shape=SHAPE, seed=0))
    assert by_layer(space, (0.1, 0.2, 0.3)) == {"conv1": 0.1, "conv2": 0.2, "conv3": 0.3}
    with pytest.raises(ValueError, match="2 rates for 3 convolutions"):
        by_layer(space, (0.1, 0.2))
    assert removed(100, 0.29) == 29 != int(0.29 * 100)  # exact, where binary fractions are not


# -- the method -------------------------------------------------------------------------------------------------------


def convnet(seed: int = 0) -> nn.Module:
    return build("convnet-bn", shape=SHAPE, width=0.5, seed=seed)


@pytest.fixture(scope="module", params=[("convnet-bn", 1.0), ("resnet20", 0.5)], ids=lambda p: p[0])
def case(request: pytest.FixtureRequest, context: Context) -> tuple[nn.Module, dict[str, Tensor], Pruned]:
    name, width = request.param
    net = build(name, shape=SHAPE, width=width, seed=0)
    before = copy.deepcopy(net.state_dict())
    return net, before, HRank(g=50, share=1.0)(net, Budget(0.5, "conv"), context)


def test_the_net_is_untouched_and_epochs_are_counted(
    case: tuple[nn.Module, dict[str, Tensor], Pruned], context: Context
) -> None:
    net, before, pruned = case
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    number, per_epoch = len(context.data.train.labels), len(context.data.train.labels) // 64
    pruned_layers = sum(pruned.plan.widths[group] < size for group, size in pruned.plan.sizes.items())
    assert pruned.epochs == pytest.approx(50 / number + per_epoch // pruned_layers * pruned_layers / per_epoch)


def test_the_highest_stay_and_the_lowest(context: Context) -> None:
    net = convnet()
    plans = {s: HRank(g=50, selection=s, share=0)(net, Budget(0.5), context) for s in ("highest", "lowest")}
    drawn, _ = next(context.data.batches("train", 50, torch.Generator().manual_seed(context.seed)))
    ranks = space_of(net).scores(scores.feature_rank(drawn))
    for group, rank in ranks.items():
        high, low = (set(plans[s].plan.keep[group]) for s in ("highest", "lowest"))
        assert min(rank[i] for i in high) >= max(rank[i] for i in set(range(len(rank))) - high)
        assert max(rank[i] for i in low) <= min(rank[i] for i in set(range(len(rank))) - low)
        torch.testing.assert_close(plans["highest"].history["scores"][group], rank)
        torch.testing.assert_close(plans["lowest"].history["scores"][group], -rank)
    assert plans["highest"].history["gaps"] == gaps(ranks, plans["highest"].plan)


def test_random_needs_no_images(context: Context) -> None:
    runs = [
        HRank(selection="random", share=0)(convnet(), Budget(0.5), Context(context.data, context.recipe, seed))
        for seed in (0, 0, 1)
    ]
    assert runs[0].plan == runs[1].plan != runs[2].plan
    assert runs[0].epochs == 0


def test_one_shot_and_layer_by_layer_choose_the_same(context: Context) -> None:
    """The ranks are those of the network before pruning; at a share of 0 its weights stay too."""
    net = convnet()
    at_once, in_turn = (HRank(g=50, share=share)(net, Budget(0.5), context) for share in (0, 1.0))
    assert at_once.plan == in_turn.plan
    assert at_once.epochs == 50 / len(context.data.train.labels)
    space = space_of(net)
    expected = space.shrink(at_once.plan).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in at_once.net.state_dict().items())
    assert not torch.equal(in_turn.net.conv1.weight, at_once.net.conv1.weight)


def test_layers_go_one_after_the_other_and_stay_at_zero(context: Context) -> None:
    """Before a layer's turn it is whole; after it, what it lost is zero in everything that a unit owns."""
    widths: list[list[int]] = []
    trained: list[nn.Module] = []
    train = Context.train

    class Watched(ChannelSpace):
        def shrink(self, plan):  # type: ignore[no-untyped-def]
            trained.append(copy.deepcopy(self.net))
            return super().shrink(plan)

    def watched(context: Context, net: nn.Module, *args, **options):  # type: ignore[no-untyped-def]
        run = train(context, net, *args, **options)
        widths.append([int(norm.weight.count_nonzero()) for norm in (net.bn1, net.bn2, net.bn3)])
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunelab.methods.hrank.ChannelSpace", Watched)
        patch.setattr(Context, "train", watched)
        pruned = HRank(g=50, share=1.0)(convnet(), Budget(0.5), context)
    first, second, third = pruned.plan.widths.values()
    assert widths == [[first, 16, 32], [first, second, 32], [first, second, third]]
    x = images(8)
    torch.testing.assert_close(pruned.net.eval()(x), trained[0].eval()(x), rtol=1e-4, atol=1e-4)


def test_the_rate_of_each_layer_falls_as_in_the_published_code(context: Context) -> None:
    """Of the 30 epochs that the published code trains a layer, five at 0.01, five at a tenth, the rest at a hundredth.

    An epoch is a step here.
    """
    epochs = 90.5 / context.steps_per_epoch  # three layers
    context = dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, epochs=epochs))
    rates: list[float] = []

    def note(self: Masks, state: State) -> None:
        rates.append(state.optimizer.param_groups[0]["lr"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Masks, "before_step", note)
        HRank(g=50, share=1.0)(convnet(), Budget(0.5), context)
    assert rates == pytest.approx(3 * (5 * [0.01] + 5 * [0.001] + 20 * [0.0001]))


def test_runs_repeat_bit_for_bit(context: Context) -> None:
    runs = [
        HRank(g=50)(convnet(), Budget(0.5), Context(context.data, context.recipe, seed, progress=False))
        for seed in (0, 0, 1)
    ]
    first, again, other = (run.net.state_dict() for run in runs)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(first[key].shape != other[key].shape or not torch.equal(first[key], other[key]) for key in first)


def test_rates_are_exact_and_other_groups_stay_whole(context: Context) -> None:
    pruned = HRank(g=50, rates={"conv2": 0.4}, share=0)(convnet(), Budget(1.0), context)
    assert pruned.plan.widths == {"conv1": 16, "conv2": 16 - 6, "conv3": 32}
    with pytest.raises(ValueError, match=r"unknown groups \['conv9'\]: this network has conv1, conv2, conv3"):
        HRank(rates={"conv9": 0.5})(convnet(), Budget(1.0), context)
    with pytest.raises(ValueError, match=r"hrank: rates keep 0\.\d+ of the MACs \(all\); the budget is 0\.5"):
        HRank(rates={"conv2": 0.1})(convnet(), Budget(0.5), context)


def test_hidden_linear_layers_stay_whole(context: Context) -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 20), nn.ReLU(), nn.Linear(20, 10))
    pruned = HRank(g=50, share=0)(net, Budget(0.5), context)
    assert pruned.plan.widths == {"0": 3, "3": 20}


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [
        ("g", 0, "integer >= 1"),
        ("g", 2.5, "integer >= 1"),
        ("selection", "edge", "'highest', 'lowest', 'random'"),
        ("share", -0.1, r"\[0, 1\]"),
        ("share", 1.1, r"\[0, 1\]"),
        ("lr", 0.0, "> 0"),
        ("lr", float("nan"), "> 0"),
    ],
)
def test_illegal_fields_are_named(field: str, value: object, legal: str) -> None:
    with pytest.raises(ValueError, match=f"hrank: {field} is {value!r}; it must be .*{legal}"):
        HRank(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_illegal_rates_are_named(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"hrank: rates\['conv1'\] is {rate}; .* in \[0, 1\)"):
        HRank(rates={"conv1": rate})


def test_too_many_images_and_too_small_a_share(context: Context) -> None:
    with pytest.raises(ValueError, match="hrank: g is 2000; digits has 1077 training images"):
        HRank(g=2000)(convnet(), Budget(0.5), context)
    with pytest.raises(ValueError, match=r"hrank: share is 0\.1: of 1 epochs .* one update for each of 3 layers"):
        HRank(share=0.1)(convnet(), Budget(0.5), context)


def test_maps_of_one_pixel_tell_nothing(context: Context) -> None:
    net = build("vgg11", shape=SHAPE, width=0.25, seed=0)
    with pytest.raises(ValueError, match="no feature map of conv5, conv6, conv7, conv8 has a rank above 1"):
        HRank(g=50, share=0)(net, Budget(0.5), context)
    pruned = HRank(g=50, share=0, rates={"conv1": 0.5, "conv2": 0.5})(net, Budget(1.0), context)
    assert pruned.plan.widths["conv5"] == pruned.plan.sizes["conv5"]


def test_constant_maps_tell_nothing(context: Context) -> None:
    net = convnet()
    for tensor in (net.conv2.weight, net.bn2.running_mean):
        tensor.data.zero_()
    nn.init.ones_(net.bn2.bias)  # relu2 is 1 everywhere
    with pytest.raises(ValueError, match="no feature map of conv2 has a rank above 1: maps of one pixel, or constant"):
        HRank(g=50)(net, Budget(0.5), context)
