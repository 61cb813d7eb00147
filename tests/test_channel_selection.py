"""Channel selection: which batch norms get one, and that cutting behind it equals masking, with the stream whole."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunelab import cost, models
from prunelab.layers import ChannelSelection
from prunelab.methods.slimming import with_channel_selection
from prunelab.models import DenseLayer, PreActivationBottleneck
from prunelab.structure import ChannelSpace, Plan

TASK = models._Task(classes=7, shape=(3, 8, 8), width=0.25)
IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Make a float64 network with no default biases, batch-norm statistics or scales."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double().eval()
    for name, tensor in net.state_dict().items():
        if tensor.dim() == 1 and tensor.is_floating_point():
            low, high = (0.5, 2.0) if name.endswith(("weight", "running_var")) else (-0.5, 0.5)
            tensor.uniform_(low, high, generator=generator)
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "preresnet20": lambda: models._preactivation_resnet(TASK, depth=20),
    "densenet13": lambda: models._densenet(TASK, depth=13, growth=12),
    "torchvision's densenet": lambda: torchvision.models.DenseNet(8, (2, 3), 8, num_classes=7),
    "batch norm behind the ReLU": lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(64, 7)
    ),
}


def network(name: str) -> nn.Module:
    if name in models.NAMES:
        return randomised(models.build(name, classes=TASK.classes, shape=TASK.shape, width=TASK.width, seed=0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(NETS[name]())


def selections(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, ChannelSelection)]


def random_plan(space: ChannelSpace, seed: int) -> Plan:
    random = np.random.default_rng(seed)
    widths = {g.name: int(random.integers(1, g.size + 1)) for g in space.groups}
    return space.plan({g.name: random.choice(g.size, widths[g.name], replace=False).tolist() for g in space.groups})


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


def assert_mask_is_shrink(space: ChannelSpace, plan: Plan, images: Tensor) -> nn.Module:
    masked, small = space.mask(plan), space.shrink(plan)
    with torch.inference_mode():
        assert_same(small(images), masked(images))
    for scope in ("all", "conv"):
        assert space.macs(plan, scope) == cost.macs(small, images, scope)
    cut = space.cut(plan, space.net.state_dict())
    assert all(torch.equal(cut[name], value) for name, value in small.state_dict().items())
    return small


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 3, 4)])
def test_everything_passes_until_the_layer_is_cut(shape: tuple[int, ...]) -> None:
    selection, x = ChannelSelection(6), torch.randn(shape)
    assert selection(x) is x
    selection.kept = torch.tensor([1, 4])
    assert torch.equal(selection(x), x[:, [1, 4]])
    assert str(selection) == "ChannelSelection(2 of 6)"
    assert not list(selection.parameters())  # indices are not counted as parameters, nor trained


def test_in_front_of_the_batch_norm_is_what_the_authors_have_behind_it() -> None:
    norm, x, kept = randomised(nn.BatchNorm2d(6)), torch.randn(3, 6, 4, 4, dtype=torch.float64), torch.tensor([0, 3, 4])
    for training in (False, True):
        statistics, scale = (None, None) if training else (norm.running_mean[kept], norm.running_var[kept]), norm.weight
        front = F.batch_norm(x[:, kept], *statistics, scale[kept], norm.bias[kept], training)
        behind = copy.deepcopy(norm).train(training)(x)[:, kept]
        assert_same(front, behind)


# -- where it goes ----------------------------------------------------------------------------------------------------


def test_a_preactivation_block_chooses_what_it_reads_and_leaves_the_stream() -> None:
    net = models._preactivation_resnet(models._Task(10, (3, 32, 32), 1.0), depth=20)
    example = torch.zeros(1, 3, 32, 32)
    chosen = with_channel_selection(net, example)
    blocks = [f"stage{stage}.{block}.bn1.select" for stage in (1, 2, 3) for block in (0, 1)]
    assert selections(chosen) == [*blocks, "bn.select"]
    space = ChannelSpace(chosen, example)
    # Per block what it reads, and its two inner widths; of the stream, the stem and the projections nothing can go.
    sizes = {"stage1.0.bn1.select": 16, "stage1.1.bn1.select": 64, "stage2.0.bn1.select": 64} | {
        "stage2.1.bn1.select": 128, "stage3.0.bn1.select": 128, "stage3.1.bn1.select": 256, "bn.select": 256
    }  # fmt: skip
    sizes |= {f"stage{s}.{b}.{conv}": 2**s * 8 for s in (1, 2, 3) for b in (0, 1) for conv in ("conv1", "conv2")}
    assert {group.name: group.size for group in space.groups} == sizes


def test_the_cost_of_a_block_is_that_of_its_three_widths() -> None:
    """The published triple (a, b, c): 1x1 from a to b, 3x3 from b to c, 1x1 from c to all 256 of the stream."""
    example = torch.zeros(1, 3, 32, 32)
    net = models._preactivation_resnet(models._Task(10, (3, 32, 32), 1.0), depth=20)
    space = ChannelSpace(with_channel_selection(net, example), example)
    a, b, c = 100, 30, 20
    block = {"stage3.1.bn1.select": a, "stage3.1.conv1": b, "stage3.1.conv2": c}
    saved = 8 * 8 * ((256 * 64 + 9 * 64 * 64 + 64 * 256) - (a * b + 9 * b * c + c * 256))
    assert space.macs() - space.macs(block) == saved
    small = space.shrink(space.plan({name: range(width) for name, width in block.items()}))
    cut = small.stage3[1]
    assert [m.num_features for m in (cut.bn1.norm, cut.bn2, cut.bn3)] == [a, b, c]
    assert [(m.in_channels, m.out_channels) for m in (cut.conv1, cut.conv2, cut.conv3)] == [(a, b), (b, c), (c, 256)]
    head = space.shrink(space.plan({"bn.select": range(10)}))
    assert head.linear.in_features == 10  # the last selection cuts the classifier's columns
    assert head.stage3[1].conv3.out_channels == 256


@pytest.mark.parametrize("name", ["convnet-bn", "vgg19", "vgg16", "resnet20", "resnet20-b"])
def test_nothing_is_inserted_where_every_batch_norm_stands_behind_a_layer(name: str) -> None:
    net = models.build(name, shape=(1, 8, 8), width=0.25, seed=0)
    assert selections(with_channel_selection(net, torch.zeros(1, 1, 8, 8))) == []


@pytest.mark.parametrize("name", NETS)
def test_the_function_and_the_network_stay_as_they_are(name: str) -> None:
    net = network(name)
    net.train()
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    modes, before = [m.training for m in net.modules()], copy.deepcopy(net.state_dict())
    chosen = with_channel_selection(net, IMAGES)
    assert selections(net) == [] != selections(chosen)
    assert [m.training for m in net.modules()] == modes
    assert [m.training for m in chosen.modules() if not _new(m)] == modes
    assert torch.equal(chosen.eval()(IMAGES), net.eval()(IMAGES))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert cost.parameters(chosen) == cost.parameters(net)


def _new(module: nn.Module) -> bool:
    return isinstance(module, ChannelSelection) or hasattr(module, "select")


# -- mask = shrink ----------------------------------------------------------------------------------------------------


def test_mask_is_shrink_by_hand() -> None:
    """Two channels in the stream; the block reads the second alone, and the sum still has both."""
    block = PreActivationBottleneck(2, 1, 2, 1, nn.Identity())
    net = randomised(nn.Sequential(nn.Conv2d(3, 2, 1), block, nn.Flatten(), nn.Linear(128, 7)))
    space = ChannelSpace(with_channel_selection(net, IMAGES), IMAGES)
    small = assert_mask_is_shrink(space, space.plan({"1.bn1.select": [1]}), IMAGES)
    with torch.inference_mode():
        stream = net[0](IMAGES)
        norm = block.bn1
        scaled = (stream[:, 1:] - norm.running_mean[1]) / (norm.running_var[1] + norm.eps).sqrt()
        read = F.relu(scaled * norm.weight[1] + norm.bias[1])
        branch = F.conv2d(read, block.conv1.weight[:, 1:])
        branch = block.conv3(F.relu(block.bn3(block.conv2(F.relu(block.bn2(branch))))))
        assert_same(small[1](stream), stream + branch)


@pytest.mark.parametrize("name", NETS)
def test_mask_is_shrink_for_random_plans(name: str) -> None:
    space = ChannelSpace(with_channel_selection(network(name), IMAGES), IMAGES)
    single = space.plan({group.name: [group.size - 1] for group in space.groups})
    for plan in (space.plan({}), single, random_plan(space, 0), random_plan(space, 1)):
        assert_mask_is_shrink(space, plan, IMAGES)


@pytest.mark.parametrize("name", ["resnet164", "densenet40"])
def test_mask_is_shrink_in_the_papers_networks(name: str) -> None:
    space = ChannelSpace(with_channel_selection(network(name), IMAGES), IMAGES)
    assert_mask_is_shrink(space, random_plan(space, 0), IMAGES)


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_mask_is_shrink_for_random_dense_blocks(layers: int, stem: int, growth: int, seed: int) -> None:
    block = [DenseLayer(stem + i * growth, growth) for i in range(layers)]
    width = stem + layers * growth
    head = (nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 7))
    net = randomised(nn.Sequential(nn.Conv2d(3, stem, 3), *block, *head), seed)
    space = ChannelSpace(with_channel_selection(net, IMAGES), IMAGES)
    assert [group.size for group in space.groups] == [stem + i * growth for i in range(layers + 1)]
    assert_mask_is_shrink(space, random_plan(space, seed), IMAGES)


@pytest.mark.parametrize("name", NETS)
def test_a_cut_network_can_be_cut_again(name: str) -> None:
    """A second cut counts the channels that the first has left; the indices still point into the whole stream."""
    space = ChannelSpace(with_channel_selection(network(name), IMAGES), IMAGES)
    first = random_plan(space, 2)
    again = ChannelSpace(space.shrink(first), IMAGES)
    assert {group.name: group.size for group in again.groups} == first.widths
    second = random_plan(again, 3)
    small = assert_mask_is_shrink(again, second, IMAGES)
    both = space.plan({name: [first.keep[name][i] for i in kept] for name, kept in second.keep.items()})
    with torch.inference_mode():
        assert_same(small(IMAGES), space.mask(both)(IMAGES))


def test_the_small_network_trains_as_the_masked_one_does() -> None:
    space = ChannelSpace(with_channel_selection(network("preresnet20"), IMAGES), IMAGES)
    plan = random_plan(space, 0)
    masked, small = space.mask(plan).train(), space.shrink(plan).train()
    for net in (masked, small):
        F.cross_entropy(net(IMAGES), torch.tensor([0, 3])).backward()
    gradients = space.cut(plan, {name: p.grad for name, p in masked.named_parameters()})
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-9)
