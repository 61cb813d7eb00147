"""The criteria against sums written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunelab import scores
from prunelab.models import build
from prunelab.structure import ChannelSpace, ColumnSpace

EXAMPLE = torch.zeros(1, 1, 8, 8)


def two_layers() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(128, 2))
    net[0].weight.data = torch.tensor([[3.0], [-4.0]]).view(2, 1, 1, 1)
    net[1].weight.data = torch.tensor([[3.0, -4.0], [-6.0, 8.0]]).view(2, 2, 1, 1)
    return net


def as_lists(found: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {group: values.tolist() for group, values in found.items()}


def test_norms_of_filters_and_of_columns() -> None:
    filters, columns = ChannelSpace(two_layers(), EXAMPLE), ColumnSpace(two_layers(), EXAMPLE)
    assert as_lists(scores.l1(filters)) == {"0": [3, 4], "1": [7, 14]}
    assert as_lists(scores.l2(filters)) == {"0": [3, 4], "1": [5, 10]}
    assert as_lists(scores.l1(columns)) == {"0": [7], "1": [9, 12]}


def test_several_writers_of_a_unit_add_up() -> None:
    net = build("resnet20", shape=(1, 8, 8), seed=0)
    space = ChannelSpace(net, EXAMPLE)
    writers = [net.conv, *(block.conv2 for block in net.stage1)]
    expected = sum(conv.weight.detach().abs().sum((1, 2, 3)) for conv in writers)
    for stage, first in ((net.stage2, 8), (net.stage3, 24)):  # zero-padded shortcuts: 16 channels amid 32, amid 64
        expected += sum(block.conv2.weight.detach().abs().sum((1, 2, 3))[first : first + 16] for block in stage)
    torch.testing.assert_close(space.scores("l1")["conv"], expected)


def test_bn_scale_is_the_size_of_gamma() -> None:
    net = build("convnet-bn", shape=(1, 8, 8), seed=0)
    nn.init.normal_(net.bn2.weight, generator=torch.Generator().manual_seed(0))
    found = ChannelSpace(net, EXAMPLE).scores("bn_scale")
    assert torch.equal(found["conv2"], net.bn2.weight.detach().abs())
    assert torch.equal(found["conv1"], torch.ones(32))


def test_bn_scale_adds_the_norms_of_a_sum() -> None:
    net = build("resnet20", shape=(1, 8, 8), seed=0)
    generator = torch.Generator().manual_seed(0)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight, generator=generator)
    found = ChannelSpace(net, EXAMPLE).scores("bn_scale")
    assert torch.equal(found["stage1.1.conv1"], net.stage1[1].bn1.weight.detach().abs())
    expected = net.bn.weight.detach().abs()
    for stage, first in ((net.stage1, 0), (net.stage2, 8), (net.stage3, 24)):
        for block in stage:
            expected += block.bn2.weight.detach().abs()[first : first + 16]
    assert torch.equal(found["conv"], expected)  # added up in this order, in every process alike


def test_bn_scale_refuses_what_no_norm_scales() -> None:
    bare = ChannelSpace(build("convnet", shape=(1, 8, 8), seed=0), EXAMPLE)
    with pytest.raises(ValueError, match=r"batch norm with a scale .* none follows conv1, conv2, conv3"):
        bare.scores("bn_scale")
    with pytest.raises(ValueError, match="this space has columns"):
        ColumnSpace(build("convnet-bn", shape=(1, 8, 8), seed=0), EXAMPLE).scores("bn_scale")
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(ValueError, match="none follows 0"):
        ChannelSpace(plain, EXAMPLE).scores("bn_scale")


def test_random_scores_repeat_with_their_seed() -> None:
    space = ChannelSpace(build("convnet-bn", shape=(1, 8, 8), seed=0), EXAMPLE)
    first, again, other = (space.scores(scores.random(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[g.name], again[g.name]) for g in space.groups)
    assert not any(torch.equal(first[g.name], other[g.name]) for g in space.groups)
    assert not torch.equal(first["conv1"], first["conv2"])


def test_unknown_criterion_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'l3'.*'l1', 'l2', 'bn_scale', 'random'"):
        scores.named("l3")


def test_looking_at_maps_leaves_the_network_as_it_was() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu() / torch.tensor(2.0))  # which torch.fx keeps as an attribute

    net = Halved()
    space = ChannelSpace(net, torch.zeros(1, 1, 6, 6))
    before = set(vars(net))
    space.scores(scores.feature_rank(torch.randn(2, 1, 6, 6)))
    assert set(vars(net)) == before
