"""The papers' networks with the papers' parameter and MAC counts, and every torchvision classification network.

Our networks are plain modules called in a plain order, so that `torch.fx` traces them and any layer may be made
narrower: no channel count is written into a `forward`. Counts in the docstrings are for 10 classes and 3x32x32 images;
one multiply-add is one MAC, and MACs are those of the convolutions and linear layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as NormBase

from prunelab._checks import POSITIVE, Legal, check, integer, optional
from prunelab.layers import ZeroPadChannels

Shape = tuple[int, int, int]
Layers = dict[str, nn.Module]

VGG11 = 1, 1, 2, 2, 2  # convolutions in each stage

IMAGE = Legal(
    "three positive integers (channels, height, width)",
    lambda shape: isinstance(shape, tuple | list) and len(shape) == 3 and all(map(integer(1).accepts, shape)),
)


class _Task(NamedTuple):
    """What a network is built for; `shape` is (channels, height, width) of an image, `width` multiplies all widths."""

    classes: int
    shape: Shape
    width: float

    def scaled(self, *channels: int) -> list[int]:
        return [max(1, round(n * self.width)) for n in channels]

    def halvings(self, wanted: int) -> int:
        """How many of the `wanted` pools fit: each halves the map, rounding down, and one pixel cannot be pooled."""
        return min(wanted, min(self.shape[1:]).bit_length() - 1)

    def pixels(self, halvings: int) -> int:
        return (self.shape[1] >> halvings) * (self.shape[2] >> halvings)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)


def _sequential(layers: Layers) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _average_and_classify(inputs: int, classes: int) -> Layers:
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": nn.Linear(inputs, classes)}


# Plain networks


def _convnet(task: _Task, *, batch_norm: bool) -> nn.Module:
    """Caffe's cifar10_full, the ConvNet of SPP and SSL: 12,288,000 convolution MACs, shared .200/.533/.267.

    The original's local response normalisation is left out. With `batch_norm`, the convolutions lose their biases and
    each is followed by batch norm.
    """
    channels, halvings = task.shape[0], task.halvings(3)
    layers: Layers = {}
    for i, width in enumerate(task.scaled(32, 32, 64), start=1):
        layers[f"conv{i}"] = _conv(channels, width, 5, bias=not batch_norm)
        if batch_norm:
            layers[f"bn{i}"] = nn.BatchNorm2d(width)
        if i == 1 <= halvings:
            layers["pool1"] = nn.MaxPool2d(3, 2, ceil_mode=True)
        layers[f"relu{i}"] = nn.ReLU()
        if 1 < i <= halvings:
            layers[f"pool{i}"] = nn.AvgPool2d(3, 2, ceil_mode=True)
        channels = width
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(channels * task.pixels(halvings), task.classes)
    return _sequential(layers)


def _model_c(task: _Task) -> nn.Module:
    """DropNet's Model C 64-64-128-128: four times convolution, ReLU and 2x2 max pool, then 256 hidden units."""
    channels, halvings, (hidden,) = task.shape[0], task.halvings(4), task.scaled(256)
    layers: Layers = {}
    for i, width in enumerate(task.scaled(64, 64, 128, 128), start=1):
        layers[f"conv{i}"] = _conv(channels, width, bias=True)
        layers[f"relu{i}"] = nn.ReLU()
        if i <= halvings:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
        channels = width
    layers["flatten"] = nn.Flatten()
    layers["linear1"] = nn.Linear(channels * task.pixels(halvings), hidden)
    layers["relu5"] = nn.ReLU()
    layers["linear2"] = nn.Linear(hidden, task.classes)
    return _sequential(layers)


def _vgg_features(task: _Task, convs: tuple[int, ...], pools: int) -> Layers:
    """Five stages of 3x3 convolutions with batch norm and ReLU, numbered through; max pools after the first `pools`."""
    channels, i = task.shape[0], 0
    layers: Layers = {}
    for stage, (width, count) in enumerate(zip(task.scaled(64, 128, 256, 512, 512), convs, strict=True), start=1):
        for _ in range(count):
            i += 1
            layers[f"conv{i}"] = _conv(channels, width)
            layers[f"bn{i}"] = nn.BatchNorm2d(width)
            layers[f"relu{i}"] = nn.ReLU()
            channels = width
        if stage <= pools:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
    return layers


def _vgg16(task: _Task) -> nn.Module:
    """Li et al.'s VGG-16, with 512 hidden units under batch norm: 313,463,808 MACs, 14,987,722 parameters."""
    halvings, (width,) = task.halvings(5), task.scaled(512)
    layers = _vgg_features(task, (2, 2, 3, 3, 3), halvings)
    layers["flatten"] = nn.Flatten()
    layers["linear1"] = nn.Linear(width * task.pixels(halvings), width)
    layers["bn14"] = nn.BatchNorm1d(width)
    layers["relu14"] = nn.ReLU()
    layers["linear2"] = nn.Linear(width, task.classes)
    return _sequential(layers)


def _vgg_averaged(task: _Task, *, convs: tuple[int, ...]) -> nn.Module:
    """Network Slimming's VGG: four max pools, an average pool, one linear layer.

    VGG-19 has 398,136,320 MACs, 20,035,018 parameters and 5,504 batch-norm scales.
    """
    (width,) = task.scaled(512)
    return _sequential(_vgg_features(task, convs, task.halvings(4)) | _average_and_classify(width, task.classes))


def _vgg11_half(task: _Task) -> nn.Module:
    """VGG-11 at half its widths, a VGG that two CPU cores can train: 38,636,032 MACs, 2,310,186 parameters."""
    return _vgg_averaged(task._replace(width=task.width / 2), convs=VGG11)


# Residual and densely connected networks


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(branch(x) + shortcut(x))."""
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(branch + self.shortcut(x))


class PreActivationBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each after batch norm and ReLU, added to a shortcut (He et al., 2016b)."""

    def __init__(self, inputs: int, planes: int, outputs: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = _conv(inputs, planes, 1)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU()
        self.conv2 = _conv(planes, planes, stride=stride)
        self.bn3 = nn.BatchNorm2d(planes)
        self.relu3 = nn.ReLU()
        self.conv3 = _conv(planes, outputs, 1)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return branch(x) + shortcut(x); the shortcut sees the input before batch norm."""
        branch = self.conv1(self.relu1(self.bn1(x)))
        branch = self.conv2(self.relu2(self.bn2(branch)))
        branch = self.conv3(self.relu3(self.bn3(branch)))
        return branch + self.shortcut(x)


class DenseLayer(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution, whose output channels join the input's (Huang et al., 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv = _conv(inputs, growth)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input's channels followed by the new ones."""
        return torch.cat([x, self.conv(self.relu(self.bn(x)))], 1)


def _shortcut_a(inputs: int, outputs: int) -> nn.Module:
    """He et al.'s option A: every second pixel, zero channels up to the target width, half before and half after."""
    before = (outputs - inputs) // 2
    subsample = nn.AvgPool2d(1, stride=2)  # a window of one pixel: plain subsampling, whatever the width
    return _sequential({"subsample": subsample, "pad": ZeroPadChannels(before, outputs - inputs - before)})


def _shortcut_b(inputs: int, outputs: int) -> nn.Module:
    """He et al.'s option B: a 1x1 projection of stride 2 with batch norm."""
    return _sequential({"conv": _conv(inputs, outputs, 1, stride=2), "bn": nn.BatchNorm2d(outputs)})


def _resnet(task: _Task, *, depth: int, shortcut: Callable[[int, int], nn.Module]) -> nn.Module:
    """CIFAR ResNet of 6n + 2 layers (He et al., 2016): n basic blocks at each of the widths 16, 32 and 64.

    With option-A shortcuts ResNet-56 has 125,485,696 MACs and 853,018 parameters, ResNet-110 252,887,680 and 1,727,962.
    The released code of Li et al. and Rethinking differs in its shortcut: average-pooled, padded behind, and detached
    from autograd.
    """
    (channels,) = task.scaled(16)
    layers: Layers = {
        "conv": _conv(task.shape[0], channels),
        "bn": nn.BatchNorm2d(channels),
        "relu": nn.ReLU(),
    }
    for stage, width in enumerate(task.scaled(16, 32, 64), start=1):
        stride, entry = (1, nn.Identity()) if stage == 1 else (2, shortcut(channels, width))
        blocks = [BasicBlock(channels, width, stride, entry)]
        blocks += [BasicBlock(width, width, 1, nn.Identity()) for _ in range((depth - 2) // 6 - 1)]
        layers[f"stage{stage}"] = nn.Sequential(*blocks)
        channels = width
    return _sequential(layers | _average_and_classify(channels, task.classes))


def _preactivation_resnet(task: _Task, *, depth: int) -> nn.Module:
    """Pre-activation bottleneck ResNet of 9n + 2 layers, as in Network Slimming.

    ResNet-164 has 247,646,720 MACs, 1,703,258 parameters and 12,112 batch-norm scales.
    """
    (channels,) = task.scaled(16)
    layers: Layers = {"conv": _conv(task.shape[0], channels)}
    for stage, planes in enumerate(task.scaled(16, 32, 64), start=1):
        width, stride = 4 * planes, 1 if stage == 1 else 2
        entry = _conv(channels, width, 1, stride)
        blocks = [PreActivationBottleneck(channels, planes, width, stride, entry)]
        blocks += [PreActivationBottleneck(width, planes, width, 1, nn.Identity()) for _ in range((depth - 2) // 9 - 1)]
        layers[f"stage{stage}"] = nn.Sequential(*blocks)
        channels = width
    layers |= {"bn": nn.BatchNorm2d(channels), "relu": nn.ReLU()}
    return _sequential(layers | _average_and_classify(channels, task.classes))


def _densenet(task: _Task, *, depth: int, growth: int) -> nn.Module:
    """DenseNet of 3n + 4 layers without bottlenecks or compression, as in Network Slimming.

    DenseNet-40 of growth 12 has 264,812,928 MACs, 1,019,722 parameters and 9,048 batch-norm scales. The stem has 16
    channels as in the paper; the authors' PyTorch code has 24.
    """
    halvings, (channels, growth) = task.halvings(2), task.scaled(16, growth)
    layers: Layers = {"conv": _conv(task.shape[0], channels)}
    for stage in (1, 2, 3):
        block = [DenseLayer(channels + i * growth, growth) for i in range((depth - 4) // 3)]
        channels += len(block) * growth
        layers[f"stage{stage}"] = nn.Sequential(*block)
        layers[f"bn{stage}"] = nn.BatchNorm2d(channels)
        layers[f"relu{stage}"] = nn.ReLU()
        if stage < 3:
            layers[f"conv{stage}"] = _conv(channels, channels, 1)
        if stage <= halvings:
            layers[f"pool{stage}"] = nn.AvgPool2d(2)
    return _sequential(layers | _average_and_classify(channels, task.classes))


# All of them by name

_BUILDERS: dict[str, Callable[[_Task], nn.Module]] = {
    "convnet": partial(_convnet, batch_norm=False),
    "convnet-bn": partial(_convnet, batch_norm=True),
    "model-c": _model_c,
    "vgg11": partial(_vgg_averaged, convs=VGG11),
    "vgg11-half": _vgg11_half,
    "vgg16": _vgg16,
    "vgg19": partial(_vgg_averaged, convs=(2, 2, 4, 4, 4)),
    **{f"resnet{depth}": partial(_resnet, depth=depth, shortcut=_shortcut_a) for depth in (20, 32, 56, 110)},
    **{f"resnet{depth}-b": partial(_resnet, depth=depth, shortcut=_shortcut_b) for depth in (20, 32, 56, 110)},
    "resnet164": partial(_preactivation_resnet, depth=164),
    "densenet40": partial(_densenet, depth=40, growth=12),
}

NAMES: tuple[str, ...] = tuple(_BUILDERS)
"""The networks of this module; `build` also takes torchvision's names."""

TORCHVISION: tuple[str, ...] = tuple(torchvision.models.list_models(torchvision.models))

LEGAL = Legal(
    f"one of {', '.join(map(repr, NAMES))}, or a classification network of torchvision",
    lambda name: name in NAMES or name.removeprefix("torchvision/") in TORCHVISION,
)
"""What `build` takes for a name."""


def build(
    name: str, *, classes: int = 10, shape: Shape = (3, 32, 32), seed: int | None = None, width: float = 1.0
) -> nn.Module:
    """Build a network with random weights.

    Our networks take images of any size: pools are left out where the map is down to one pixel. Their convolutions
    start as in He et al. (2015), normal with variance 2 / fan-out and zero bias; batch-norm scales are 1, and linear
    layers start as PyTorch has them. torchvision's networks start as torchvision has them, without auxiliary heads.

    Args:
        name: one of `NAMES` or a torchvision classification network; three names are both, and "torchvision/vgg16" is
            torchvision's.
        classes: number of outputs, at least 2.
        shape: (channels, height, width) of an image.
        seed: fixes the weights and leaves PyTorch's random state alone; None draws from that state.
        width: multiplies all widths of one of our networks; each is rounded, and at least 1.

    Raises:
        ValueError: unknown name, or a number of classes, shape or width that the network cannot have.
    """
    if isinstance(name, str) and not LEGAL.accepts(name):
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join((*NAMES, *TORCHVISION))}")
    check("name", name, LEGAL)
    builder, torchvision_name = _BUILDERS.get(name), name.removeprefix("torchvision/")
    check("classes", classes, integer(2))
    check("shape", shape, IMAGE)
    check("seed", seed, optional(integer(0)))
    check("width", width, POSITIVE)
    if builder is None:
        _check_torchvision(torchvision_name, shape, width)

    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        if builder is None:
            return _torchvision_network(torchvision_name, classes)
        return builder(_Task(classes, shape, width)).apply(_initialise)


def reinitialise(net: nn.Module, seed: int) -> nn.Module:
    """Draw all weights of a network anew, in place, as `build` draws those of our networks; return the network.

    Args:
        net: any network, also one that was cut: the variance of a convolution is that of its present fan-out.
        seed: fixes the weights, on every device, and leaves PyTorch's random state alone.

    Raises:
        ValueError: a module has parameters that it cannot draw, as it has no `reset_parameters`; it is named.
    """
    owners = {name: module for name, module in net.named_modules() if list(module.parameters(recurse=False))}
    if unknown := [name or "itself" for name, module in owners.items() if not hasattr(module, "reset_parameters")]:
        raise ValueError(f"{type(net).__name__} cannot be drawn anew: no reset_parameters in {', '.join(unknown)}")
    device = next(net.parameters()).device
    net.cpu()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in owners.values():
            module.reset_parameters()
        for module in net.modules():
            if isinstance(module, NormBase):  # without parameters, too
                module.reset_running_stats()
        return net.apply(_initialise).to(device)


def transfer(net: nn.Module, trained: nn.Module) -> nn.Module:
    """Give a network the weights and statistics of a trained one of its kind, all but its last linear layer's.

    Args:
        net: changed in place, and returned.
        trained: may be for other images and other classes, as far as the tensors have the same shapes.

    Raises:
        ValueError: the network has no linear layer; or a tensor is missing or has another shape, and is named.
    """
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"{type(net).__name__} cannot be transferred: it has no linear layer to draw anew")
    own, known = net.state_dict(), trained.state_dict()
    inherited = [name for name in own if not name.startswith(f"{linear[-1]}.")]
    for name in inherited:
        if name not in known or known[name].shape != own[name].shape:
            there = f"is {list(known[name].shape)}" if name in known else "is not there"
            raise ValueError(f"{name} is {list(own[name].shape)}, but {there} in the network to transfer from")
    net.load_state_dict({**own, **{name: known[name] for name in inherited}})
    return net


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_torchvision(name: str, shape: Shape, width: float) -> None:
    channels, *size = shape
    least = min(weights.meta["min_size"] for weights in torchvision.models.get_model_weights(name))
    if channels != 3 or size[0] < least[0] or size[1] < least[1]:
        raise ValueError(
            f"torchvision's {name} takes images of shape (3, {least[0]}, {least[1]}) or larger, got {shape}"
        )
    if width != 1:
        raise ValueError(f"torchvision's {name} comes in width 1 only, got {width}")


def _torchvision_network(name: str, classes: int) -> nn.Module:
    # These two have auxiliary heads, which change the type of the output, and warn unless told how to start.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
