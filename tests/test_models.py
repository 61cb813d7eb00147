from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import nn

from prunelab import cost, models
from prunelab.layers import ZeroPadChannels

CIFAR = torch.zeros(1, 3, 32, 32)


def batch_norm_scales(net: nn.Module) -> int:
    return sum(layer.num_features for layer in net.modules() if isinstance(layer, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("name", "macs", "parameters"),
    [
        # Li et al. (2017), Table 1: 3.13e8 / 1.5e7, 1.25e8 / 8.5e5, 2.53e8 / 1.72e6.
        ("vgg16", 313_463_808, 14_987_722),
        ("resnet56", 125_485_696, 853_018),
        ("resnet110", 252_887_680, 1_727_962),
        # Network Slimming, Table 1: 7.97e8 FLOPs (two to a MAC) / 20.04M, 4.99e8 / 1.70M, 5.33e8 / 1.02M.
        ("vgg19", 398_136_320, 20_035_018),
        ("resnet164", 247_646_720, 1_703_258),
        ("densenet40", 264_812_928, 1_019_722),
    ],
)
def test_counts_are_the_papers(name: str, macs: int, parameters: int) -> None:
    net = models.build(name)
    assert cost.macs(net, CIFAR) == macs
    assert cost.parameters(net) == parameters


@pytest.mark.parametrize(("name", "millions"), [("vgg19", 20.08), ("resnet164", 1.73), ("densenet40", 1.06)])
def test_parameters_with_100_classes_are_network_slimmings(name: str, millions: float) -> None:
    assert round(cost.parameters(models.build(name, classes=100)) / 1e6, 2) == millions


def test_resnet34_is_li_et_als() -> None:
    net = models.build("resnet34", classes=1000, shape=(3, 224, 224))
    assert cost.macs(net, torch.zeros(1, 3, 224, 224)) == 3_663_761_408
    assert cost.parameters(net) == 21_797_672


@pytest.mark.parametrize(("name", "scales"), [("vgg19", 5504), ("resnet164", 12_112), ("densenet40", 9048)])
def test_number_of_batch_norm_scales_is_network_slimmings(name: str, scales: int) -> None:
    assert batch_norm_scales(models.build(name)) == scales


def test_vgg11_half_has_half_the_channels_of_vgg11_in_every_layer() -> None:
    half, whole = models.build("vgg11-half"), models.build("vgg11")
    widths = [[layer.out_channels for layer in net if isinstance(layer, nn.Conv2d)] for net in (half, whole)]
    assert [2 * width for width in widths[0]] == widths[1] == [64, 128, 256, 256, 512, 512, 512, 512]
    by_layer = (
        3 * 32 * 32**2,
        32 * 64 * 16**2,
        (64 * 128 + 128**2) * 8**2,
        (128 * 256 + 256**2) * 4**2,
        2 * 256**2 * 2**2,
    )
    assert cost.macs(half, CIFAR) == 9 * sum(by_layer) + 256 * 10 == 38_636_032


@pytest.mark.parametrize("name", ["convnet", "convnet-bn"])
def test_convnet_is_cifar10_full(name: str) -> None:
    net = models.build(name)
    table = cost.breakdown(net, CIFAR).set_index("name")
    convs = table.loc[["conv1", "conv2", "conv3"], "macs"]
    assert convs.tolist() == [32 * 32 * 32 * 3 * 25, 32 * 16 * 16 * 32 * 25, 64 * 8 * 8 * 32 * 25]
    assert convs.sum() == 12_288_000
    assert (convs / convs.sum()).round(3).tolist() == [0.2, 0.533, 0.267]
    assert table.loc["linear", "macs"] == 1024 * 10
    # Weights, then the biases of the convolutions or the scale and shift of batch norm, then the classifier.
    norms = 128 if name == "convnet" else 256
    assert cost.parameters(net) == 32 * 3 * 25 + 32 * 32 * 25 + 64 * 32 * 25 + norms + 1024 * 10 + 10


def test_convnet_pools_in_the_order_of_cifar10_full() -> None:
    names = [name for name, _ in models.build("convnet").named_children()]
    assert names[:3] == ["conv1", "pool1", "relu1"]
    assert names[3:9] == ["conv2", "relu2", "pool2", "conv3", "relu3", "pool3"]


def test_model_c_is_dropnets() -> None:
    convs = [(3, 64, 32), (64, 64, 16), (64, 128, 8), (128, 128, 4)]
    net = models.build("model-c")
    assert cost.macs(net, CIFAR, "conv") == sum(9 * c * n * side**2 for c, n, side in convs)
    assert cost.parameters(net) == sum((9 * c + 1) * n for c, n, _ in convs) + 513 * 256 + 257 * 10


@pytest.mark.parametrize("depth", [20, 32, 56, 110])
def test_projection_shortcuts_cost_two_1x1_convolutions(depth: int) -> None:
    a, b = models.build(f"resnet{depth}"), models.build(f"resnet{depth}-b")
    assert cost.parameters(b) - cost.parameters(a) == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert cost.macs(b, CIFAR) - cost.macs(a, CIFAR) == 16 * 32 * 16**2 + 32 * 64 * 8**2
    # The name counts the layers with weights; projections do not count.
    layers = [layer for layer in a.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


@pytest.mark.parametrize("depth", [11, 16, 19])
def test_vgg_has_its_number_of_convolutions(depth: int) -> None:
    convs = [layer for layer in models.build(f"vgg{depth}").modules() if isinstance(layer, nn.Conv2d)]
    assert len(convs) == depth - 3  # the original's three linear layers are fewer on CIFAR


def test_preactivation_resnet_has_164_layers() -> None:
    blocks = [
        layer for layer in models.build("resnet164").modules() if isinstance(layer, models.PreActivationBottleneck)
    ]
    assert 3 * len(blocks) + 2 == 164


# Option A


@pytest.mark.parametrize(("inputs", "outputs", "before"), [(16, 32, 8), (3, 6, 1), (20, 39, 9), (7, 7, 0)])
def test_shortcut_a_subsamples_and_pads_to_the_target_width(inputs: int, outputs: int, before: int) -> None:
    x = torch.randn(2, inputs, 7, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2, outputs, 4, 4)
    expected[:, before : before + inputs] = x[:, :, ::2, ::2]
    assert torch.equal(models._shortcut_a(inputs, outputs)(x), expected)


def test_odd_widths_pass_option_a() -> None:
    net = models.build("resnet20", width=0.3)  # 16, 32, 64 become 5, 10, 19
    pads = [(pad.before, pad.after) for pad in net.modules() if isinstance(pad, ZeroPadChannels)]
    assert pads == [(2, 3), (4, 5)]
    assert net.eval()(CIFAR).shape == (1, 10)


def test_gradients_cross_a_stage_through_the_shortcut() -> None:
    net = models.build("resnet20", seed=0).eval()
    first = net.stage2[0]
    nn.init.zeros_(first.bn2.weight)  # silences the residual branch: only the shortcut is left
    x = torch.ones(1, 16, 4, 4, requires_grad=True)
    first(x).sum().backward()
    # He et al. keep every second pixel; a detached shortcut would give no gradient at all.
    expected = torch.zeros(4, 4)
    expected[::2, ::2] = 1
    assert torch.equal(x.grad, expected.expand(1, 16, 4, 4))


# Shapes and tracing


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 1, 1), (2, 67, 45)])
@pytest.mark.parametrize("name", models.NAMES)
def test_every_network_takes_every_image_size(name: str, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        net, images = models.build(name, classes=7, shape=shape).eval(), torch.zeros(2, *shape)
    assert net(images).shape == (2, 7)


def test_vgg16_on_8x8_digits_keeps_the_pools_that_fit() -> None:
    net = models.build("vgg16", shape=(1, 8, 8))
    assert [name for name, layer in net.named_children() if isinstance(layer, nn.MaxPool2d)] == [
        "pool1",
        "pool2",
        "pool3",
    ]
    assert net.linear1.in_features == 512


def test_width_scales_every_layer_but_image_and_classes() -> None:
    convs = [layer for layer in models.build("vgg11", width=0.1).modules() if isinstance(layer, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [6, 13, 26, 26, 51, 51, 51, 51]
    assert convs[0].in_channels == 3
    assert all(
        conv.out_channels == 1 for conv in models.build("convnet", width=1e-6).modules() if isinstance(conv, nn.Conv2d)
    )


@pytest.mark.parametrize("name", models.NAMES)
def test_torch_fx_traces_every_network(name: str) -> None:
    net = models.build(name, shape=(3, 8, 8), seed=0, width=0.25).eval().double()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


# Random state


@pytest.mark.parametrize("name", ["resnet20", "vgg16", "squeezenet1_1"])
def test_seed_fixes_the_weights_and_leaves_the_random_state_alone(name: str) -> None:
    state = torch.get_rng_state()
    first, same, other = (models.build(name, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_without_a_seed_the_random_state_decides() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first, second = models.build("convnet"), models.build("convnet")
        torch.manual_seed(5)
        again = models.build("convnet")
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, second.conv1.weight)


def test_convolutions_start_as_he_et_al() -> None:
    net = models.build("vgg16", seed=0)
    # Among a million weights the sample deviation is within 0.1% of the law's, at more than one sigma per mille.
    deviation = net.conv13.weight.std().item()
    assert deviation == pytest.approx(math.sqrt(2 / (9 * 512)), rel=3e-3)
    assert torch.equal(net.bn13.weight, torch.ones(512))
    assert not models.build("convnet", seed=0).conv1.bias.any()


# torchvision


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out(name: str) -> None:
    with torch.device("meta"):
        net, images = models.build(name, classes=5, shape=(3, 96, 96)), torch.zeros(2, 3, 96, 96)
    assert net(images).shape == (2, 5)


def test_names_shared_with_torchvision() -> None:
    with torch.device("meta"):
        theirs = models.build("torchvision/vgg11", classes=3)
    assert isinstance(theirs, torchvision.models.VGG)
    assert theirs.classifier[-1].out_features == 3
    assert not isinstance(models.build("vgg11"), torchvision.models.VGG)


# Bad input


@pytest.mark.parametrize("name", ["vgg", "torchvision/resnet20", "fcn_resnet50", "quantized_resnet18", ""])
def test_unknown_name_lists_the_legal_ones(name: str) -> None:
    with pytest.raises(ValueError, match="unknown network") as error:
        models.build(name)
    assert repr(name) in str(error.value)
    assert {*models.NAMES, "mobilenet_v2"} <= set(
        str(error.value).split(": ")[1].removeprefix("choose one of ").split(", ")
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("convnet", {"classes": 1}, "classes is 1; it must be an integer >= 2"),
        (
            "convnet",
            {"shape": (32, 32)},
            r"shape is \(32, 32\); it must be three positive integers \(channels, height, width\)",
        ),
        ("convnet", {"shape": (3, 0, 32)}, "three positive integers"),
        ("convnet", {"shape": (3, 32.0, 32)}, "three positive integers"),
        ("convnet", {"width": 0}, "width is 0; it must be a finite number > 0"),
        ("convnet", {"width": math.nan}, "width is nan; it must be a finite number > 0"),
        ("resnet18", {"width": 0.5}, "resnet18 comes in width 1 only, got 0.5"),
        ("resnet18", {"shape": (1, 8, 8)}, r"resnet18 takes images of shape \(3, 1, 1\) or larger"),
        ("alexnet", {"shape": (3, 32, 64)}, r"alexnet takes images of shape \(3, 63, 63\) or larger"),
    ],
)
def test_bad_input_is_named(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(name, **options)
