"""Unstructured lottery tickets: which weights go, where the rest starts again, and that what is gone stays gone."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from prunelab.data import load
from prunelab.lottery import Masked, convolutions, redrawn, smallest_removed, ticket
from prunelab.methods import METHODS
from prunelab.models import build
from prunelab.training import Recipe, fit


def two_layers() -> nn.Sequential:
    """Two convolutions of hand-chosen weights and a linear layer, which is not pruned."""
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1), nn.Flatten(), nn.Linear(4, 2))
    net[0].weight.data = torch.tensor([0.5, -3.0, 0.1]).view(3, 1, 1, 1)
    net[2].weight.data = torch.tensor([-0.2, 4.0, 1.0]).view(1, 3, 1, 1)
    return net


def kept(masks: dict[str, Tensor] | object) -> list[list[bool]]:
    assert isinstance(masks, dict)
    return [mask.flatten().tolist() for mask in masks.values()]


def test_one_threshold_for_all_convolutions_and_rounds_that_compound() -> None:
    net = two_layers()
    once = smallest_removed(net, 0.5)
    assert list(once) == ["0.weight", "2.weight"]
    assert kept(once) == [[False, True, False], [False, True, True]]  # 0.1, -0.2 and 0.5 go
    assert kept(smallest_removed(net, 0.7, once)) == [[False] * 3, [False, True, False]]  # ⌊0.7·3⌋ more: 1 and -3
    assert kept(smallest_removed(net, 0)) == [[True] * 3] * 2


@given(
    weights=st.lists(st.integers(-9, 9), min_size=8, max_size=8),
    ratios=st.lists(st.integers(0, 99), min_size=1, max_size=3),
)
def test_counts_are_exact_and_nothing_smaller_stays(weights: list[int], ratios: list[int]) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1))
    net[0].weight.data = torch.tensor(weights[:4], dtype=torch.float32).view(4, 1, 1, 1)
    net[1].weight.data = torch.tensor(weights[4:], dtype=torch.float32).view(1, 4, 1, 1)
    masks, left = None, 8
    for percent in ratios:
        masks = smallest_removed(net, percent / 100, masks)
        left -= int(left * Fraction(percent, 100))
        flat = torch.cat([mask.flatten() for mask in masks.values()])
        assert flat.sum() == left
        sizes = torch.tensor(weights, dtype=torch.float32).abs()
        assert (~flat).sum() == 0 or sizes[~flat].max() <= sizes[flat].min()


def test_a_ticket_is_the_first_network_but_for_the_mask() -> None:
    initial = build("convnet-bn", shape=(1, 8, 8), seed=0)
    trained = build("convnet-bn", shape=(1, 8, 8), seed=1)
    masks = smallest_removed(trained, 0.6)
    found = ticket(initial, masks)
    before = initial.state_dict()
    for name, tensor in found.state_dict().items():
        stays = masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
        assert torch.equal(tensor[stays], before[name][stays])
        assert (tensor[~stays] == 0).all()


def test_the_control_is_drawn_for_the_fan_out_that_is_left() -> None:
    initial = build("vgg11", seed=0, width=0.5)
    masks = smallest_removed(build("vgg11", seed=1, width=0.5), 0.75)
    found = redrawn(initial, masks, seed=0)
    for name, weight in convolutions(found).items():
        left = int(masks[name].sum())
        if left > 3000:
            assert weight[masks[name]].std().item() == pytest.approx(math.sqrt(2 * weight.shape[1] / left), rel=0.03)
        assert (weight[~masks[name]] == 0).all()
    assert torch.equal(found.linear.weight, initial.linear.weight)
    again, other = redrawn(initial, masks, seed=0), redrawn(initial, masks, seed=1)
    assert torch.equal(found.conv3.weight, again.conv3.weight)
    assert not torch.equal(found.conv3.weight[masks["conv3.weight"]], other.conv3.weight[masks["conv3.weight"]])


def test_masked_weights_are_exactly_zero_after_training_and_the_others_move() -> None:
    images = load("digits")
    net = build("convnet-bn", shape=images.shape, seed=0)
    masks = smallest_removed(net, 0.8)
    start = copy.deepcopy(net)
    recipe = Recipe(epochs=1, lr=0.1, batch_size=64)
    fit(net, images, recipe, seed=0, hook=Masked(masks), progress=False)
    for name, weight in convolutions(net).items():
        assert (weight[~masks[name]] == 0).all()
        assert (weight != convolutions(start)[name])[masks[name]].float().mean() > 0.9
        assert (weight[masks[name]] != 0).all()
    # what the mask removes has no influence: another start there gives the same network
    for name, weight in convolutions(start).items():
        weight.masked_fill_(~masks[name], 7.0)
    fit(start, images, recipe, seed=0, hook=Masked(masks), progress=False)
    assert all(torch.equal(tensor, start.state_dict()[name]) for name, tensor in net.state_dict().items())


def test_a_weight_that_passes_through_zero_is_not_lost() -> None:
    images = load("digits")
    net = build("convnet-bn", shape=images.shape, seed=0)
    masks = smallest_removed(net, 0)
    convolutions(net)["conv2.weight"][:, ::2] = 0
    fit(net, images, Recipe(epochs=0.2, lr=0.1, batch_size=64), seed=0, hook=Masked(masks), progress=False)
    assert (convolutions(net)["conv2.weight"] != 0).float().mean() > 0.9


@pytest.mark.parametrize("ratio", [1.0, -0.1])
def test_illegal_input_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"ratio is {ratio}; it must be .*\[0, 1\)"):
        smallest_removed(two_layers(), ratio)
    with pytest.raises(ValueError, match="Linear has no convolution"):
        smallest_removed(nn.Linear(2, 2), 0.5)


def test_tickets_of_single_weights_are_no_method_that_meets_a_budget() -> None:
    assert "lottery" not in METHODS
