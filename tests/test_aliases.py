"""Modules that a network knows by several names: they are counted once, and replaced under all of their names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from test_channels import assert_mask_is_shrink, assert_same, conv, plans, randomise
from torch import Tensor, nn

from prunelab import cost, deploy
from prunelab.layers import ChannelSelection
from prunelab.layerwise import with_samplers
from prunelab.methods.base import SPACES
from prunelab.methods.dmcp import Chains, Supernet
from prunelab.methods.slimming import with_channel_selection
from prunelab.structure import BlockSpace, ChannelSpace

X = torch.randn(2, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Backbone(nn.Module):
    """A backbone that is taken apart again: what runs are the second names."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 6, bias=False), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4))
        self.stage, self.rest = self.backbone[:3], self.backbone[3:]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rest(self.stage(x))
        return y


class PreActivation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv1, self.conv2 = nn.BatchNorm2d(width), conv(width, width), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv2(F.relu(self.conv1(F.relu(self.norm(x)))))
        return y


class Residual(nn.Module):
    """Blocks in a list and in the sequence that runs, and layers of them in another list, in front of both."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [PreActivation(6) for _ in range(3)]
        self.norms = nn.ModuleList(block.norm for block in blocks)
        self.convs = nn.ModuleList(block.conv1 for block in blocks)
        self.blocks = nn.ModuleList(blocks)
        self.body = nn.Sequential(conv(3, 6), *self.blocks, nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


NETS = {"backbone": Backbone, "residual": Residual}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", NETS)
def test_counting_leaves_the_network_as_it_was(name: str) -> None:
    net = randomise(NETS[name]())
    before, parameters = copy.deepcopy(net.state_dict()), [*net.parameters()]
    cost.breakdown(net, X)
    assert all(after is parameter for after, parameter in zip(net.parameters(), parameters, strict=True))
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_counts_are_those_of_the_same_network_with_one_name_each() -> None:
    net = Residual()
    assert cost.macs(net, X.float()) == cost.macs(net.body, X.float()) == (2 * 3 * 6 * 6 + 3 * 6 + 6 * 4) * 9 * 9 * 7
    tied = nn.Sequential(nn.Linear(7, 7, bias=False), nn.Linear(7, 7, bias=False))
    tied[1].weight = tied[0].weight
    assert cost.macs(tied, X.float()) == 2 * 7 * 7 * 3 * 9
    assert tied[1].weight is tied[0].weight


@pytest.mark.parametrize("kind", SPACES)
def test_masked_and_small_network_agree(kind: str) -> None:
    space = SPACES[kind](randomise(Residual()), X)
    if isinstance(space, BlockSpace):
        names = [group.name for group in space.groups]
        for gone in (names[:1], names[::2], names):
            plan = space.plan({name: [] for name in gone})
            small = space.shrink(plan).eval()
            assert_same(small(X), space.mask(plan).eval()(X))
            assert space.macs(plan) == cost.macs(small, X)
    else:
        for plan in plans(space).values():
            assert_mask_is_shrink(space, X, plan)


@pytest.mark.parametrize("name", NETS)
def test_batch_norm_is_folded_under_every_name(name: str) -> None:
    net = randomise(NETS[name]()).eval()
    assert_same(deploy.fold_batch_norm(net)(X), net(X))


@pytest.mark.parametrize("insert", [with_channel_selection, with_samplers])
def test_what_is_inserted_runs(insert: Callable[[nn.Module, Tensor], nn.Module]) -> None:
    net = randomise(Residual())
    changed = insert(net, X)
    names = [n for n, m in changed.named_modules(remove_duplicate=False) if isinstance(m, ChannelSelection)]
    for place in ("norms.", "blocks.", "body.") if insert is with_channel_selection else ("convs.", "blocks.", "body."):
        assert any(name.startswith(place) for name in names)
    assert_same(changed.eval()(X), net.eval()(X))
    space, plain = ChannelSpace(changed, X), ChannelSpace(net, X)
    assert len(space.groups) > len(plain.groups)  # what a block reads of the stream is now a choice of its own
    for plan in plans(space).values():
        assert_mask_is_shrink(space, X, plan)


@pytest.mark.parametrize("name", NETS)
def test_gates_act_under_every_name(name: str) -> None:
    space = ChannelSpace(randomise(NETS[name]()), X)
    supernet, whole = Supernet(space), torch.ones(int(space.sizes.sum()), dtype=torch.float64)
    torch.testing.assert_close(supernet.gated(X, whole), space.net(X).float())
    chains = Chains(space.sizes)
    narrow = chains.prefix(chains.widths[:, 0])
    assert not torch.allclose(supernet.gated(X, narrow), supernet.gated(X, whole))
    assert all(isinstance(parameter, nn.Parameter) for parameter in space.net.parameters())
