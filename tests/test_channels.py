"""Channel spaces: groups found by hand, and the property that the small network computes what the masked one does."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from prunelab import cost, models
from prunelab.layers import ZeroPadChannels
from prunelab.structure import Budget, ChannelSpace, Plan, RowColumnSpace, Space, UntraceableError

zoo = models.torchvision.models

TORCHVISION = {
    "alexnet": 64, "vgg11_bn": 32, "resnet18": 32, "resnet50": 32, "resnext50_32x4d": 32, "wide_resnet50_2": 32,
    "densenet121": 32, "googlenet": 32, "inception_v3": 107, "squeezenet1_0": 32, "mobilenet_v2": 32,
    "mobilenet_v3_small": 32, "mnasnet0_5": 32, "efficientnet_b0": 32, "efficientnet_v2_s": 32, "regnet_x_400mf": 32,
    "regnet_y_400mf": 32, "shufflenet_v2_x0_5": 32, "convnext_tiny": 32,
}  # fmt: skip

LARGER = (  # on the meta device: counted, not computed
    "vgg16_bn", "vgg19", "resnet152", "resnext101_32x8d", "wide_resnet50_2", "densenet201", "mobilenet_v3_large",
    "mnasnet1_3", "efficientnet_b3", "efficientnet_v2_s", "shufflenet_v2_x2_0", "convnext_small",
)  # fmt: skip


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Make a float64 network in which nothing has its default value: biases, batch-norm statistics and scales."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.empty_like(tensor).uniform_(low, high, generator=generator))

    net = net.double()
    with torch.no_grad():
        for module in net.modules():
            if getattr(module, "running_mean", None) is not None:
                draw(module.running_mean, -0.5, 0.5)
                draw(module.running_var, 0.5, 2.0)
                draw(module.weight, 0.5, 1.5)
            if isinstance(getattr(module, "bias", None), Tensor):
                draw(module.bias, -0.5, 0.5)
            if isinstance(getattr(module, "layer_scale", None), Tensor):
                draw(module.layer_scale, 0.5, 1.5)
    return net


def narrow_convnext() -> nn.Module:
    convnext = zoo.convnext
    widths = (12, 16, 20, 24, None)
    return convnext.ConvNeXt([convnext.CNBlockConfig(a, b, 2) for a, b in itertools.pairwise(widths)], num_classes=7)


def short_efficientnet_v2() -> nn.Module:
    parts = zoo.efficientnet
    fused, plain = parts.FusedMBConvConfig, parts.MBConvConfig
    stages = [
        fused(1, 3, 1, 16, 16, 2),
        fused(4, 3, 2, 16, 24, 2),
        plain(4, 3, 2, 24, 32, 2),
        plain(6, 3, 1, 32, 40, 1),
    ]
    return zoo.EfficientNet(stages, dropout=0.2, num_classes=7, last_channel=64)


def inception_for_small_images() -> nn.Module:
    net = zoo.inception_v3(num_classes=7, init_weights=True)
    net.AuxLogits.conv1.conv = nn.Conv2d(128, 768, 1, bias=False)  # 5x5 takes nothing smaller than 299x299
    return net


REDUCED = {  # the same classes with fewer layers or channels
    "convnext_tiny": narrow_convnext,
    "efficientnet_v2_s": short_efficientnet_v2,
    "inception_v3": inception_for_small_images,
    "resnet50": lambda: zoo.ResNet(zoo.resnet.Bottleneck, [2, 2, 1, 1], num_classes=7),
    "wide_resnet50_2": lambda: zoo.ResNet(zoo.resnet.Bottleneck, [2, 1, 1, 1], num_classes=7, width_per_group=128),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    size = TORCHVISION.get(name, 32)
    if name in TORCHVISION:
        # Smaller images than torchvision promises to take make the test quick; these architectures do take them.
        options = {"init_weights": True} if name == "googlenet" else {}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = REDUCED[name]() if name in REDUCED else zoo.get_model(name, weights=None, num_classes=7, **options)
            if name in ("alexnet", "vgg11_bn"):  # 4096 hidden units take most of the memory and prove nothing more
                hidden = [m for m in net.classifier if isinstance(m, nn.Linear)]
                sizes = (hidden[0].in_features, 32, 16, 7)
                layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
                net.classifier = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    else:
        net = models.build(name, width=0.25, classes=7, seed=0)
    example = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return randomise(net), example


def plans(space: Space, seed: int = 0) -> dict[str, Plan]:
    random = np.random.default_rng(seed)

    def keep(count: Callable[[int], int]) -> Plan:
        return space.plan({g.name: random.choice(g.size, count(g.size), replace=False).tolist() for g in space.groups})

    return {
        "everything": space.plan({}),
        "one unit": keep(lambda size: 1),
        "random": keep(lambda size: int(random.integers(1, size + 1))),
        "uneven": keep(lambda size: int(random.choice([1, max(1, size - 1), size]))),
    }


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * float(b.abs().max()))


def assert_mask_is_shrink(space: Space, x: Tensor, plan: Plan, dense: Tensor | None = None) -> None:
    net = space.net
    masked, small = space.mask(plan), space.shrink(plan)
    dense = net.eval()(x) if dense is None else dense
    expected, found = masked.eval()(x), small.eval()(x)
    assert expected.isfinite().all()
    assert_same(found, expected)
    full = plan.widths == plan.sizes
    assert torch.equal(dense, expected) == full
    for scope in ("all", "conv"):
        assert space.macs(plan, scope) == cost.macs(small, x, scope)
    assert cost.parameters(masked) == cost.parameters(net)
    assert (cost.parameters(small) < cost.parameters(net)) != full


@pytest.mark.parametrize("name", [*models.NAMES, *TORCHVISION])
def test_masked_and_small_network_agree(name: str) -> None:
    net, x = network(name)
    net.train()
    next(m for m in net.modules() if isinstance(m, nn.Conv2d)).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    space = ChannelSpace(net, x)
    cuts = plans(space)
    small, masked = space.shrink(cuts["one unit"]), space.mask(cuts["one unit"])
    for model in (net, small, masked):
        assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        dense = net.eval()(x)
        for plan in cuts.values():
            assert_mask_is_shrink(space, x, plan, dense)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert len(before) == len(net.state_dict())


@pytest.mark.parametrize("name", LARGER)
def test_closed_form_is_the_count_in_larger_networks(name: str) -> None:
    with torch.device("meta"):
        net, x = zoo.get_model(name, weights=None), torch.zeros(1, 3, 224, 224)
    space = ChannelSpace(net, x)
    plan = plans(space)["random"]
    assert space.macs() == cost.macs(net, x)
    assert space.macs(plan) == cost.macs(space.shrink(plan), x)


def test_small_network_says_how_wide_it_is() -> None:
    net, x = network("resnext50_32x4d")
    space = ChannelSpace(net, x)
    small = space.shrink(plans(space)["random"])
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean.shape == module.weight.shape == (module.num_features,)
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)


@pytest.mark.parametrize("name", ["resnet20", "densenet40"])
def test_closed_form_is_the_count_at_any_widths(name: str) -> None:
    net, x = network(name)
    space = ChannelSpace(net, x)
    random = np.random.default_rng(0)
    widths = random.integers(1, space.sizes + 1, size=(12, len(space.groups)))
    for scope in ("all", "conv"):
        batch = space.cost(widths, scope)
        for row, macs in zip(widths, batch, strict=True):
            plan = space.plan({g.name: range(w) for g, w in zip(space.groups, row.tolist(), strict=True)})
            assert space.macs(plan, scope) == space.macs(plan.widths, scope) == macs
            assert cost.macs(space.shrink(plan), x, scope) == macs


def test_macs_per_unit_are_what_one_filter_costs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 2))
    space = ChannelSpace(net, torch.zeros(1, 3, 6, 6))
    assert space.cost.per_unit(space.sizes).tolist() == [3 * 9 * 16, 4 * 9 * 4]
    assert space.cost.per_unit(np.array([2, 5])).tolist() == [3 * 9 * 16, 2 * 9 * 4]


# Groups found by hand


class Net(nn.Module):
    """Layers given by name, and what to do with them."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def excitation(
    squeeze: Callable[[Tensor], Tensor], gate: Callable[[Tensor, Tensor], Tensor] = lambda gates, y: gates
) -> tuple[Net, dict[str, int]]:
    """Maps y times gates that are computed from what `squeeze` makes of them, and brought to their shape by `gate`."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.b(y * gate(net.up(net.down(squeeze(y)).tanh()).sigmoid(), y))

    return Net(forward, a=conv(3, 4), down=conv(4, 2, 1), up=conv(2, 4, 1), b=conv(4, 2)), {"a": 4, "down": 2}


def shuffle(x: Tensor) -> Tensor:
    batch, channels, height, width = x.size()
    return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, -1, height, width)


TINY: dict[str, tuple[Net, dict[str, int]]] = {
    "chain": (
        Net(lambda s, x: s.c(s.b(s.a(x)).relu()), a=conv(3, 4), b=conv(4, 5), c=conv(5, 2)),
        {"a": 4, "b": 5},
    ),
    "batch norm": (
        Net(lambda s, x: s.b(s.n(s.a(x)).sigmoid()), a=conv(3, 4), n=nn.BatchNorm2d(4), b=conv(4, 2)),
        {"a": 4},
    ),
    "residual addition": (
        Net(
            lambda s, x: (lambda y: s.d(y + s.c(s.b(y))))(s.a(x)),
            a=conv(3, 4), b=conv(4, 5), c=conv(5, 4), d=conv(4, 2),
        ),
        {"a": 4, "b": 5},
    ),
    "option A shortcut": (
        Net(
            lambda s, x: (lambda y: s.c(s.pad(y) + s.b(y)))(s.a(x)),
            a=conv(3, 2), b=conv(2, 5), pad=ZeroPadChannels(1, 2), c=conv(5, 2),
        ),
        {"a": 2, "b": 3},
    ),
    "concatenation": (
        Net(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=conv(3, 4), b=conv(3, 2), c=conv(6, 2)),
        {"a": 4, "b": 2},
    ),
    "dense connection": (
        Net(
            lambda s, x: (lambda y: s.c(torch.cat([y, s.b(y)], dim=1)))(s.a(x)),
            a=conv(3, 4), b=conv(4, 2), c=conv(6, 2),
        ),
        {"a": 4, "b": 2},
    ),
    "depthwise": (
        Net(lambda s, x: s.c(s.b(s.a(x))), a=conv(3, 4), b=conv(4, 4, groups=4), c=conv(4, 2)),
        {"a": 4},
    ),
    "depthwise multiplier": (
        Net(lambda s, x: s.c(s.b(s.a(x))), a=conv(3, 4), b=conv(4, 8, groups=4), c=conv(8, 2)),
        {"a": 4},
    ),
    "grouped": (
        Net(lambda s, x: s.c(s.b(s.a(x))), a=conv(3, 6), b=conv(6, 9, groups=3), c=conv(9, 2)),
        {"a": 3},
    ),
    "squeeze and excitation": excitation(lambda y: y.mean((2, 3), keepdim=True)),
    "one map gates all": (
        Net(lambda s, x: (lambda y: s.b(y * s.gate(y).sigmoid()))(s.a(x)), a=conv(3, 4), gate=conv(4, 1), b=conv(4, 2)),
        {"a": 4},
    ),
    "channel shuffle": (
        Net(lambda s, x: s.c(s.b(shuffle(s.a(x)))), a=conv(3, 6), b=conv(6, 4), c=conv(4, 2)),
        {"a": 3, "b": 4},
    ),
    "chunk": (
        Net(
            lambda s, x: (lambda y: s.c(y[0] * s.b(y[1])))(s.a(x).chunk(2, dim=1)),
            a=conv(3, 6), b=conv(3, 3), c=conv(3, 2),
        ),
        {"a": 3},
    ),
    "flatten": (
        Net(lambda s, x: s.l(s.a(x).relu().flatten(1)), a=conv(3, 4), l=nn.Linear(4 * 36, 2)),
        {"a": 4},
    ),
    "view with sizes of the tensor": (
        Net(lambda s, x: s.l(s.a(x).view(x.size(0), -1)), a=conv(3, 4), l=nn.Linear(4 * 36, 2)),
        {"a": 4},
    ),
    "hidden linear": (
        Net(
            lambda s, x: s.k(s.n(s.l(s.p(s.a(x)).flatten(1))).sigmoid()),
            a=conv(3, 4), p=nn.AdaptiveAvgPool2d(2), l=nn.Linear(16, 5), n=nn.BatchNorm1d(5), k=nn.Linear(5, 2),
        ),
        {"a": 4, "l": 5},
    ),
    "layer used twice": (
        Net(lambda s, x: s.c(s.b(s.b(s.a(x)))), a=conv(3, 4), b=conv(4, 4), c=conv(4, 2)),
        {"a": 4},
    ),
    "layer scale": (
        Net(
            lambda s, x: (lambda y: s.b(y + s.scale * s.a2(y)))(s.a(x)),
            a=conv(3, 4), a2=conv(4, 4), scale=nn.Parameter(torch.randn(4, 1, 1)), b=conv(4, 2),
        ),
        {"a": 4},
    ),
    "layer norm keeps its channels": (
        Net(
            lambda s, x: s.k(s.l(s.n(s.a(x).permute(0, 2, 3, 1))).relu()).permute(0, 3, 1, 2),
            a=conv(3, 4), n=nn.LayerNorm(4), l=nn.Linear(4, 5), k=nn.Linear(5, 2),
        ),
        {"l": 5},
    ),
    "softmax keeps its channels": (
        Net(lambda s, x: s.c(s.b(s.a(x)).softmax(1)), a=conv(3, 4), b=conv(4, 5), c=conv(5, 2)),
        {"a": 4},
    ),
    "fixed sizes keep their channels": (
        Net(
            lambda s, x: s.c(torch.cat([s.a(x).view(-1, 4, 6, 6), s.b(x)[:, :3], s.d(x).split([2, 3], 1)[0]], 1))
            + s.e(x).amax(1, True),
            a=conv(3, 4), b=conv(3, 5), d=conv(3, 5), e=conv(3, 2), c=nn.Sequential(conv(9, 3), conv(3, 2)),
        ),
        {"c.0": 3},
    ),
    "the shape of another tensor keeps its channels": (
        Net(
            lambda s, x: (
                lambda y, z: s.c(s.b(x).view(y.size()) + s.d(x).reshape(z.shape[0], z.size(1), 6, 6) + z)
            )(s.a(x), s.e(x)),
            a=conv(3, 4), b=conv(3, 4), d=conv(3, 4), e=nn.Sequential(conv(3, 5), conv(5, 4)), c=conv(4, 2),
        ),
        {"e.0": 5},
    ),
    "its own shape leaves a tensor its channels": (
        Net(
            lambda s, x: (lambda y: s.c(y.relu().view(y.shape).reshape(y.size(0), y.size(1), 6, 6)))(s.a(x)),
            a=conv(3, 4), c=conv(4, 2),
        ),
        {"a": 4},
    ),
    "parts put together in another order": (
        Net(
            lambda s, x: s.c(torch.cat(s.a(x).chunk(2, 1)[::-1], 1)) + s.d(torch.cat(s.b(x).chunk(2, 1), 1)),
            a=conv(3, 6), b=conv(3, 4), c=conv(6, 2), d=conv(4, 2),
        ),
        {"a": 3, "b": 2},
    ),
    "a constant per channel keeps the channels": (
        Net(
            lambda s, x: s.c(s.b(s.a(x)) * torch.arange(1, 6, dtype=x.dtype, device=x.device).view(1, 5, 1, 1)),
            a=conv(3, 4), b=conv(4, 5), c=conv(5, 2),
        ),
        {"a": 4},
    ),
}  # fmt: skip
if TorchVersion(torch.__version__) < (2, 8):  # its `torch.arange` takes no dtype that is being traced, and says so
    del TINY["a constant per channel keeps the channels"]


def tiny(case: str) -> tuple[Net, Tensor]:
    net = copy.deepcopy(TINY[case][0])
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -1, 1, generator=generator)
    return randomise(net).eval(), x


@pytest.mark.parametrize("case", TINY)
def test_groups_are_those_found_by_hand(case: str) -> None:
    net, x = tiny(case)
    space = ChannelSpace(net, x)
    assert {group.name: group.size for group in space.groups} == TINY[case][1]


@pytest.mark.parametrize("case", TINY)
@torch.no_grad()
def test_removing_any_one_unit_is_zeroing_it(case: str) -> None:
    net, x = tiny(case)
    space = ChannelSpace(net, x)
    for group in space.groups:
        for unit in range(group.size):
            plan = space.plan({group.name: [i for i in range(group.size) if i != unit]}) if group.size > 1 else None
            if plan:
                assert_mask_is_shrink(space, x, plan)
    for plan in plans(space).values():
        assert_mask_is_shrink(space, x, plan)


def widths_of(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in net.named_parameters() if p.dim() > 1}


def test_a_flattened_channel_takes_all_its_positions_along() -> None:
    net, x = tiny("flatten")
    space = ChannelSpace(net, x)
    small = space.shrink(space.plan({"a": [1, 3]}))
    assert widths_of(small) == {"a.weight": (2, 3, 3, 3), "l.weight": (2, 2 * 36)}
    assert torch.equal(small.l.weight, net.l.weight.view(2, 4, 36)[:, [1, 3]].flatten(1))


def test_shuffled_and_grouped_units_span_several_channels() -> None:
    net, x = tiny("channel shuffle")
    space = ChannelSpace(net, x)
    assert widths_of(space.shrink(space.plan({"a": [2]})))["a.weight"] == (2, 3, 3, 3)
    net, x = tiny("grouped")
    space = ChannelSpace(net, x)
    small = space.shrink(space.plan({"a": [0, 2]}))
    assert widths_of(small) == {"a.weight": (4, 3, 3, 3), "b.weight": (6, 2, 3, 3), "c.weight": (2, 6, 3, 3)}
    assert small.b.groups == 2
    assert torch.equal(small.a.weight, net.a.weight[[0, 1, 4, 5]])


def test_shortcut_with_zeros_splits_the_stream() -> None:
    """Of b's five channels only the middle two are tied to a; the zeros around them shrink with the other three."""
    net, x = tiny("option A shortcut")
    space = ChannelSpace(net, x)
    small = space.shrink(space.plan({"a": [1], "b": [2]}))
    assert torch.equal(small.b.weight, net.b.weight[[2, 4]][:, [1]])
    assert (small.pad.before, small.pad.after) == (0, 1)


def test_ties_say_where_they_come_from() -> None:
    def why(case: str) -> set[str]:
        net, x = tiny(case)
        return {tie.why for tie in ChannelSpace(net, x).coupling.ties}

    assert why("chain") == set()
    assert why("residual addition") == {"add"}
    assert why("depthwise") == {"depthwise convolution"}
    assert why("grouped") == {"grouped convolution"}
    assert why("chunk") == {"channel split", "mul"}
    assert why("channel shuffle") == {"channel sections"}
    assert why("layer used twice") == {"shared weights"}


def test_a_stream_is_what_several_layers_add_up() -> None:
    """Not what is added to a parameter with a number per channel."""
    shifted = Net(
        lambda s, x: s.b((s.a(x) + s.shift).relu()),
        a=conv(3, 4), b=conv(4, 2), shift=nn.Parameter(torch.ones(4, 1, 1)),
    )  # fmt: skip
    space = ChannelSpace(shifted, torch.zeros(1, 3, 6, 6))
    assert [tie.why for tie in space.coupling.ties] == ["add of a parameter"]
    assert not space.is_sum("a")
    net, x = tiny("residual addition")
    assert [name for name in ("a", "b") if ChannelSpace(net, x).is_sum(name)] == ["a"]


def test_a_padding_used_twice_pads_alike() -> None:
    net = Net(
        lambda s, x: s.c(s.pad(s.a(x)) * s.pad(s.b(x))), a=conv(3, 2), b=conv(3, 2), pad=ZeroPadChannels(1, 2),
        c=nn.Sequential(conv(5, 4), conv(4, 2)),
    )  # fmt: skip
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    space = ChannelSpace(randomise(net).eval(), x)
    assert {group.name: group.size for group in space.groups} == {"a": 2, "c.0": 4}
    with torch.no_grad():
        assert_mask_is_shrink(space, x, space.plan({"a": [1]}))


@pytest.mark.parametrize("width", [1, 4])
def test_a_single_channel_is_followed_where_dimensions_are_moved(width: int) -> None:
    net = Net(
        lambda s, x: s.e(s.k(s.l(s.a(x).permute(0, 2, 3, 1)).relu()).movedim(-1, 1)),
        a=conv(3, width), l=nn.Linear(width, 5), k=nn.Linear(5, 1), e=conv(1, 2),
    )  # fmt: skip
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for kind in (ChannelSpace, RowColumnSpace):
        space = kind(randomise(net), x)
        for plan in plans(space).values():
            with torch.no_grad():
                assert_mask_is_shrink(space, x, plan)


def test_weights_shared_by_two_layers_are_cut_once() -> None:
    net = Net(lambda s, x: s.c(s.b(s.a(x)) + s.b2(s.a(x))), a=conv(3, 4), b=conv(4, 5), b2=conv(4, 5), c=conv(5, 2))
    net.b2.weight = net.b.weight
    space = ChannelSpace(randomise(net).eval(), torch.zeros(1, 3, 6, 6, dtype=torch.float64))
    assert [group.size for group in space.groups] == [4, 5]
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = space.plan({"a": [0, 3], "b": [1, 2]})
    small = space.shrink(plan)
    assert small.b.weight is small.b2.weight
    with torch.no_grad():
        assert_mask_is_shrink(space, x, plan)


def test_unit_weights_are_the_filters_of_all_writers() -> None:
    net, x = tiny("residual addition")
    space = ChannelSpace(net, x)
    assert torch.equal(space.unit_weights("a"), torch.cat([net.a.weight.flatten(1), net.c.weight.flatten(1)], 1))
    assert [axis.module for axis in space.writers("a")] == ["a", "c"]
    net, x = tiny("grouped")
    expected = torch.cat([net.a.weight.reshape(3, -1), net.b.weight.reshape(3, -1)], 1)
    assert torch.equal(ChannelSpace(net, x).unit_weights("a"), expected)


# Gradients


@pytest.mark.parametrize("name", ["convnet-bn", "vgg11", "resnet20", "resnet20-b", "densenet40", *TORCHVISION])
def test_training_goes_as_in_the_masked_network(name: str) -> None:
    """Every output in training mode, auxiliary heads too, and every gradient are the masked network's."""
    net, x = network(name)
    for module in net.modules():
        if isinstance(module, nn.Dropout | zoo.efficientnet.StochasticDepth):
            module.p = 0.0  # chance would differ
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = 0.1  # two images may all but agree in a channel: rounding is not to be divided by nothing
    space = ChannelSpace(net, x)
    plan = plans(space)["random"]
    masked, small = space.mask(plan).train(), space.shrink(plan).train()
    outputs = []
    for model in (masked, small):
        found = model(x)
        outputs.append(torch.cat(found) if isinstance(found, tuple) else found)
        nn.functional.cross_entropy(outputs[-1], torch.arange(len(outputs[-1])) % 7).backward()
    assert len(outputs[0]) == len(x) * {"googlenet": 3, "inception_v3": 2}.get(name, 1)
    assert_same(*(output.detach() for output in outputs))
    assert all(parameter.grad.isfinite().all() for parameter in small.parameters())
    gradients = {key: parameter.grad for key, parameter in masked.named_parameters()}
    expected = space.cut(plan, gradients)
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for key, parameter in small.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-8, atol=1e-10 * scale)


def test_auxiliary_heads_are_cut_where_they_read() -> None:
    net, x = network("googlenet")
    space = ChannelSpace(net, x)
    assert not any(name.startswith("aux") for name in space.coupling.names)
    plan = plans(space)["random"]
    small = space.shrink(plan)
    for head, block in ((small.aux1, "inception4a"), (small.aux2, "inception4d")):
        last = ("branch1", "branch2.1", "branch3.1", "branch4.1")
        read = sum(plan.widths[f"{block}.{branch}.conv"] for branch in last)
        assert head.conv.conv.weight.shape[:2] == (128, read)
        assert head.fc1.weight.shape == (1024, 2048)


def test_what_only_training_runs_is_traced_in_training() -> None:
    net = Net(
        lambda s, x: (lambda y: (s.b(y), s.head(y)) if s.training else s.b(y))(s.a(x)),
        a=conv(3, 4), b=conv(4, 2), head=nn.Sequential(conv(4, 5), nn.ReLU(), conv(5, 2)),
    )  # fmt: skip
    net, x = randomise(net), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    space = ChannelSpace(net.train(), x)
    assert net.training
    assert {group.name: group.size for group in space.groups} == {"a": 4}
    assert space.macs() == cost.macs(net, x)  # of evaluation
    plan = space.plan({"a": [0, 3]})
    small = space.shrink(plan)
    assert small.head[0].weight.shape == (5, 2, 3, 3)
    with torch.no_grad():
        for found, expected in zip(small(x), space.mask(plan)(x), strict=True):
            assert_same(found, expected)


@pytest.mark.parametrize("name", ["convnet-bn", "vgg11", "resnet20"])
def test_small_network_learns(name: str) -> None:
    net = models.build(name, width=0.25, seed=0)
    space = ChannelSpace(net, torch.zeros(1, 3, 32, 32))
    small = space.shrink(space.plan_for(space.scores("l1"), Budget(0.5))).train()
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(20, 3, 32, 32, generator=generator), torch.arange(20) % 10
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05, momentum=0.9)
    start = {key: value.detach().clone() for key, value in small.named_parameters()}
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(small(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(value, start[key]) for key, value in small.named_parameters())


def test_small_network_shares_nothing_with_the_large_one() -> None:
    net, x = tiny("batch norm")
    net.empty, net.nothing, net.again = nn.Sequential(), None, net.b
    net.register_buffer("constant", torch.ones(3))
    net.b.register_forward_hook(lambda module, inputs, output: output + 1)
    space = ChannelSpace(net, x)
    for plan in plans(space).values():
        small = space.shrink(plan)
        assert small.again is small.b
        assert small.nothing is None
        assert not {*map(id, net.modules())} & {*map(id, small.modules())}
        places = [{t.data_ptr() for t in model.state_dict().values()} for model in (net, small)]
        assert not places[0] & places[1]
        with torch.no_grad():
            assert_same(small(x), space.mask(plan)(x))
        assert [*map(type, small.modules())] == [*map(type, net.modules())]


def test_frozen_parameters_stay_frozen() -> None:
    net, x = tiny("chain")
    net.a.weight.requires_grad_(False)
    small = ChannelSpace(net, x).shrink(plans(ChannelSpace(net, x))["one unit"])
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in net.parameters()]


# What is refused


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def refused(forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> str:
    net = Net(forward, a=conv(3, 4), b=conv(4, 2), **layers)
    with pytest.raises(UntraceableError) as caught:
        ChannelSpace(net, torch.zeros(1, 3, 6, 6))
    assert "\n" not in str(caught.value)
    assert net.training
    return str(caught.value)


def test_forward_that_depends_on_values_names_the_module() -> None:
    message = refused(lambda s, x: s.b(s.body(s.a(x))), body=nn.Sequential(nn.ReLU(), Branching()))
    assert "'body.1' (Branching) has a forward that depends on values" in message


@pytest.mark.parametrize(
    ("forward", "named"),
    [
        (lambda s, x: s.b(s.a(x).roll(1, 1)), "operation 'roll'"),
        (lambda s, x: s.b(torch.matmul(s.a(x), s.a(x))), "operation 'matmul'"),
        (lambda s, x: s.b(s.extra(s.a(x))), "module 'extra' of type PixelShuffle"),
        (lambda s, x: s.b(s.a(x).log()), "operation 'log'"),  # of a channel at zero
        (lambda s, x: s.b(nn.functional.pad(s.a(x), (1, 1, 0, 0, 2, 0))), "'pad' changes the number of channels"),
        (lambda s, x: s.up(s.a(x)), "'up' has 2 groups and writes 6 channels: .* as many as it reads, 4"),
        (lambda s, x: s.b(s.a(x) * s.a(x).size(1)), "'mul' computes with the size of a tensor"),
        (
            lambda s, x: s.b(s.four(s.a(x)) + s.four(s.a(x)).transpose(1, 2)),
            "'add' mixes channels of different dimensions",
        ),
        (lambda s, x: s.b(torch.cat([s.a(x), x.new_zeros(1)], 1)), "'new_zeros'"),
        (lambda s, x: s.four(s.a(x)).squeeze(), "'squeeze' without a dimension"),
        (lambda s, x: s.b(s.pool(s.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), "'pool' works along dimension -3"),
    ],
)
def test_unknown_operations_are_named(forward: Callable[[Net, Tensor], Tensor], named: str) -> None:
    layers = {"pool": nn.AvgPool2d(1), "four": nn.AdaptiveAvgPool2d(4), "up": nn.ConvTranspose2d(4, 6, 2, groups=2)}
    assert re.search(named, refused(forward, extra=nn.PixelShuffle(2), **layers))


def test_computed_weights_are_refused() -> None:
    net = Net(lambda s, x: s.b(s.a(x)), a=nn.utils.parametrizations.weight_norm(conv(3, 4)), b=conv(4, 2))
    with pytest.raises(UntraceableError, match="'a' of type ParametrizedConv2d"):
        ChannelSpace(net, torch.zeros(1, 3, 6, 6))


def test_attention_is_refused_by_name() -> None:
    net = zoo.vit_b_16(num_classes=7)
    with pytest.raises(UntraceableError, match="in module 'encoder' of type Encoder") as caught:
        ChannelSpace(net, torch.zeros(1, 3, 224, 224))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (1, 3, 40, 40), (3, 32), (3,)])
def test_example_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="example") as caught:
        ChannelSpace(models.build("convnet"), torch.zeros(shape))
    assert "\n" not in str(caught.value)


def test_network_without_anything_to_remove() -> None:
    with pytest.raises(ValueError, match="Sequential has no channels that could be removed"):
        ChannelSpace(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(1, 3, 6, 6))


def test_a_network_that_stays_whole_says_why() -> None:
    """Three reasons at most."""
    norms = [nn.GroupNorm(1, 4) for _ in range(4)]
    net = nn.Sequential(*[layer for norm in norms for layer in (conv(4, 4), norm)], conv(4, 4))
    message = r"no channels that could be removed: GroupNorm at 1; GroupNorm at 3; GroupNorm at 5; …$"
    with pytest.raises(ValueError, match=message):
        ChannelSpace(net, torch.zeros(1, 4, 6, 6))
    with pytest.raises(ValueError, match=r"no channels that could be removed: GroupNorm at 1; the network's output$"):
        ChannelSpace(net[:3], torch.zeros(1, 4, 6, 6))
    with pytest.raises(ValueError, match=r"no channels that could be removed: the network's output$"):
        ChannelSpace(net[:1], torch.zeros(1, 4, 6, 6))


OUTPUT = "the network's output"


@pytest.mark.parametrize(
    ("case", "whole"),
    [
        ("chain", {"c": OUTPUT}),
        ("grouped", {"c": OUTPUT}),
        ("layer norm keeps its channels", {"a": "LayerNorm at n", "k": OUTPUT}),
        ("softmax keeps its channels", {"b": "softmax", "c": OUTPUT}),
        ("one map gates all", {"gate": "one map for all channels", "b": OUTPUT}),
        (
            "fixed sizes keep their channels",
            {
                "a": "fixed sizes",
                "b": "fixed indices",
                "c.1": OUTPUT,
                "d": "fixed sizes; uneven split",
                "e": "amax over channels",
            },
        ),
        ("a constant per channel keeps the channels", {"b": "a constant per channel", "c": OUTPUT}),
    ],
)
def test_layers_that_can_lose_no_filter_say_what_pins_them(case: str, whole: dict[str, str]) -> None:
    net, x = tiny(case)
    assert ChannelSpace(net, x).whole == whole


def test_the_image_and_every_output_pin_layers_too() -> None:
    net = Net(
        lambda s, x: (lambda f: {"features": f, "logits": s.c(s.b(f))})(x + s.a(x)),
        a=conv(3, 3), b=conv(3, 4), c=conv(4, 2),
    )  # fmt: skip
    whole = {"a": f"the image; {OUTPUT}", "c": OUTPUT}
    assert ChannelSpace(net, torch.zeros(1, 3, 6, 6)).whole == whole
    assert RowColumnSpace(net, torch.zeros(1, 3, 6, 6)).whole == whole


def test_unknown_group_has_no_weights() -> None:
    space = ChannelSpace(models.build("convnet"), torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"unknown groups \['conv9'\]: this network has conv1, conv2, conv3"):
        space.unit_weights("conv9")
