"""Optimisers that go on after the network was shrunk."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, Adam, AdamW, Optimizer, RMSprop

from prunelab import models
from prunelab.structure import ChannelSpace, ColumnSpace

OPTIMISERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: AdamW(p, lr=0.01),
    "RMSprop": lambda p: RMSprop(p, lr=0.001, momentum=0.5, centered=True),
    "groups": lambda p: SGD([{"params": p[:2], "lr": 0.1}, {"params": p[2:]}], lr=0.01, momentum=0.5),
}


def step(net: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()


@pytest.mark.parametrize("unit", [ChannelSpace, ColumnSpace])
@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("model", ["convnet", "resnet20"])
def test_training_goes_on_as_if_nothing_had_happened(
    unit: type[ChannelSpace] | type[ColumnSpace], name: str, model: str
) -> None:
    """After two steps and the cut, the third step changes what is left as it does in the masked network."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 1, 8, 8, dtype=torch.double), torch.randint(10, (8,))
    net = models.build(model, shape=(1, 8, 8), seed=0, width=0.5).double().train()
    plan = unit(net, images).plan_for(unit(net, images).scores("random"), [0.5] * len(unit(net, images).groups))
    masked = unit(net, images).mask(plan)
    space = unit(masked, images)
    optimizer = OPTIMISERS[name](list(masked.parameters()))
    for _ in range(2):
        step(masked, optimizer, images, labels)
        space.apply_gates(masked, space.gates(plan))

    small = space.shrink(plan).train()
    again = copy.deepcopy(optimizer.state_dict())
    carried = space.carry(plan, optimizer, small)
    step(small, carried, images, labels)

    fresh = OPTIMISERS[name](list(masked.parameters()))  # the old one refuses; this is its twin
    fresh.load_state_dict(again)
    step(masked, fresh, images, labels)
    expected = space.cut(plan, dict(masked.named_parameters()))
    for key, value in small.named_parameters():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unit", [ChannelSpace, ColumnSpace])
def test_what_is_carried_is_a_copy(unit: type[ChannelSpace] | type[ColumnSpace]) -> None:
    """Of what the plan leaves whole, and of step counts, the new optimiser has its own."""
    net, images = models.build("convnet", shape=(1, 8, 8), seed=0), torch.zeros(2, 1, 8, 8)
    optimizer = Adam(net.parameters())
    step(net, optimizer, images, torch.tensor([0, 1]))
    space = unit(net, images)
    plan = space.plan({space.groups[0].name: [0]})
    carried = [space.carry(plan, optimizer, space.shrink(plan)) for _ in range(2)]
    states = [[value for state in o.state.values() for value in state.values()] for o in (optimizer, *carried)]
    places = [value.data_ptr() for state in states for value in state]
    assert len(set(places)) == len(places) == 3 * 3 * len(list(net.parameters()))


def test_weights_shared_by_layers_carry_their_state_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)
            self.b.weight = self.c.weight
            self.d = nn.Conv2d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:  # c runs before b, which is registered first
            return self.d(self.c(self.a(x)) + self.b(self.a(x))).mean((2, 3))

    net, images = Twice(), torch.ones(2, 1, 3, 3)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    step(net, optimizer, images, torch.tensor([0, 1]))
    space = ChannelSpace(net, images)
    plan = space.plan({"a": [0, 2], "c": [1, 3, 4]})
    small = space.shrink(plan)
    torch.testing.assert_close(small(images), space.mask(plan)(images))
    carried = space.carry(plan, optimizer, small)
    momentum = optimizer.state[net.b.weight]["momentum_buffer"]
    assert torch.equal(carried.state[small.b.weight]["momentum_buffer"], momentum[[1, 3, 4]][:, [0, 2]])
    step(small, carried, images, torch.tensor([0, 1]))
    assert small.b.weight is small.c.weight


def test_a_stale_optimiser_refuses_to_step() -> None:
    net = models.build("convnet", shape=(1, 8, 8), seed=0)
    space = ChannelSpace(net, torch.zeros(1, 1, 8, 8))
    plan = space.plan_for(space.scores("l1"), [0.5] * len(space.groups))
    optimizer = SGD(net.parameters(), lr=0.1)
    before = [parameter.clone() for parameter in net.parameters()]
    space.carry(plan, optimizer, space.shrink(plan))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match="step the one `carry` returned"):
        optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


def test_an_optimiser_of_another_network_is_refused() -> None:
    net, other = (models.build("convnet", shape=(1, 8, 8), seed=seed) for seed in (0, 1))
    space = ChannelSpace(net, torch.zeros(1, 1, 8, 8))
    plan = space.plan({})
    with pytest.raises(ValueError, match="not this network's"):
        space.carry(plan, SGD(other.parameters(), lr=0.1), space.shrink(plan))


def test_what_cannot_be_carried_is_named() -> None:
    images, labels = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    net = models.build("convnet", shape=(1, 8, 8), seed=0).train()
    space = ChannelSpace(net, images)
    plan, other = (space.plan_for(space.scores("l1"), [share] * 3) for share in (0.5, 0.25))
    small = space.shrink(plan)
    adafactor, momentum = Adafactor(net.parameters()), SGD(net.parameters(), lr=0.01)
    step(net, adafactor, images, labels)
    with pytest.raises(ValueError, match=r"Adafactor cannot be carried: its 'row_var' of 'conv1\.weight'"):
        space.carry(plan, adafactor, small)
    lbfgs = LBFGS(net.parameters())
    lbfgs.step(lambda: F.cross_entropy(net(images), labels))
    with pytest.raises(ValueError, match="LBFGS cannot be carried"):
        space.carry(plan, lbfgs, small)
    for wrong in (net, space.shrink(other)):
        with pytest.raises(ValueError, match=r"small is not what shrink\(plan\) returns: its 'conv1\.weight' would be"):
            space.carry(plan, momentum, wrong)
    with pytest.raises(ValueError, match=r"; it must be a torch\.optim\.Optimizer"):
        space.carry(plan, small, momentum)  # type: ignore[arg-type]
