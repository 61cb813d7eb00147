"""SSL against its acceptance list: the groups, the two updates, λ from a budget, and what can be cut."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from prunelab import cost, data, models
from prunelab.methods import build
from prunelab.methods.ssl import (
    REFRESH,
    STRUCTURES,
    UNITS,
    ZERO,
    Pressure,
    Term,
    add_subgradient,
    penalised,
    penalty,
    root_of_size,
    soft_threshold,
    unit_norms,
)
from prunelab.structure import BlockSpace, Budget, ChannelSpace, ColumnSpace, RowColumnSpace, Space
from prunelab.training import Context, Recipe, State, fit

RECIPE = Recipe(epochs=2, lr=0.03, batch_size=64)
HALF = Budget(macs=0.5, scope="conv")


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits")


@pytest.fixture(scope="module")
def convnet(digits: data.Data) -> nn.Module:
    return models.build("convnet-bn", shape=digits.shape, seed=0, width=0.5).eval()


def term(weight: Tensor, structure: str, multiplier: float = 1.0) -> Term:
    groups = [1 if dim in STRUCTURES[structure] else size for dim, size in enumerate(weight.shape)]
    return Term(weight, structure, multiplier, torch.arange(math.prod(groups)).view(groups))


def kernel(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


# -- the penalty -------------------------------------------------------------------------------------------------------


def test_groups_by_hand() -> None:
    """Two filters of two channels of two weights: [[3 4 | 0 0], [0 0 | 5 12]]."""
    weight = Tensor([[[[3, 4]], [[0, 0]]], [[[0, 0]], [[5, 12]]]])
    for structure, norms in {
        "filters": [5, 13],
        "channels": [5, 13],
        "columns": [3, 4, 5, 12],
        "2-D filters": [5, 0, 0, 13],
        "layers": [math.sqrt(194)],
    }.items():
        assert term(weight, structure).norms().flatten().tolist() == pytest.approx(norms)
    two = [term(weight, "filters", 2.0), term(weight, "columns", 0.5)]
    assert penalty(two).item() == pytest.approx(2 * 18 + 0.5 * 24)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_subgradient_is_that_of_autograd(structure: str) -> None:
    weight = kernel(4, 3, 2, 3).requires_grad_()
    loss, strength = (weight**3).sum(), 0.3
    terms = [term(weight, structure, 1.7), term(weight, "columns")]
    (expected,) = torch.autograd.grad(loss + strength * penalty(terms), weight, retain_graph=True)
    loss.backward()
    add_subgradient(terms, [torch.tensor(strength * t.multiplier, dtype=torch.double) for t in terms])
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_the_subgradient_of_a_zero_group_is_zero() -> None:
    weight = kernel(2, 3, 2, 2)
    weight[1] = 0
    weight.requires_grad_().grad = torch.zeros_like(weight)
    add_subgradient([term(weight, "filters")], [torch.tensor(0.5)])
    assert not weight.grad[1].any()
    assert weight.grad[0].norm() == pytest.approx(0.5)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_soft_threshold_minimises_what_it_should(structure: str) -> None:
    """The minimum of ½||X - W||² + t·m·Σ||X^(g)||, against a minimiser that knows nothing of it."""
    weight, threshold = kernel(2, 2, 1, 2), 0.8
    found = term(weight.clone(), structure, 1.25)
    soft_threshold([found], [torch.tensor(1.25 * threshold)])

    def objective(x: np.ndarray) -> float:
        moved = torch.from_numpy(x).view_as(weight)
        return float(0.5 * (moved - weight).square().sum() + threshold * penalty([term(moved, structure, 1.25)]))

    best = min(
        (minimize(objective, start, method="Powell", tol=1e-10) for start in (weight.flatten(), np.zeros(8))),
        key=lambda r: r.fun,
    )
    assert objective(found.weight.flatten().numpy()) <= best.fun + 1e-9
    np.testing.assert_allclose(found.weight.flatten(), best.x, atol=2e-4)


def test_the_soft_threshold_by_hand() -> None:
    weight = Tensor([[3, 4], [0.3, 0.4], [0, 0]]).view(3, 1, 1, 2)
    soft_threshold([term(weight, "filters")], [torch.tensor(1.0)])
    torch.testing.assert_close(weight.flatten(1), Tensor([[2.4, 3.2], [0, 0], [0, 0]]).view(3, 1, 2).flatten(1))


def test_the_square_root_rule_gives_the_multipliers_of_the_released_alexnet() -> None:
    """Groups are formed inside each group of a convolution: 256 / 2, 384, 384 / 2 and 256 / 2 filters."""
    assert [root_of_size(filters) for filters in (256 // 2, 384, 384 // 2, 256 // 2)] == pytest.approx(
        [1, 1.7321, 1.2247, 1], abs=5e-5
    )


# -- what is penalised -------------------------------------------------------------------------------------------------


def space(unit: str, net: nn.Module, example: Tensor) -> Space:
    kind = {"filters": ChannelSpace, "columns": ColumnSpace, "filters+columns": RowColumnSpace, "blocks": BlockSpace}
    return kind[UNITS[unit][0]](net, example)


@pytest.mark.parametrize("unit", ["filters", "columns", "filters+columns"])
def test_a_units_norm_is_that_of_the_weights_that_compute_it(unit: str, convnet: nn.Module, digits: data.Data) -> None:
    found = space(unit, convnet, digits.example)
    norms = unit_norms(penalised(found, UNITS[unit][1]), int(found.sizes.sum()))
    torch.testing.assert_close(norms, torch.cat(list(found.scores("l2").values())))


def test_of_filters_and_channels_the_nearer_to_zero_counts(convnet: nn.Module, digits: data.Data) -> None:
    found = ChannelSpace(convnet, digits.example)
    norms = unit_norms(penalised(found, UNITS["filters+channels"][1]), int(found.sizes.sum()))
    conv1, conv2, conv3 = (convnet.get_submodule(f"conv{i}").weight.detach() for i in (1, 2, 3))
    for first, second, part in ((conv1, conv2, norms[:16]), (conv2, conv3, norms[16:32])):
        torch.testing.assert_close(
            part, first.flatten(1).norm(dim=1).minimum(second.transpose(0, 1).flatten(1).norm(dim=1))
        )
    torch.testing.assert_close(norms[32:], conv3.flatten(1).norm(dim=1))  # what reads these is no convolution


def test_a_channel_of_a_residual_stream_is_as_far_as_its_last_writer() -> None:
    net = models.build("resnet20-b", shape=(1, 8, 8), seed=0, width=0.25)
    found = ChannelSpace(net, torch.zeros(1, 1, 8, 8))
    norms = unit_norms(penalised(found, ("filters",)), int(found.sizes.sum()))
    writers = [axis.module for axis in found.writers("conv")]
    assert writers == ["conv", *(f"stage1.{i}.conv2" for i in range(3))]
    each = torch.stack([net.get_submodule(name).weight.detach().flatten(1).norm(dim=1) for name in writers])
    torch.testing.assert_close(norms[:4], each.amax(0))


def test_depth_penalises_both_convolutions_of_every_block_and_nothing_else() -> None:
    net = models.build("resnet20-b", shape=(1, 8, 8), seed=0, width=0.25)
    found = BlockSpace(net, torch.zeros(1, 1, 8, 8))
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    terms = penalised(found, ("layers",))
    blocks = [f"stage{s}.{b}" for s in (1, 2, 3) for b in range(3)]
    assert [names[id(t.weight)] for t in terms] == [f"{b}.conv{i}.weight" for b in blocks for i in (1, 2)]
    with torch.no_grad():
        net.stage2[1].conv1.weight.zero_()
    norms = unit_norms(terms, 9)
    assert norms.nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 6, 7, 8]  # one zero convolution closes a branch
    plan = found.plan_for(
        {group.name: norm[None] for group, norm in zip(found.groups, norms, strict=True)}, Budget(0.95)
    )
    assert [name for name, kept in plan.keep.items() if not kept] == ["stage2.1"]


def test_zero_2d_filters_leave_nothing_to_remove(convnet: nn.Module, digits: data.Data) -> None:
    """Half of them at zero in a checkerboard: no filter, channel or column is, so no cut network is smaller."""
    found = RowColumnSpace(convnet, digits.example)
    masked = found.mask(found.plan({}))
    for conv in (masked.conv2, masked.conv3):
        filters, channels = conv.weight.shape[:2]
        board = (torch.arange(filters)[:, None] + torch.arange(channels)) % 2
        conv.weight.data.mul_(board[:, :, None, None])
        assert float((term(conv.weight, "2-D filters").norms() == 0).float().mean()) == 0.5
    for unit in ("filters+columns", "filters+channels"):
        zeroed = space(unit, masked, digits.example)
        assert (unit_norms(penalised(zeroed, UNITS[unit][1]), int(zeroed.sizes.sum())) > 0).all()
    with pytest.raises(ValueError, match="unit is '2-D filters'; it must be one of 'filters'"):
        build("ssl", unit="2-D filters")


def test_multipliers_by_layer(convnet: nn.Module, digits: data.Data) -> None:
    found = RowColumnSpace(convnet, digits.example)
    terms = penalised(found, ("filters", "columns"), {"columns": {"conv1": 0, "conv2": 2.0}})
    assert [t.multiplier for t in terms if t.structure == "filters"] == [1, 1, 1]
    assert [t.multiplier for t in terms if t.structure == "columns"] == [2.0, 1]
    norms = dict(
        zip(
            [g.name for g in found.groups],
            unit_norms(terms, int(found.sizes.sum())).split(found.sizes.tolist()),
            strict=True,
        )
    )
    assert norms["conv1 columns"].isposinf().all()
    torch.testing.assert_close(norms["conv2 columns"], found.unit_weights("conv2 columns").norm(dim=1) / 2)
    by_root = penalised(found, ("filters", "columns"), "sqrt")  # rows of 25 and 400 weights, columns of 16 and 32
    assert [128 * t.multiplier**2 for t in by_root] == pytest.approx([25, 400, 400, 16, 16, 32])
    with pytest.raises(ValueError, match=r"multipliers\['columns'\] names \['conv4'\]: legal layers are conv1, conv2"):
        penalised(found, ("columns",), {"columns": {"conv4": 1}})


@pytest.mark.parametrize(
    ("filters", "columns", "flops"),
    [
        ((5, 19), (25, 4 * 25), (25.0, 7.6)),  # Table 1: of 5 filters 4 have a channel that is read
        ((3, 12), (25, 3 * 25), (15.0, 3.6)),
        ((2, 50), (21, 41), (8.4, 8.2)),  # Table 2
        ((1, 50), (7, 14), (1.4, 2.8)),
    ],
)
def test_lenet_keeps_the_published_share_of_its_operations(
    filters: tuple[int, int], columns: tuple[int, int], flops: tuple[float, float]
) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip
    example = torch.zeros(1, 1, 28, 28)
    found = RowColumnSpace(net, example)
    groups = dict(zip(("0", "2", "0 columns", "2 columns"), (*filters, *columns), strict=True))
    small = found.shrink(found.plan({group: range(width) for group, width in groups.items()}))
    left, whole = (cost.breakdown(n, example).set_index("name").macs[["0", "2"]] for n in (small, net))
    assert (100 * left / whole).round(1).tolist() == [*flops]


# -- training ----------------------------------------------------------------------------------------------------------


class Alone(Pressure):
    """The penalty without the loss."""

    def on_loss(self, state: State, loss: Tensor) -> Tensor:
        return 0 * loss


@pytest.mark.parametrize("update", ["subgradient", "proximal"])
def test_the_penalty_alone_takes_to_zero_what_the_budget_does(
    update: str, convnet: nn.Module, digits: data.Data
) -> None:
    """λ_g = ν / (η·T): by the last step exactly the groups that must go are there, and the others lost ν."""
    found = ColumnSpace(
        ColumnSpace(convnet, digits.example).mask(ColumnSpace(convnet, digits.example).plan({})), digits.example
    )
    hook = Alone(found, penalised(found, ("columns",)), build("ssl", unit="columns", update=update), HALF)
    before = torch.cat(list(found.scores("l2").values()))
    plan, longest = hook.look()
    longest = longest[0]
    recipe = Recipe(epochs=3, lr=0.01, schedule="constant", batch_size=64, weight_decay=0, nesterov=False, momentum=0.0)
    fit(found.net, digits, recipe, seed=0, hook=hook, progress=False)
    after = torch.cat(list(found.scores("l2").values()))
    gone = found.gates(plan) == 0
    assert before[gone].max() == longest
    torch.testing.assert_close(after[~gone], before[~gone] - longest, rtol=0, atol=2e-4 * math.sqrt(32))
    if update == "proximal":
        assert after[gone].max() < 1e-6
    else:  # a step of λ_g·η overshoots zero by less than itself
        assert after[gone].max() <= 1.01 * hook.strengths[0][0] * recipe.lr + ZERO * math.sqrt(32)


def test_a_constant_penalty_pulls_every_filter_by_lambda_times_its_multiplier(
    convnet: nn.Module, digits: data.Data
) -> None:
    found = ChannelSpace(copy.deepcopy(convnet), digits.example)
    multipliers = {"filters": {"conv2": 3.0}}
    method = build("ssl", unit="filters", lambda_g=0.1, multipliers=multipliers)
    hook = Pressure(found, penalised(found, ("filters",), multipliers), method, HALF)
    state = State(found.net, torch.optim.SGD(found.net.parameters(), lr=0.1), step=0, steps=10, steps_per_epoch=10)
    for parameter in found.net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hook.start(state)
    hook.before_step(state)
    hook.after_gradients(state)
    for layer, pull in (("conv1", 0.1), ("conv2", 0.3), ("conv3", 0.1)):
        gradient = found.net.get_parameter(f"{layer}.weight").grad
        assert gradient is not None
        assert gradient.flatten(1).norm(dim=1).tolist() == pytest.approx([pull] * len(gradient))


def test_columns_that_go_with_their_channel_need_no_penalty(digits: data.Data) -> None:
    net = models.build("convnet-bn", shape=digits.shape, seed=0, width=0.5)
    with torch.no_grad():
        net.get_parameter("conv1.weight")[3] *= 1e-3  # goes, and with it
        net.get_parameter("conv2.weight")[:, 3] = 10.0  # the longest columns of all
    found = RowColumnSpace(net, digits.example)
    method = build("ssl", unit="filters+columns", ranking="layer")
    plan, longest = Pressure(found, penalised(found, ("filters", "columns")), method, HALF).look()
    norms = found.scores("l2")["conv2 columns"]
    lost = {*range(16 * 25)} - {*plan.keep["conv2 columns"]}
    of_others = [norms[column] for column in lost if column // 25 in plan.keep["conv1"]]
    assert 3 not in plan.keep["conv1"] and of_others
    assert longest[[group.name for group in found.groups].index("conv2 columns")] == max(of_others) < 10


def test_small_weights_become_zero_after_every_update(convnet: nn.Module, digits: data.Data) -> None:
    class Watched(Pressure):
        zeros = 0

        def after_step(self, state: State) -> None:
            super().after_step(state)
            for t in self.terms:
                size = t.weight.detach().abs()
                assert not ((size > 0) & (size < ZERO)).any()
                self.zeros += int((size == 0).sum())

    found = RowColumnSpace(convnet, digits.example)
    found = RowColumnSpace(found.mask(found.plan({})), digits.example)
    hook = Watched(found, penalised(found, ("filters", "columns")), build("ssl"), HALF)
    fit(found.net, digits, dataclasses.replace(RECIPE, epochs=0.5), seed=0, hook=hook, progress=False)
    assert hook.zeros > 0


def test_without_a_penalty_it_is_plain_training(convnet: nn.Module, digits: data.Data) -> None:
    found = RowColumnSpace(convnet, digits.example)
    plain, pressed = (RowColumnSpace(found.mask(found.plan({})), digits.example) for _ in range(2))
    settings = build("ssl", lambda_g=0.0, update="proximal")
    hook = Pressure(pressed, penalised(pressed, ("filters", "columns")), settings, HALF)
    fit(plain.net, digits, RECIPE, seed=0, progress=False)
    fit(pressed.net, digits, RECIPE, seed=0, hook=hook, progress=False)
    for key, value in plain.net.state_dict().items():
        torch.testing.assert_close(pressed.net.state_dict()[key], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("update", ["subgradient", "proximal"])
@pytest.mark.parametrize("unit", ["filters+columns", "columns", "filters+channels"])
def test_the_budget_is_met(unit: str, update: str, convnet: nn.Module, digits: data.Data) -> None:
    before = {key: value.clone() for key, value in convnet.state_dict().items()}
    method = build("ssl", unit=unit, update=update, ranking="layer")
    pruned = method(convnet, HALF, Context(digits, RECIPE, seed=0, progress=False))
    kept = cost.macs(pruned.net, digits.example, "conv") / cost.macs(convnet, digits.example, "conv")
    assert kept <= 0.5
    assert kept > (0.49 if "columns" in unit else 0.45)  # half of the width: a filter is up to 4% of the MACs
    assert pruned.epochs == pytest.approx(1, abs=0.05)
    looks = math.ceil(round(pruned.epochs * (len(digits.train.labels) // 64)) / REFRESH)
    assert {len(strengths) for strengths in pruned.history["lambda_g"].values()} == {looks}
    assert {n: tuple(v.shape) for n, v in pruned.history["norms"].items()} == {
        name: (looks + 1, size) for name, size in pruned.plan.sizes.items()
    }
    assert all(torch.equal(value, before[key]) for key, value in convnet.state_dict().items())


def test_zero_groups_go_before_all_others(digits: data.Data) -> None:
    net = models.build("convnet-bn", shape=digits.shape, seed=0, width=0.5)
    with torch.no_grad():
        net.conv1.weight[:5] = 0
        net.conv3.weight[:, 3:6] = 0
    method = build("ssl", lambda_g=0.0, lr=1e-9, share=0.1)  # nothing moves
    pruned = method(net, Budget(0.7, "conv"), Context(digits, RECIPE, seed=0, progress=False))
    assert not set(range(5)) & set(pruned.plan.keep["conv1"])
    assert not set(range(75, 150)) & set(pruned.plan.keep["conv3 columns"])


def test_with_a_constant_penalty_larger_means_sparser(convnet: nn.Module, digits: data.Data) -> None:
    zeros = []
    for strength in (0.0, 0.3, 1.0):
        method = build("ssl", lambda_g=strength, update="proximal", unit="columns")
        pruned = method(convnet, HALF, Context(digits, RECIPE, seed=0, progress=False))
        assert (torch.stack(list(pruned.history["lambda_g"].values())) == strength).all()
        zeros.append(sum(int((norms[-1] == 0).sum()) for norms in pruned.history["norms"].values()))
    assert zeros[0] == 0
    assert zeros[0] < zeros[1] < zeros[2]


def test_depth_removes_whole_branches(digits: data.Data) -> None:
    net = models.build("resnet20", shape=digits.shape, seed=0, width=0.25)
    pruned = build("ssl", unit="blocks")(net, HALF, Context(digits, RECIPE, seed=0, progress=False))
    gone = [name for name, kept in pruned.plan.keep.items() if not kept]
    assert 0 < len(gone) < 9
    left = [name for name, m in pruned.net.named_modules() if isinstance(m, nn.Conv2d)]
    assert len(left) == 19 - 2 * len(gone)
    assert pruned.plan.space == "blocks"
    assert cost.macs(pruned.net, digits.example, "conv") <= 0.5 * cost.macs(net, digits.example, "conv")


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lambda_g", -1e-3),
        ("lambda_g", math.inf),
        ("unit", "rows"),
        ("update", "newton"),
        ("ranking", "network"),
        ("multipliers", "mean"),
        ("multipliers", {"channels": {"conv1": 1.0}}),
        ("multipliers", {"columns": {"conv1": -1.0}}),
        ("share", 0),
        ("lr", 0),
    ],
)
def test_an_illegal_setting_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"ssl: {field} is .*must be"):
        build("ssl", **{field: value})


@pytest.mark.parametrize(
    ("parameters", "budget", "message"),
    [
        ({"unit": "blocks"}, HALF, "no blocks that could be removed"),
        ({}, Budget(1e-6), "cannot be met"),
        ({"lambda_g": 0.1}, Budget(1e-6), "cannot be met"),
        ({"multipliers": {"filters": {"conv9": 1.0}}}, HALF, "legal layers are conv1, conv2, conv3"),
    ],
)
def test_what_cannot_be_done_is_said_before_training(
    parameters: dict[str, object], budget: Budget, message: str, convnet: nn.Module, digits: data.Data
) -> None:
    poison = dataclasses.replace(RECIPE, epochs=1e6)
    with pytest.raises(ValueError, match=message):
        build("ssl", **parameters)(convnet, budget, Context(digits, poison, seed=0, progress=False))
