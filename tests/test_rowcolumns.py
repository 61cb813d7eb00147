"""Filters and columns in one space: columns that go with their channel, the exact cut, and budgets."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_channels import TINY, assert_mask_is_shrink, network, plans, tiny
from torch import nn
from torch.optim import SGD

from prunelab import cost, models
from prunelab.layers import ColumnConv2d
from prunelab.structure import Budget, ChannelSpace, ColumnSpace, Plan, RowColumnSpace

NETWORKS = ["convnet", "vgg11", "resnet20", "alexnet", "mobilenet_v2"]


@pytest.fixture(scope="module")
def convnet() -> RowColumnSpace:
    return RowColumnSpace(models.build("convnet-bn", seed=0), torch.zeros(1, 3, 32, 32))


def two_layers() -> RowColumnSpace:
    """Two channels read an image of one; two filters read them, three weights a row each."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, (1, 3)), nn.Flatten(), nn.Linear(8, 2))
    return RowColumnSpace(net, torch.zeros(1, 1, 2, 4))


# -- the units ---------------------------------------------------------------------------------------------------------


def test_groups_are_those_of_the_two_spaces(convnet: RowColumnSpace) -> None:
    assert [(group.name, group.size) for group in convnet.groups] == [
        ("conv1", 32), ("conv2", 32), ("conv3", 64), ("conv1 columns", 75), ("conv2 columns", 800),
        ("conv3 columns", 800),
    ]  # fmt: skip
    assert torch.equal(convnet.unit_weights("conv2"), convnet.rows.unit_weights("conv2"))
    assert torch.equal(convnet.unit_weights("conv2 columns"), convnet.columns.unit_weights("conv2"))
    with pytest.raises(ValueError, match="unknown groups"):
        convnet.unit_weights("conv4 columns")


def test_depthwise_convolutions_have_no_columns() -> None:
    net, x = network("mobilenet_v2")
    space = RowColumnSpace(net, x)
    grouped = {name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    plain = {name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}
    assert grouped
    assert {group.name for group in space.groups[len(space.rows.groups) :]} == {f"{name} columns" for name in plain}


def test_the_gate_of_a_weight_is_its_filters_times_its_columns() -> None:
    space = two_layers()
    kernel = space.net[2].weight.detach().clone()
    gates = torch.tensor([1, 1, 0.5, 1, 1, 1, 2, 3, 4, 5, 6])  # filters of 0, of 2; columns of 0, of 2
    net = nn.Sequential(*space.net)
    space.apply_gates(net, gates)
    expected = kernel * torch.tensor([0.5, 1]).view(2, 1, 1, 1) * gates[-6:].view(1, 2, 1, 3)
    torch.testing.assert_close(net[2].weight.detach(), expected)


# -- columns go with their channel ------------------------------------------------------------------------------------


def test_a_plan_keeps_no_column_of_a_removed_channel() -> None:
    plan = two_layers().plan({"0": [1], "2 columns": [0, 2, 3, 5]})
    assert plan.keep == {"0": (1,), "2": (0, 1), "0 columns": (0,), "2 columns": (3, 5)}


def test_a_convolution_left_without_columns_keeps_the_first_it_can() -> None:
    plan = two_layers().plan({"0": [1], "2 columns": [0, 1, 2]})
    assert plan.keep["2 columns"] == (3,)


def test_columns_of_the_image_always_can_stay(convnet: RowColumnSpace) -> None:
    assert convnet.plan({"conv1": [3]}).widths["conv1 columns"] == 75


def test_a_plan_with_columns_of_removed_channels_is_refused() -> None:
    space = two_layers()
    made = Plan("rows+columns", dict(space.plan({}).sizes), {**space.plan({}).keep, "0": (1,)})
    for use in (space.shrink, space.mask, space.macs, space.check):
        with pytest.raises(ValueError, match="keeps columns of removed channels"):
            use(made)


def test_plans_of_other_spaces_are_refused(convnet: RowColumnSpace) -> None:
    for other in (convnet.rows, convnet.columns):
        with pytest.raises(ValueError, match="does not fit this network"):
            convnet.shrink(other.plan({}))


# -- the cut -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_masked_and_small_network_agree(name: str) -> None:
    net, x = network(name)
    space = RowColumnSpace(net, x)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    names = [group.name for group in space.groups]
    filters, columns = names[: len(space.rows.groups)], names[len(space.rows.groups) :]
    last = {group.name: [group.size - 1] for group in space.groups}
    cuts = plans(space) | {
        "last columns only": space.plan({name: last[name] for name in columns}),
        "columns of what is gone": space.plan({name: [0] for name in columns} | {name: last[name] for name in filters}),
    }
    del cuts["everything"], cuts["one unit"], cuts["uneven"]
    for plan in cuts.values():
        assert_mask_is_shrink(space, x, plan)
        assert space.plan(plan.keep) == plan
    assert space.parameters(plan) == cost.parameters(space.shrink(plan))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("case", TINY)
@torch.no_grad()
def test_additions_concatenations_and_groups_are_exact(case: str) -> None:
    net, x = tiny(case)
    space = RowColumnSpace(net, x)
    for plan in plans(space).values():
        assert_mask_is_shrink(space, x, plan)
        assert space.parameters(plan) == cost.parameters(space.shrink(plan))


@settings(max_examples=30)
@given(st.data())
@torch.no_grad()
def test_any_plan_of_a_small_network_is_exact(data: st.DataObject) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, (2, 1), padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 2),
    ).double().eval()  # fmt: skip
    x = torch.randn(2, 2, 4, 5, dtype=torch.double)
    space = RowColumnSpace(net, x)
    keep = {g.name: data.draw(st.sets(st.integers(0, g.size - 1), min_size=1)) for g in space.groups}
    plan = space.plan({name: sorted(kept) for name, kept in keep.items()})
    small = space.shrink(plan)
    torch.testing.assert_close(small(x), space.mask(plan)(x), rtol=0, atol=1e-9)
    assert space.macs(plan) == cost.macs(small, x)
    # Without columns the same filters cost more, and without filters the same columns.
    assert space.macs(plan) <= min(
        space.rows.macs(space._row_plan(plan)), space.macs({n: len(k) for n, k in keep.items()})
    )


def test_kernels_are_cut_to_rows_and_columns(convnet: RowColumnSpace) -> None:
    plan = convnet.plan({"conv1": [0, 5], "conv2": [1, 3, 9], "conv2 columns": [24, 25, 126, 130]})
    small = convnet.shrink(plan)
    kernel = convnet.net.conv2.weight.detach().flatten(1)
    assert plan.keep["conv2 columns"] == (24, 126, 130)  # column 25 reads channel 1
    assert isinstance(small.conv2, ColumnConv2d)
    assert torch.equal(small.conv2.weight, kernel[[1, 3, 9]][:, [24, 126, 130]])
    assert small.conv2.columns.tolist() == [24, 26, 30]  # channel 5 is now channel 1
    assert [type(small.get_submodule(f"conv{i}")) for i in (1, 3)] == [nn.Conv2d, nn.Conv2d]
    # 32² outputs of 2 filters, 16² of 3 filters over 3 columns, 8² of 64 over 3 channels, 1024 features to 10 classes
    assert convnet.macs(plan) == 32**2 * 2 * 75 + 16**2 * 3 * 3 + 8**2 * 64 * 75 + 10 * 1024


def test_widths_say_what_can_stay(convnet: RowColumnSpace) -> None:
    widths = convnet.widths({"conv1": 8, "conv3 columns": 30})
    assert widths.tolist() == [8, 32, 64, 75, 200, 30]
    assert convnet.macs({"conv1": 8}) == convnet.rows.macs({"conv1": 8})


@pytest.mark.parametrize("model", ["convnet", "resnet20"])
def test_training_goes_on_as_if_nothing_had_happened(model: str) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(8, 1, 8, 8, dtype=torch.double), torch.randint(10, (8,))
    net = models.build(model, shape=(1, 8, 8), seed=0, width=0.5).double().train()
    whole = RowColumnSpace(net, images)
    plan = whole.plan_for(whole.scores("random"), [0.5] * len(whole.groups))
    masked = whole.mask(plan)
    space = RowColumnSpace(masked, images)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()

    optimizer, twin = (SGD(masked.parameters(), lr=0.05, momentum=0.9, nesterov=True) for _ in range(2))
    for _ in range(2):
        step(masked, optimizer)
        space.apply_gates(masked, space.gates(plan))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    small = space.shrink(plan).train()
    carried = space.carry(plan, optimizer, small)
    step(small, carried)
    step(masked, twin)
    expected = space.cut(plan, dict(masked.named_parameters()))
    for key, value in small.named_parameters():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12)


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("criterion", ["l2", "random"])
@pytest.mark.parametrize("name", ["convnet-bn", "resnet20"])
def test_a_budget_is_used_up_to_a_percent(name: str, criterion: str, ranking: str) -> None:
    space = RowColumnSpace(models.build(name, seed=0), torch.zeros(1, 3, 32, 32))
    scores = space.scores(criterion)
    for fraction in (0.75, 0.5, 0.25, 0.125):
        plan = space.plan_for(scores, Budget(fraction, "conv"), ranking)
        assert fraction - 0.01 < space.macs(plan, "conv") / space.macs(scope="conv") <= fraction
    for budget in (Budget(0.3), Budget(parameters=0.3)):
        spent = space.spent(budget)(space.widths(space.plan_for(scores, budget, ranking)))
        assert 0.29 < spent <= 0.3


def test_what_stays_within_a_budget_is_the_best_there_is(convnet: RowColumnSpace) -> None:
    """Filters are the best of their layer, and columns the best of those that can be read."""
    scores = convnet.scores("random")
    plan = convnet.plan_for(scores, Budget(0.3, "conv"))
    for i in (1, 2, 3):
        score = scores[f"conv{i}"]
        assert sorted(plan.keep[f"conv{i}"]) == sorted(score.topk(plan.widths[f"conv{i}"]).indices.tolist())
    for i in (2, 3):
        readable = [25 * c + k for c, k in itertools.product(plan.keep[f"conv{i - 1}"], range(25))]
        score = scores[f"conv{i} columns"][readable]
        best = score.topk(plan.widths[f"conv{i} columns"]).indices
        assert sorted(plan.keep[f"conv{i} columns"]) == sorted(np.array(readable)[best].tolist())


def test_a_budget_removes_filters_and_columns_alike(convnet: RowColumnSpace) -> None:
    """With one ranking per layer, filters and columns that can be read lose the same share."""
    scores = {
        group.name: torch.rand(group.size, generator=torch.Generator().manual_seed(0)) for group in convnet.groups
    }
    plan = convnet.plan_for(scores, Budget(0.25, "conv"))
    filters = np.array([plan.widths[f"conv{i}"] / plan.sizes[f"conv{i}"] for i in (1, 2, 3)])
    columns = np.array([plan.widths[f"conv{i} columns"] / (25 * plan.widths[f"conv{i - 1}"]) for i in (2, 3)])
    # The share f solves 0.2·f·f + 0.8·f·f·f = 1/4: 0.608.
    assert np.abs(filters - 0.608).max() < 0.04
    assert np.abs(columns - 0.608).max() < 0.04


def test_a_budget_of_columns_alone_leaves_the_filters(convnet: RowColumnSpace) -> None:
    scores = {
        **convnet.scores("random"),
        **{f"conv{i}": torch.full((n,), torch.inf) for i, n in ((1, 32), (2, 32), (3, 64))},
    }
    plan = convnet.plan_for(scores, Budget(0.25, "conv"))
    columns = ColumnSpace(convnet.net, torch.zeros(1, 3, 32, 32))
    same = columns.plan_for({f"conv{i}": scores[f"conv{i} columns"] for i in (1, 2, 3)}, Budget(0.25, "conv"))
    assert plan.widths["conv3"] == 64
    for i in (1, 2, 3):
        assert abs(plan.widths[f"conv{i} columns"] - same.widths[f"conv{i}"]) <= 1


def test_a_budget_below_what_must_stay_is_refused(convnet: RowColumnSpace) -> None:
    with pytest.raises(ValueError, match="cannot be met"):
        convnet.plan_for(convnet.scores("l1"), Budget(1e-5, "conv"))


def test_shares_are_counts_of_readable_columns(convnet: RowColumnSpace) -> None:
    plan = convnet.plan_for(convnet.scores("l1"), {"conv1": 8, "conv2 columns": 150, "conv3 columns": 0.5})
    assert plan.widths == {
        "conv1": 8, "conv2": 32, "conv3": 64, "conv1 columns": 75, "conv2 columns": 150, "conv3 columns": 400,
    }  # fmt: skip
    assert convnet.plan_for(convnet.scores("l1"), {"conv1": 2, "conv2 columns": 0.5}).widths["conv2 columns"] == 50


def test_a_plan_has_no_choice_of_columns_whose_channel_goes() -> None:
    space = two_layers()
    readable = space.readable(space.plan({"0": [1], "2": [0], "2 columns": [4]}))
    assert readable.tolist() == [True] * 5 + [False] * 3 + [True] * 3


def test_filters_that_nothing_reads_by_columns_cut_as_channels_do() -> None:
    """With all columns of the channels left, the space is that of channels."""
    net, x = network("vgg11")
    space, channels = RowColumnSpace(net, x), ChannelSpace(net, x)
    keep = {group.name: list(range(max(1, group.size // 2))) for group in channels.groups}
    small, same = space.shrink(space.plan(keep)), channels.shrink(channels.plan(keep))
    assert small.state_dict().keys() == same.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), same.state_dict().values(), strict=True))
