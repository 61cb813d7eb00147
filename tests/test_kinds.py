"""Layers beside convolution, batch norm and linear ones: each is cut so that the small network is the masked one."""

from __future__ import annotations

import copy
from functools import partial

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from test_channels import Net, assert_mask_is_shrink, assert_same, conv, excitation, plans, randomise, zoo
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from prunelab.data import load
from prunelab.layerwise import LayerByLayer
from prunelab.methods.dmcp import Supernet
from prunelab.methods.ssl import penalised
from prunelab.structure import ChannelSpace, ColumnSpace, RowColumnSpace, Space
from prunelab.structure.maps import mean_over_maps

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def up(inputs: int, outputs: int, kernel: int = 2, **options: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, kernel, stride=2, **options)


def between(layer: nn.Module, width: int = 6) -> Net:
    """Put a layer between two convolutions, the second of which sees more than its zeros."""
    return Net(lambda s, x: s.b(s.n(s.a(x)).sigmoid()), a=conv(3, width), n=layer, b=conv(width, 2))


class UNet(nn.Module):
    """Two levels; the upper skips to behind the transposed convolution, whose output has its size, odd or not."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = conv(3, 6), nn.BatchNorm2d(6)
        self.bottom, self.slopes = conv(6, 8), nn.PReLU(8)
        self.up = nn.ConvTranspose2d(8, 5, 2, stride=2)
        self.merge, self.head = conv(11, 4), conv(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.norm(self.down(x)).relu()
        deep = self.slopes(self.bottom(F.max_pool2d(skip, 2)))
        y = self.up(deep, output_size=skip.shape[-2:]).relu()
        return self.head(self.merge(torch.cat([skip, y], 1)).relu())


KINDS: dict[str, tuple[nn.Module, dict[str, int]]] = {
    "group norm": (between(nn.GroupNorm(3, 6)), {"a": 3}),
    "group norm without scale": (between(nn.GroupNorm(2, 6, affine=False)), {"a": 2}),
    "group norm of one channel each": (between(nn.GroupNorm(6, 6)), {"a": 6}),
    "group norm of one group": (
        Net(lambda s, x: s.c(s.b(s.n(s.a(x)))), a=conv(3, 4), n=nn.GroupNorm(1, 4), b=conv(4, 5), c=conv(5, 2)),
        {"b": 5},
    ),
    "group norms that overlap": (  # threes and pairs have only sixes in common
        Net(
            lambda s, x: (lambda y: s.c(y + s.m(s.b(y))))(s.n(s.a(x))),
            a=conv(3, 12), n=nn.GroupNorm(4, 12), b=conv(12, 12), m=nn.GroupNorm(6, 12), c=conv(12, 2),
        ),
        {"a": 2},
    ),
    "group norm used twice": (  # it says the number of groups of both
        Net(
            lambda s, x: s.c(torch.cat([s.n(s.a(x)), s.n(s.b(x))], 1)),
            a=conv(3, 6), b=conv(3, 6), n=nn.GroupNorm(3, 6, affine=False), c=conv(12, 2),
        ),
        {"a": 3},
    ),
    "group norm of a concatenation": (
        Net(
            lambda s, x: s.c(s.n(torch.cat([s.a(x), s.b(x)], 1))),
            a=conv(3, 4), b=conv(3, 4), n=nn.GroupNorm(4, 8), c=conv(8, 2),
        ),
        {"a": 2, "b": 2},
    ),
    "instance norm": (between(nn.InstanceNorm2d(6)), {"a": 6}),
    "instance norm with statistics": (
        between(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
        {"a": 6},
    ),
    "frozen batch norm": (between(FrozenBatchNorm2d(6)), {"a": 6}),
    "one slope": (between(nn.PReLU()), {"a": 6}),
    "a slope per channel": (between(nn.PReLU(6)), {"a": 6}),
    "one channel with a slope": (between(nn.PReLU(1), width=1), {"a": 1}),
    "padding": (
        Net(
            lambda s, x: s.b(F.pad(F.pad(s.p(s.a(x)), (1, 2)), (1, 0, 1, 1), "reflect")),
            a=conv(3, 4), b=conv(4, 2),
            p=nn.Sequential(
                nn.ConstantPad2d(1, 2.0), nn.ReplicationPad2d(1), nn.CircularPad2d(2), nn.ReflectionPad2d(1)
            ),
        ),
        {"a": 4},
    ),
    "padding to a size": (
        Net(
            lambda s, x: s.b(F.pad(input=s.a(x), pad=[0, 9 - x.shape[-1], 0, 9 - x.shape[-2]], value=-1.5)),
            a=conv(3, 4), b=conv(4, 2),
        ),
        {"a": 4},
    ),
    "padding of what is last": (
        Net(lambda s, x: s.k(F.pad(s.a(x).permute(0, 2, 3, 1), (0, 0, 1, 1))), a=conv(3, 4), k=nn.Linear(4, 2)),
        {"a": 4},
    ),
    "elementwise functions": (
        Net(
            lambda s, x: (lambda y: s.b(torch.where(y > 0, y.abs().log1p(), F.logsigmoid(y).masked_fill(y < -1, 0.3))))(
                s.a(x)
            ),
            a=conv(3, 4), b=conv(4, 2),
        ),
        {"a": 4},
    ),
    "gates by spread": excitation(lambda y: y.std((2, 3), keepdim=True)),
    "gates expanded": excitation(lambda y: y.mean((2, 3), True), lambda gates, y: gates.expand_as(y)),
    "spread of everything": (
        Net(
            lambda s, x: (lambda y: s.c(y / y.std(False) + y.sum(()) + y.std()))(s.b(s.a(x))),
            a=conv(3, 4), b=conv(4, 5), c=conv(5, 2),
        ),
        {"a": 4},
    ),
    "transposed convolution": (
        Net(lambda s, x: s.b(s.up(s.a(x)).relu()), a=conv(3, 4), up=up(4, 5), b=conv(5, 2)),
        {"a": 4, "up": 5},
    ),
    "transposed convolution at the end": (
        Net(lambda s, x: s.up(s.a(x)), a=conv(3, 4), up=up(4, 2, 4, padding=1, bias=False)),
        {"a": 4},
    ),
    "transposed convolution used twice": (
        Net(lambda s, x: s.b(s.up(s.up(s.a(x)))), a=conv(3, 4), up=up(4, 4), b=conv(4, 2)),
        {"a": 4},
    ),
    "depthwise transposed convolution": (
        Net(lambda s, x: s.b(s.up(s.a(x))), a=conv(3, 4), up=up(4, 4, 4, padding=1, groups=4), b=conv(4, 2)),
        {"a": 4},
    ),
    "grouped transposed convolution": (
        Net(lambda s, x: s.b(s.up(s.a(x))), a=conv(3, 6), up=up(6, 6, 3, groups=3), b=conv(6, 2)),
        {"a": 3},
    ),
    "sum of two ways up": (
        Net(
            lambda s, x: s.b(s.up(s.a(x)) + s.project(F.interpolate(x, scale_factor=2))),
            a=conv(3, 4), up=up(4, 5), project=conv(3, 5, 1), b=conv(5, 2),
        ),
        {"a": 4, "up": 5},
    ),
    "u-net": (UNet(), {"down": 6, "bottom": 8, "up": 5, "merge": 4}),
}  # fmt: skip


def made(kind: str) -> nn.Module:
    net = copy.deepcopy(KINDS[kind][0])
    generator = torch.Generator().manual_seed(3)
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -1, 1, generator=generator)
    return randomise(net).eval()


def tied_autoencoder() -> Net:
    """The decoder's kernel is the encoder's: what one reads, the other writes."""
    net = Net(
        lambda s, x: s.c(s.decode(s.encode(s.a(x)).relu())),
        a=conv(3, 4), encode=conv(4, 5), decode=nn.ConvTranspose2d(5, 4, 3, padding=1), c=conv(4, 2),
    )  # fmt: skip
    net.decode.weight = net.encode.weight
    return randomise(net).eval()


@torch.no_grad()
def assert_cut_is_masked(space: Space, x: Tensor) -> None:
    for plan in plans(space).values():
        assert_mask_is_shrink(space, x, plan)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_those_found_by_hand(kind: str) -> None:
    assert {group.name: group.size for group in ChannelSpace(made(kind), X).groups} == KINDS[kind][1]


@pytest.mark.parametrize("kind", KINDS)
def test_masked_and_small_network_agree(kind: str) -> None:
    assert_cut_is_masked(ChannelSpace(made(kind), X), X)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_as_in_the_masked_network(kind: str) -> None:
    """Outputs in training mode, and all gradients, are the masked network's."""
    space = ChannelSpace(made(kind), X)
    plan = plans(space)["random"]
    masked, small = space.mask(plan).train(), space.shrink(plan).train()
    outputs = [net(X) for net in (masked, small)]
    assert_same(*(output.detach() for output in outputs))
    for output in outputs:
        output.square().mean().backward()
    expected = space.cut(plan, {name: parameter.grad for name, parameter in masked.named_parameters()})
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("kind", [ChannelSpace, ColumnSpace, RowColumnSpace])
def test_a_u_net_is_cut_at_any_size(kind: type[Space], size: int) -> None:
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_cut_is_masked(kind(made("u-net"), x), x)


@pytest.mark.parametrize("groups", [8, 32])
@torch.no_grad()
def test_a_resnet_with_group_norm(groups: int) -> None:
    """Every layer has as many units as its norm has groups; the four sums and the eight inner layers are groups."""
    net = randomise(zoo.resnet18(num_classes=7, norm_layer=partial(nn.GroupNorm, groups)))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    space = ChannelSpace(net, x)
    assert space.sizes.tolist() == [groups] * 12
    assert_cut_is_masked(space, x)
    small = space.shrink(space.plan({"layer1.0.conv1": range(3)}))
    assert (small.layer1[0].bn1.num_groups, small.layer1[0].bn1.num_channels) == (3, 3 * 64 // groups)


@torch.no_grad()
def test_a_resnet_with_frozen_batch_norm() -> None:
    """It is taken for one layer, as a batch norm is: the additions inside are no sums of layers."""
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    usual, frozen = (zoo.resnet18(num_classes=7, norm_layer=norm) for norm in (nn.BatchNorm2d, FrozenBatchNorm2d))
    space, expected = ChannelSpace(randomise(frozen), x), ChannelSpace(randomise(usual), x)
    assert space.groups == expected.groups
    pd.testing.assert_frame_equal(space.describe(), expected.describe())
    assert_cut_is_masked(space, x)


def test_small_layers_say_how_wide_they_are() -> None:
    net = between(nn.Sequential(nn.GroupNorm(3, 6), nn.InstanceNorm2d(6), nn.PReLU(6), up(6, 6, groups=3)))
    norm, instance, slopes, spread = (space := ChannelSpace(net.double(), X)).shrink(space.plan({"a": [0, 2]})).n
    assert (norm.num_groups, norm.num_channels) == (2, 4)
    assert (instance.num_features, slopes.num_parameters) == (4, 4)
    assert (spread.in_channels, spread.out_channels, spread.groups) == (4, 4, 2)


# Transposed convolutions: their filters lie along the second dimension of the kernel, [in, out, ...]


def test_macs_of_a_transposed_convolution() -> None:
    """Each of the 6x6 positions of 4 channels goes to 2x2 outputs of 5 channels, whatever the stride."""
    space = ChannelSpace(made("transposed convolution"), X)
    rest = 36 * 9 * 3 * 4 + 144 * 9 * 5 * 2
    assert space.macs() == rest + 36 * 4 * 4 * 5
    assert space.macs({"a": 3, "up": 2}) == 36 * 9 * 3 * 3 + 144 * 9 * 2 * 2 + 36 * 4 * 3 * 2
    depthwise = ChannelSpace(made("depthwise transposed convolution"), X)
    assert depthwise.macs() == 36 * 9 * 3 * 4 + 36 * 16 * 4 + 144 * 9 * 4 * 2


def test_scores_are_of_the_filters() -> None:
    net = made("sum of two ways up")
    space = ChannelSpace(net, X)
    filters = [torch.cat([net.up.weight[:, i].flatten(), net.project.weight[i].flatten()]) for i in range(5)]
    assert torch.equal(space.unit_weights("up"), torch.stack(filters).detach())
    torch.testing.assert_close(space.scores("l1")["up"], torch.stack([f.abs().sum() for f in filters]).detach())
    torch.testing.assert_close(space.scores("l2")["up"], torch.stack([f.norm() for f in filters]).detach())
    net = made("grouped transposed convolution")
    rows = torch.cat([net.a.weight.reshape(3, -1), net.up.weight.reshape(3, -1)], 1)
    assert torch.equal(ChannelSpace(net, X).unit_weights("a"), rows)


def test_a_kernel_shared_by_encoder_and_decoder() -> None:
    space = ChannelSpace(tied_autoencoder(), X)
    assert {group.name: group.size for group in space.groups} == {"a": 4, "encode": 5}
    assert_cut_is_masked(space, X)


def test_maps_of_a_transposed_convolution_are_its_units() -> None:
    net = made("transposed convolution")
    found = mean_over_maps(ChannelSpace(net, X), lambda maps: maps.mean((2, 3)), [X])
    torch.testing.assert_close(found["up"], net.up(net.a(X)).relu().mean((0, 2, 3)).detach())


def test_gates_act_on_what_a_transposed_convolution_reads() -> None:
    space = ChannelSpace(made("u-net"), X)
    supernet = Supernet(space)
    for plan in plans(space).values():
        torch.testing.assert_close(supernet.gated(X, space.gates(plan)), space.mask(plan)(X).float())


def test_what_cannot_handle_a_transposed_convolution_says_so() -> None:
    space = ChannelSpace(made("transposed convolution"), X)
    with pytest.raises(ValueError, match="ssl: 'up' is a ConvTranspose2d: only the filters of Conv2d"):
        penalised(space, ("filters",))
    net = Net(lambda s, x: s.b(s.up(s.a(x))).mean((2, 3)), a=conv(1, 4), up=up(4, 4), b=conv(4, 10))
    run = LayerByLayer(net, load("digits"), 10, 2, accumulated=False, seed=0)
    with pytest.raises(ValueError, match="layer 'up' is a ConvTranspose2d: only Conv2d and Linear layers"):
        run.prepare({"a": 2})
    run.prepare({"up": 2})
