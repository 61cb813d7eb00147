"""ADMM: projections by hand and by brute force, the penalty's gradient, residuals that fall, zeros that stay."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from prunelab.admm import ADMM, Projection
from prunelab.data import load
from prunelab.masks import Masks
from prunelab.methods.base import space_of
from prunelab.models import build
from prunelab.structure import BlockSpace, ChannelSpace, ColumnSpace, RowColumnSpace
from prunelab.training import Recipe, State, fit

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Two(nn.Module):
    """Two convolutions of few filters and columns; the second is read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 3, 1, bias=False)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3)))


def two() -> Two:
    torch.manual_seed(0)
    return Two().double()


def set_weight(conv: nn.Conv2d, rows: list[list[float]]) -> None:
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(rows)[:, :, None, None])


def test_a_projection_by_hand() -> None:
    net = two()
    set_weight(net.a, [[3, 0, 1], [0, 2, 2], [1, 1, 1], [2, 0, 2]])  # norms √10, √8, √3, √8; columns √14, √5, √10
    rows = Projection(ChannelSpace(net, EXAMPLE.double()))
    plan = rows.plan(rows.weights, np.array([2, 3]))
    assert plan.keep["a"] == (0, 1)  # of the equals, the first
    z = dict(zip(("a", "b"), rows.masked(rows.weights, plan), strict=True))["a"].flatten(1)
    assert z.tolist() == [[3, 0, 1], [0, 2, 2], [0, 0, 0], [0, 0, 0]]
    columns = Projection(ColumnSpace(net, EXAMPLE.double()))
    plan = columns.plan(columns.weights, np.array([1, 4]))
    assert plan.keep["a"] == (0,)
    assert columns.masked(columns.weights, plan)[0].flatten(1).tolist() == [[3, 0, 0], [0, 0, 0], [1, 0, 0], [2, 0, 0]]
    both = Projection(RowColumnSpace(net, EXAMPLE.double()))
    set_weight(net.a, [[3, 0, 0], [0, 1, 3], [0, 2, 0], [0, 2, 0]])
    # of all four filters the columns have 3, 3 and 3; of the first two, which stay, 3, 1 and 3
    plan = both.plan(both.weights, np.array([2, 3, 2, 4]))
    assert plan.keep["a"] == (0, 1) and plan.keep["a columns"] == (0, 2)
    assert both.masked(both.weights, plan)[0].flatten(1).tolist() == [[3, 0, 0], [0, 0, 3], [0, 0, 0], [0, 0, 0]]


ROWS, COLUMNS = Projection(ChannelSpace(two(), EXAMPLE.double())), Projection(ColumnSpace(two(), EXAMPLE.double()))


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 3))
def test_filters_and_columns_are_projected_on_the_nearest_point(seed: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for projection, width, dim in ((ROWS, rows, 0), (COLUMNS, columns, 1)):
        values = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in projection.weights]
        widths = projection.space.sizes.copy()
        widths[0] = width
        z = projection.masked(values, projection.plan(values, widths))[0]
        matrix, found = values[0].flatten(1), z.flatten(1)
        assert int((found != 0).any(1 - dim).sum()) == width  # exactly as many as asked for
        best = min(
            float((matrix - torch.zeros_like(matrix).index_copy(dim, i, matrix.index_select(dim, i))).norm())
            for kept in combinations(range(matrix.shape[dim]), width)
            if len(i := torch.tensor(kept))
        )
        assert float((matrix - found).norm()) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("unit", ["filters", "columns", "filters+columns"])
@pytest.mark.parametrize("name", ["convnet-bn", "resnet20"])
def test_projections_have_the_counts_and_are_idempotent(unit: str, name: str) -> None:
    space = space_of(unit, build(name, shape=(3, 8, 8), seed=1), EXAMPLE)
    projection = Projection(space)
    widths = space.widths({group.name: max(1, group.size // 3) for group in space.groups})
    plan = projection.plan(projection.weights, widths)
    z = projection.masked(projection.weights, plan)
    assert space.widths(plan).tolist() == widths.tolist()
    norms = projection.space.by_group(projection.norms(z))
    assert [int((norm > 0).sum()) for norm in norms.values()] == widths.tolist()
    assert projection.plan(z, widths) == plan
    assert all(torch.equal(a, b) for a, b in zip(projection.masked(z, plan), z, strict=True))


def test_filters_that_an_addition_ties_are_projected_together() -> None:
    space = ChannelSpace(build("resnet20", shape=(3, 8, 8), seed=1), EXAMPLE)
    projection = Projection(space)
    norms = projection.space.by_group(projection.norms(projection.weights))
    for group in space.groups:
        torch.testing.assert_close(norms[group.name], space.unit_weights(group.name).norm(dim=1))
    assert any(len(space.writers(group.name)) > 1 for group in space.groups)


def test_what_went_before_is_never_kept() -> None:
    space = RowColumnSpace(build("convnet-bn", shape=(3, 8, 8), seed=1), EXAMPLE)
    present = space.plan({"conv1": range(5, 32), "conv2 columns": range(200, 700)})
    projection = Projection(space, present)
    plan = projection.plan(projection.weights, space.sizes)
    assert plan == present


def test_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="ADMM prunes filters and columns; this space has"):
        Projection(BlockSpace(build("resnet20", shape=(3, 8, 8), seed=1), EXAMPLE))


# -- training ---------------------------------------------------------------------------------------------------------


def state_of(net: nn.Module, steps: int = 4) -> State:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return State(net, optimizer, step=0, steps=steps, steps_per_epoch=steps)


def test_the_updates_by_hand() -> None:
    net = two()
    set_weight(net.a, [[3, 0, 1], [0, 2, 2], [1, 1, 1], [2, 0, 2]])
    projection = Projection(ChannelSpace(net, EXAMPLE.double()))
    hook, state = ADMM(projection, np.array([2, 3]), rho=0.5, growth=1.3, updates=2), state_of(net)
    hook.start(state)
    first = net.a.weight.detach().flatten(1).clone()
    z = first.clone()
    z[2:] = 0
    assert torch.equal(hook.z[0].flatten(1), z) and not hook.dual[0].any()  # Z = Π(W), U = 0
    everything = torch.cat([net.a.weight.detach().flatten(), net.b.weight.detach().flatten()])
    assert hook.residuals == [pytest.approx(float((first - z).norm() / everything.norm()))]
    net.a.weight.grad, net.b.weight.grad = torch.ones_like(net.a.weight), torch.zeros_like(net.b.weight)
    hook.after_gradients(state)
    torch.testing.assert_close(net.a.weight.grad.flatten(1), 1 + 0.5 * (first - z))
    hook.after_step(state)
    assert hook.rho == 0.5 and not hook.dual[0].any()  # two of four steps before an update
    state.step = 1
    with torch.no_grad():
        net.a.weight[2] *= 4  # now the largest filter
    moved = net.a.weight.detach().flatten(1).clone()
    hook.after_step(state)
    z = moved.clone()
    z[[1, 3]] = 0
    assert torch.equal(hook.z[0].flatten(1), z)
    assert torch.equal(hook.dual[0].flatten(1), moved - z)  # U = 0 + W − Z
    assert hook.rho == pytest.approx(0.65)
    net.a.weight.grad = torch.zeros_like(net.a.weight)
    hook.after_gradients(state)
    torch.testing.assert_close(net.a.weight.grad.flatten(1), 0.65 * (moved - z + moved - z))
    state.step = 3
    hook.after_step(state)  # of W + U the norms are √10, √32, √48, √32: what had gone may return
    assert hook.z[0].flatten(1).tolist() == [[0, 0, 0], [0, 4, 4], [4, 4, 4], [0, 0, 0]]


def test_old_zeros_stay_through_every_step() -> None:
    net = two()
    space = RowColumnSpace(net, EXAMPLE.double())
    present = space.plan({"a": [0, 1, 3], "a columns": [0, 2]})
    hook = ADMM(Projection(space, present), np.array([2, 3, 2, 4]), rho=0.5, growth=1.3, updates=1)
    state = state_of(net)
    hook.start(state)
    with torch.no_grad():
        net.a.weight.add_(1)  # as momentum may move them
    hook.after_step(state)
    found = net.a.weight.detach()
    assert not found[2].any() and not found[:, 1].any() and found[[0, 1, 3]][:, [0, 2]].all()


def test_the_gradient_is_that_of_the_penalty() -> None:
    net = two()
    projection = Projection(RowColumnSpace(net, EXAMPLE.double()))
    hook = ADMM(projection, np.array([2, 2, 2, 2]), rho=0.7, growth=1.0, updates=1)
    hook.start(state_of(net))
    hook.dual = [torch.randn_like(weight) for weight in projection.weights]
    penalty = sum(
        0.7 / 2 * (w - z + u).square().sum() for w, z, u in zip(projection.weights, hook.z, hook.dual, strict=True)
    )
    expected = torch.autograd.grad(penalty, projection.weights)  # type: ignore[arg-type]
    for weight in projection.weights:
        weight.grad = torch.zeros_like(weight)
    hook.after_gradients(state_of(net))
    for weight, gradient in zip(projection.weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


def test_w_and_z_meet_on_a_toy_problem() -> None:
    """Least squares to a matrix, f = ½·||W − A||², by gradient descent: the residual falls to nothing."""
    net = two()
    projection = Projection(RowColumnSpace(net, EXAMPLE.double()))
    targets = [weight.detach().clone() for weight in projection.weights]
    hook = ADMM(projection, np.array([2, 2, 2, 1]), rho=1.0, growth=1.3, updates=20)
    state = state_of(net, steps=20 * 10)
    hook.start(state)
    for step in range(state.steps):
        state.step = step
        for weight, target in zip(projection.weights, targets, strict=True):
            weight.grad = weight.detach() - target
        hook.after_gradients(state)
        with torch.no_grad():
            for weight in projection.weights:
                assert weight.grad is not None
                weight.sub_(weight.grad / (1 + hook.rho))
        hook.after_step(state)
    assert len(hook.residuals) == 21
    assert hook.residuals[-1] < 0.02 < 0.3 < hook.residuals[0]
    kept = projection.masked(targets, hook.support())
    z = projection.masked(projection.weights, hook.support())
    for there, wanted in zip(z, kept, strict=True):  # what is kept is left alone
        torch.testing.assert_close(there, wanted, atol=0.05, rtol=0)


@pytest.mark.parametrize("unit", ["filters", "columns", "filters+columns"])
def test_zeros_stay_zero_and_the_rest_learns(unit: str) -> None:
    images = load("digits")
    net = build("convnet-bn", classes=10, shape=images.shape, seed=0)
    space = space_of(unit, net, images.example)
    plan = space.plan_for(space.scores("l2"), [0.5] * len(space.groups))
    gates = space.gates(plan)
    before = net.state_dict()["conv2.weight"].clone()
    fit(net, images, Recipe(epochs=0.2, lr=0.05, batch_size=64), seed=0, hook=Masks(space, plan), progress=False)
    masked = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    space.apply_gates(net, gates)
    assert all(torch.equal(tensor, masked[name]) for name, tensor in net.state_dict().items())
    assert 0 < (net.state_dict()["conv2.weight"] != 0).double().mean() < 0.6
    assert not torch.equal(net.state_dict()["conv2.weight"], before)
    batch = torch.randn(4, *images.shape)
    net.eval()
    torch.testing.assert_close(space.shrink(plan)(batch), net(batch), atol=1e-4, rtol=1e-4)


def test_updates_are_spread_over_the_run_and_the_last_is_at_its_end() -> None:
    images = load("digits")
    space = ChannelSpace(build("convnet-bn", classes=10, shape=images.shape, seed=0), images.example)
    hook = ADMM(Projection(space), space.sizes // 2, rho=1e-3, growth=1.3, updates=3)
    recipe = Recipe(epochs=0.35, lr=0.01, batch_size=64)
    fit(space.net, images, recipe, seed=0, hook=hook, progress=False)
    assert len(hook.residuals) == 1 + 3
    assert hook.rho == pytest.approx(1e-3 * 1.3**3)
