"""He et al.: moments, LASSO and least squares by brute force; whole networks, residual ones and the paper's widths."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunelab.data import load
from prunelab.layers import ChannelSelection
from prunelab.layerwise import LayerByLayer, added_to, patches, samples, with_samplers
from prunelab.methods.base import Pruned
from prunelab.methods.channel_pruning import RATIOS, ChannelPruning, Selection
from prunelab.models import build
from prunelab.reconstruction import Moments, Reconstruction, lasso, lasso_path
from prunelab.structure import Budget, ChannelSpace
from prunelab.training import Context, Recipe, evaluate, fit

SHAPE = (1, 8, 8)
SELECTIONS: tuple[Selection, ...] = ("lasso", "first k", "max response")


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(load("digits"), Recipe(epochs=1, lr=0.05, batch_size=32), seed=0, progress=False)


@pytest.fixture(scope="module")
def trained(context: Context) -> nn.Module:
    net = build("convnet-bn", shape=SHAPE, seed=0, width=0.5)
    fit(net, context.data, Recipe(epochs=4, lr=0.05, batch_size=32), seed=0, progress=False)
    return net


def rows(seed: int, count: int = 200, channels: int = 5, per: int = 2, outputs: int = 3) -> tuple[Tensor, ...]:
    """Correlated inputs [N, channels·per], weights, a bias, and a target that they do not reach, in float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = (normal(count, 4) @ normal(4, channels * per) + 0.5 * normal(count, channels * per)).relu()
    weight, bias = normal(outputs, channels * per), normal(outputs)
    return x, weight, bias, x @ weight.T + bias + 0.3 * normal(count, outputs)


def problem(seed: int, channels: int = 5, per: int = 2, **sizes: int) -> tuple[Reconstruction, tuple[Tensor, ...]]:
    x, weight, bias, y = rows(seed, channels=channels, per=per, **sizes)
    moments = Moments(x.shape[1], len(weight))
    for part, missing in zip(x.split(64), (y - x @ weight.T - bias).split(64), strict=True):
        moments.add(part, missing)
    return Reconstruction(weight, torch.arange(channels).repeat_interleave(per), moments), (x, weight, bias, y)


def choose(reader: Reconstruction, count: int, selection: Selection = "lasso", channels: int = 5) -> list[int]:
    return ChannelPruning(selection=selection).select([reader], channels, count)


def test_responses_are_compared_by_their_sum() -> None:
    """Σ|w|: 4 of four ones, 3 of a single weight whose norm is the larger."""
    reader, _ = problem(0, channels=2, outputs=2)
    reader.weight = torch.tensor([[1.0, 1.0, 3.0, 0.0], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    assert choose(reader, 1, "max response", channels=2) == [0]


# -- moments and least squares ----------------------------------------------------------------------------------------


def test_streamed_moments_are_those_of_all_rows() -> None:
    x, _, _, y = rows(0, count=1000, channels=9, per=3)
    moments = Moments(27, 3)
    for a, b in zip(x.split(37), y.split(37), strict=True):
        moments.add(a, b)
    centred, target = x - x.mean(0), y - y.mean(0)
    torch.testing.assert_close(moments.xx, centred.T @ centred / 1000, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moments.xy, centred.T @ target / 1000, rtol=1e-9, atol=1e-12)
    assert moments.yy == pytest.approx(float(target.square().sum() / 1000), rel=1e-9)


@pytest.mark.parametrize("kept", [[0], [1, 3], [0, 1, 2, 4]])
def test_solution_from_moments_is_direct_least_squares(kept: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunelab.reconstruction.RIDGE", 0.0)
    reader, (x, weight, bias, y) = problem(1)
    change = reader.solve(kept)
    columns = torch.isin(reader.channel, torch.tensor(kept))
    design = torch.cat([x[:, columns], torch.ones(len(x), 1, dtype=torch.float64)], 1)
    direct = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close((weight + change.weight)[:, columns], direct[:-1].T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bias + change.bias, direct[-1], rtol=1e-9, atol=1e-9)
    assert not (weight + change.weight)[:, ~columns].any()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), kept=st.sets(st.integers(0, 4), min_size=1))
def test_errors_are_those_of_the_rows(seed: int, kept: set[int]) -> None:
    reader, (x, weight, bias, y) = problem(seed)
    for change in (reader.cut([*kept]), reader.solve([*kept])):
        expected = (y - x @ (weight + change.weight).T - bias - change.bias).square().sum() / len(x)
        assert change.error == pytest.approx(float(expected), rel=1e-9)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """Float32 rows around 1000: their moments are those of the rows around 0."""
    near = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    far = near + 1000
    moments = Moments(6, 1)
    for part in far.split(500):
        moments.add(part, torch.zeros(len(part), 1))
    expected = torch.cov(far.double().T, correction=0)
    torch.testing.assert_close(moments.xx, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.mean_x, far.double().mean(0), rtol=1e-7, atol=0)


def test_float32_rows_with_one_dominant_direction_can_be_solved() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 1, generator=generator) @ torch.rand(1, 400, generator=generator)
    x += 1e-4 * torch.randn(3000, 400, generator=generator)
    moments, weight = Moments(400, 2), torch.randn(2, 400, generator=generator)
    moments.add(x, torch.zeros(3000, 2))
    reader = Reconstruction(weight, torch.arange(400), moments)
    assert reader.solve(range(100)).error < 1e-3 * reader.cut(range(100)).error


def test_all_channels_get_their_own_weights_back() -> None:
    x, weight, _, _ = rows(3)
    x = torch.cat([x[:, :8], x[:, :2]], 1)  # the last channel copies the first: only the ridge can tell them apart
    moments = Moments(10, 3)
    moments.add(x, torch.zeros(len(x), 3, dtype=torch.float64))
    change = Reconstruction(weight, torch.arange(5).repeat_interleave(2), moments).solve(range(5))
    assert change.weight.abs().max() < 1e-9 and change.bias.abs().max() < 1e-9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 5), selection=st.sampled_from(SELECTIONS))
def test_reconstruction_is_never_worse_than_selection_alone(seed: int, count: int, selection: Selection) -> None:
    reader, _ = problem(seed, count=30)
    kept = choose(reader, count, selection)
    assert len(kept) == len(set(kept)) == count
    assert reader.solve(kept).error <= reader.cut(kept).error * (1 + 1e-9)


def test_the_reconstruction_of_more_channels_is_never_worse() -> None:
    """Nested sets, as along a path without returns."""
    reader, _ = problem(4)
    errors = [reader.solve(range(count)).error for count in range(1, 6)]
    assert errors == sorted(errors, reverse=True)


# -- LASSO ------------------------------------------------------------------------------------------------------------


def test_lasso_of_orthogonal_channels_by_hand() -> None:
    """G = I: β_i = sign(q_i)·max(|q_i| − λ, 0), so channels leave in the order of |q_i| as λ rises."""
    q = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    path = lasso_path(torch.eye(3, dtype=torch.float64), q)
    assert path.penalties.tolist() == pytest.approx([2.0, 1.0, 0.5, 0.0])
    assert path.betas[:, 1].tolist() == pytest.approx([0, -1, 0])
    assert path.betas[:, 2].tolist() == pytest.approx([0, -1.5, 0.5])
    assert lasso(torch.eye(3, dtype=torch.float64), q, torch.ones(3, dtype=torch.float64), 2) == [1, 2]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_point_of_the_path_solves_its_lasso(seed: int) -> None:
    """The subgradient conditions: |q − Gβ| <= λ, with equality and the sign of β where β is not 0."""
    reader, _ = problem(seed)
    gram, q = reader.gram(5)
    path = lasso_path(gram, q)
    for penalty, beta in zip(path.penalties, path.betas.T, strict=True):
        slope = (q - gram @ torch.from_numpy(beta)).numpy()
        active = beta != 0
        scale = 1e-7 * float(q.abs().max())
        assert (np.abs(slope) <= penalty + scale).all()
        assert np.allclose(slope[active], penalty * np.sign(beta[active]), atol=scale)


def test_error_falls_along_the_path() -> None:
    for seed in range(10):
        reader, _ = problem(seed)
        gram, q = reader.gram(5)
        betas = torch.from_numpy(lasso_path(gram, q).betas)
        errors = [float(b @ gram @ b - 2 * q @ b) for b in betas.T]
        assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))


def test_gram_is_that_of_the_channels_contributions() -> None:
    reader, (x, weight, _, y) = problem(5)
    parts = torch.stack([x[:, 2 * i : 2 * i + 2] @ weight[:, 2 * i : 2 * i + 2].T for i in range(5)])
    z = (parts - parts.mean(1, keepdim=True)).flatten(1)
    gram, q = reader.gram(5)
    torch.testing.assert_close(gram, z @ z.T / len(x))
    torch.testing.assert_close(q, z @ (y - y.mean(0)).flatten() / len(x))


def test_columns_that_cannot_go_are_taken_as_they_are() -> None:
    _, (x, weight, bias, y) = problem(6)
    moments = Moments(10, 3)
    moments.add(x, y - x @ weight.T - bias)
    fixed = Reconstruction(weight, torch.tensor([-1, -1, 0, 0, 1, 1, 2, 2, 3, 3]), moments)
    moments = Moments(8, 3)
    moments.add(x[:, 2:], y - x @ weight.T - bias)
    rest = Reconstruction(weight[:, 2:], torch.arange(4).repeat_interleave(2), moments)
    for found, expected in zip(fixed.gram(4), rest.gram(4), strict=True):
        torch.testing.assert_close(found, expected)
    change = fixed.cut([1]).weight
    assert (change != 0).all(0).tolist() == [False, False, True, True, False, False, True, True, True, True]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_lasso_against_every_subset(count: int) -> None:
    """After least squares, on average at most one of all the subsets of its size beats LASSO's; a coin would be 4.5."""
    better = []
    for seed in range(12):
        reader, _ = problem(seed)
        errors = {kept: reader.solve(kept).error for kept in itertools.combinations(range(5), count)}
        found = errors[tuple(choose(reader, count))]
        better.append(sum(error < found - 1e-12 for error in errors.values()))
    assert np.mean(better) <= 1


@settings(max_examples=25, deadline=None)
@given(q=st.lists(st.integers(-50, 50), min_size=5, max_size=5, unique_by=abs), count=st.integers(1, 5))
def test_lasso_of_orthogonal_channels_is_the_best_subset(q: list[int], count: int) -> None:
    """With G = I a subset K, its β refitted, leaves ||y||² − Σ_K q²."""
    target = torch.tensor(q, dtype=torch.float64)
    left = {kept: -target[list(kept)].square().sum().item() for kept in itertools.combinations(range(5), count)}
    found = lasso(torch.eye(5, dtype=torch.float64), target, torch.ones(5, dtype=torch.float64), count)
    assert left[tuple(found)] == min(left.values())


def test_lasso_finds_the_channels_that_alone_matter() -> None:
    for seed in range(8):
        x, weight, _, _ = rows(seed)
        weight.view(3, 5, 2)[:, [0, 3]] *= 1e-3
        moments = Moments(10, 3)
        moments.add(x, torch.zeros(len(x), 3, dtype=torch.float64))
        reader = Reconstruction(weight, torch.arange(5).repeat_interleave(2), moments)
        errors = {kept: reader.cut(kept).error for kept in itertools.combinations(range(5), 3)}
        assert min(errors, key=errors.__getitem__) == (1, 2, 4)
        assert choose(reader, 3) == [1, 2, 4]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), channels=st.integers(1, 40), data=st.data())
def test_the_count_is_exact(seed: int, channels: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, channels))
    reader, _ = problem(seed, channels=channels, per=1, count=60)
    assert len(set(choose(reader, count, channels=channels))) == count


def test_channels_that_do_not_vary_go_first_and_the_count_stays_exact() -> None:
    x, weight, _, _ = rows(7)
    x[:, [2, 3, 8, 9]] = 1.5
    moments = Moments(10, 3)
    moments.add(x, torch.zeros(len(x), 3, dtype=torch.float64))
    reader = Reconstruction(weight, torch.arange(5).repeat_interleave(2), moments)
    assert choose(reader, 3) == [0, 2, 3]
    assert len(choose(reader, 4)) == 4
    assert reader.solve([0, 2, 3]).error < 1e-9  # a constant channel is worth a bias


def test_bad_input_is_named() -> None:
    reader, _ = problem(8, count=6)
    with pytest.raises(ValueError, match=r"6 samples for 7 unknowns per output; at least 7 are needed"):
        reader.solve([0, 1, 2])
    for count in (0, 6):
        with pytest.raises(ValueError, match=f"count is {count}: of 5 channels between 1 and 5 can stay"):
            choose(reader, count)
    moments = Moments(2, 1)
    moments.add(torch.ones(9, 2), torch.zeros(9, 1))
    with pytest.raises(ValueError, match="none of the 2 channels varies over the samples"):
        choose(Reconstruction(torch.ones(1, 2), torch.arange(2), moments), 1, channels=2)
    for field, value in (("selection", "lars"), ("images", 0), ("positions", 2.5), ("ratios", {"conv1": 0.0})):
        with pytest.raises(ValueError, match=rf"channel-pruning: {field}(\['conv1'\])? is"):
            ChannelPruning(**{field: value})  # type: ignore[arg-type]


def test_lasso_sees_channels_with_weights_of_norm_one() -> None:
    """||W_i|| = 1: a channel that varies little stays behind however large its weights, and its contribution, are."""
    x = torch.tensor([[0.1, 1], [0.1, -1], [-0.1, 1], [-0.1, -1]], dtype=torch.float64)
    moments = Moments(2, 1)
    moments.add(x, torch.zeros(4, 1, dtype=torch.float64))
    reader = Reconstruction(torch.tensor([[20.0, 1.5]], dtype=torch.float64), torch.arange(2), moments)
    gram, q = reader.gram(2)
    expected = torch.tensor([4.0, 2.25], dtype=torch.float64)  # (0.1·20)², 1.5²; over the norms 0.2 and 1.5
    torch.testing.assert_close(gram, expected.diag())
    torch.testing.assert_close(q, expected)
    assert choose(reader, 1, channels=2) == [1]


# -- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
        nn.Conv2d(3, 4, 2, padding="same", padding_mode="reflect"),
        nn.Conv2d(3, 4, 1, stride=2),
        nn.Linear(7, 4),
    ],
)
def test_patches_times_weights_are_responses(layer: nn.Conv2d | nn.Linear) -> None:
    x = torch.randn(2, 3, 9, 11) if isinstance(layer, nn.Conv2d) else torch.randn(2, 7)
    seen = samples(patches(layer, x), 1000, seed=0)
    y = layer(x)
    expected = samples(y.permute(0, 2, 3, 1) if y.dim() == 4 else y[:, None, None], 1000, seed=0)
    torch.testing.assert_close(seen @ layer.weight.flatten(1).T + layer.bias, expected)


def test_positions_are_distinct_and_the_same_for_the_same_seed() -> None:
    maps = torch.arange(2 * 6 * 5).view(2, 6, 5, 1)
    found = samples(maps, 10, seed=3)
    assert found.shape == (20, 1) and len(found.unique()) == 20
    assert torch.equal(found, samples(maps, 10, seed=3)) and not torch.equal(found, samples(maps, 10, seed=4))
    assert len(samples(maps, 99, seed=0)) == 60


# -- whole networks ---------------------------------------------------------------------------------------------------


def pruned_by(net: nn.Module, context: Context, macs: float = 0.4, **fields: object) -> Pruned:
    return ChannelPruning(**fields)(net, Budget(macs=macs), context)  # type: ignore[arg-type]


def test_a_whole_budget_leaves_the_network_as_it_is(trained: nn.Module, context: Context) -> None:
    before = copy.deepcopy(trained.state_dict())
    pruned = pruned_by(trained, context, macs=1.0, images=300)
    for name, tensor in pruned.net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], msg=name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


def test_no_image_outside_the_training_split_is_seen(trained: nn.Module, context: Context) -> None:
    data = copy.deepcopy(context.data)
    for split in (data.val, data.test):
        split.images.zero_()
    usual, blank = (pruned_by(trained, dataclasses.replace(context, data=d), images=300) for d in (context.data, data))
    assert usual.plan == blank.plan
    for name, tensor in usual.net.state_dict().items():
        assert torch.equal(tensor, blank.net.state_dict()[name]), name


@pytest.mark.parametrize("accumulated", [True, False])
def test_keeping_all_channels_returns_weights_and_biases(
    accumulated: bool, trained: nn.Module, context: Context
) -> None:
    """C' = c, layer after layer, to 1e-4."""
    run = LayerByLayer(trained, context.data, 300, 10, accumulated=accumulated, seed=0)
    whole = run.plan.widths
    run.prepare(whole)
    for group, size in whole.items():
        run.cut(group, range(size), run.readers(group))
    found = run.shrunk().state_dict()
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_reconstruction_saves_what_the_cut_destroys(trained: nn.Module, context: Context) -> None:
    accuracy = {on: evaluate(pruned_by(trained, context, reconstruct=on).net, context.data) for on in (True, False)}
    assert accuracy[True] > accuracy[False] + 10
    for alone, left in pruned_by(trained, context).history["errors"].values():
        assert left < alone


@pytest.mark.parametrize("selection", SELECTIONS)
def test_widths_are_those_of_every_method_at_the_budget(
    selection: Selection, trained: nn.Module, context: Context
) -> None:
    pruned = pruned_by(trained, context, selection=selection, images=300)
    space = ChannelSpace(trained, context.data.example)
    assert pruned.plan.widths == space.plan_for(space.scores("l1"), Budget(macs=0.4)).widths
    assert {g: c.out_channels for g, c in pruned.net.named_modules() if isinstance(c, nn.Conv2d)} == {
        g: width for g, width in pruned.plan.widths.items() if g.startswith("conv")
    }
    assert pruned.epochs == pytest.approx(2 * 300 / len(context.data.train.labels))
    if selection == "first k":
        assert all(kept == tuple(range(len(kept))) for kept in pruned.plan.keep.values())


@pytest.mark.parametrize("model", ["convnet-bn", "model-c", "resnet20", "resnet20-b", "densenet40"])
def test_the_masked_network_with_the_new_weights_is_the_shrunk_one(model: str, context: Context) -> None:
    net = build(model, shape=SHAPE, width=0.25, seed=0)
    method, (images, _) = ChannelPruning(), next(context.data.batches("val", 8))
    run = LayerByLayer(net, context.data, 250, 10, accumulated=True, seed=0)
    widths = method.widths(run.space, Budget(macs=0.5))
    some = {name: width for name, width in widths.items() if width < run.plan.widths[name]}
    some = dict(list(some.items())[:: max(1, len(some) // 4)])
    run.prepare(some)
    for name, width in some.items():
        readers = run.readers(name)
        run.cut(name, method.select([*readers.values()], run.space.plan({}).widths[name], width), readers)
    with torch.no_grad():
        torch.testing.assert_close(run.space.mask(run.plan)(images), run.shrunk()(images), rtol=1e-4, atol=1e-5)


def test_too_few_samples_are_refused_before_any_work(trained: nn.Module, context: Context) -> None:
    with pytest.raises(ValueError, match=r"layer 'conv2': 100 samples for \d+ unknowns per output"):
        pruned_by(trained, context, images=10)
    pruned_by(trained, context, images=10, reconstruct=False)


def test_columns_that_only_padding_fills_are_no_unknowns(context: Context) -> None:
    """model-c's last convolution sees maps of one pixel: one column of nine, and one position per image."""
    net = build("model-c", shape=SHAPE, width=0.25, seed=0)
    run = LayerByLayer(net, context.data, 30, 10, accumulated=True, seed=0)
    run.prepare({"conv3": 29})
    with pytest.raises(ValueError, match=r"layer 'conv4': 30 samples for 31 unknowns per output; at least 31"):
        run.prepare({"conv3": 30})


# -- residual networks ------------------------------------------------------------------------------------------------


def stream(net: nn.Module, images: Tensor) -> Tensor:
    """What the classifier of a `Block` reads: the mean of the block's output."""
    seen: list[Tensor] = []
    with net.linear.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0])):
        net(images)
    return seen[0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        y += x
        return self.linear(y.relu().mean((2, 3)))


@pytest.fixture(scope="module")
def block(context: Context) -> Block:
    torch.manual_seed(0)
    net = Block()
    fit(net, context.data, Recipe(epochs=1, lr=0.05, batch_size=32), seed=0, progress=False)
    return net


def test_samplers_feed_the_branch_only(block: Block, context: Context) -> None:
    space = ChannelSpace(with_samplers(block, context.data.example), context.data.example)
    assert isinstance(space.net.conv1[0], ChannelSelection)
    assert [(group.name, group.size) for group in space.groups] == [("conv1.select", 6), ("conv1.conv", 8)]
    small = space.shrink(space.plan({"conv1.select": [1, 4]}))
    assert small.conv1.conv.in_channels == 2 and small.stem.out_channels == 6 and small.linear.in_features == 6


def test_only_first_convolutions_of_branches_get_samplers() -> None:
    example = torch.zeros(1, 3, 32, 32)
    for model, expected in (("resnet20", 9), ("resnet20-b", 9), ("resnet164", 54), ("vgg11", 0)):
        net = with_samplers(build(model, seed=0, width=0.1), example)
        chosen = [name for name, m in net.named_modules() if isinstance(m, ChannelSelection)]
        assert len(chosen) == expected and all(name.endswith("conv1.select") for name in chosen)


def test_what_a_response_is_added_to(block: Block, context: Context) -> None:
    run = LayerByLayer(block, context.data, 10, 10, accumulated=True, seed=0)
    found = added_to(run.dense, run.calls["conv2"][0])
    assert found is not None and found.shortcut.name == "relu"
    sigma = (block.bn2.running_var + block.bn2.eps).sqrt()
    torch.testing.assert_close(found.scale, (sigma / block.bn2.weight).detach())
    assert added_to(run.dense, run.calls["stem"][0]) is None


def test_what_a_shortcut_lost_is_missed_in_units_of_the_response(context: Context) -> None:
    """Y2 − Y2' + (Y1 − Y1')·σ/γ, in the mean over all positions of all images."""
    torch.manual_seed(0)
    net = Block().eval()
    nn.init.uniform_(net.bn2.weight, 0.2, 3.0)
    nn.init.uniform_(net.bn2.running_var, 0.5, 4.0)
    run = LayerByLayer(net, context.data, 100, 64, accumulated=True, seed=0)
    run.prepare({"conv1.conv": 5})
    with torch.no_grad():
        run.space.net.stem.weight[2] *= 0.5
        missing = run.readers("conv1.conv")["conv2"].mean_e
        nets = (run.dense, run.space.net)
        y1, y1_now = (n.stem(run.batches[0]).relu() for n in nets)
        y2, y2_now = (n.conv2(n.bn1(n.conv1(y)).relu()) for n, y in zip(nets, (y1, y1_now), strict=True))
        scale = (net.bn2.running_var + net.bn2.eps).sqrt() / net.bn2.weight
        expected = (y2 - y2_now).mean((0, 2, 3)) + (y1 - y1_now).mean((0, 2, 3)) * scale
    torch.testing.assert_close(missing.float(), expected, rtol=1e-4, atol=1e-5)


def test_the_branch_repairs_a_disturbed_shortcut(block: Block, context: Context) -> None:
    """With Y1 − Y1' + Y2 as the target the block's output is nearer to the original's than with Y2."""
    images = context.data.normalise(context.data.train.images[:300])
    found = {}
    for aim in ("sum", "branch"):
        run = LayerByLayer(block, context.data, 300, 10, accumulated=True, seed=0)
        run.prepare({"conv1.conv": 5})
        with torch.no_grad():  # after the targets were sampled: the stream has drifted
            run.space.net.stem.weight[2] *= 0.5
        if aim == "branch":
            run.sums = {}
        readers = run.readers("conv1.conv")
        run.cut("conv1.conv", ChannelPruning().select([*readers.values()], 8, 5), readers)
        with torch.no_grad():
            original, pruned = (stream(net, images) for net in (run.dense, run.shrunk()))
        found[aim] = float((original - pruned).square().mean())
    assert found["sum"] < 0.8 * found["branch"]


def test_an_intercept_goes_into_the_batch_norm_or_stays_a_bias(block: Block, context: Context) -> None:
    pruned = pruned_by(block, context, macs=0.6, images=200)
    assert pruned.net.conv2.bias is None and pruned.net.linear.bias is not None
    assert not torch.equal(pruned.net.bn2.running_mean, block.bn2.running_mean)


# -- the paper's widths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "shallow", "deep"),
    [(2, (37, 74, 148), 442), (4, (24, 48, 95), 285), (5, (20, 40, 81), 243)],
)
def test_one_to_one_and_a_half_in_vgg16(target: int, shallow: tuple[int, int, int], deep: int) -> None:
    """VGG-16 at 224 pixels, convolutions only; the sheet's widths are those of the exact real factor."""
    space = ChannelSpace(build("vgg16", shape=(3, 224, 224), seed=0), torch.zeros(1, 3, 224, 224))
    convs = [f"conv{i}" for i in range(1, 14)]
    assert space.macs(scope="conv") == 15_346_630_656
    expected = [n for n, times in zip((*shallow, deep), (2, 2, 3, 3), strict=True) for _ in range(times)]
    found = ChannelPruning(ratios=RATIOS["vgg16"]).widths(space, Budget(macs=1 / target, scope="conv"))
    kept = space.macs(found, scope="conv") * target / space.macs(scope="conv")
    assert 0.98 < kept <= 1
    assert max(abs(found[name] - width) for name, width in zip(convs, expected, strict=False)) <= 1
    assert all(found[name] == 512 for name in convs[10:])


def test_the_released_vgg16_called_five_times_faster() -> None:
    """By our count 4.52 times, convolutions only."""
    space = ChannelSpace(build("vgg16", shape=(3, 224, 224), seed=0), torch.zeros(1, 3, 224, 224))
    released = (24, 22, 41, 51, 108, 89, 111, 184, 276, 228, 512, 512, 512)
    widths = {f"conv{i}": width for i, width in enumerate(released, start=1)}
    assert space.macs(widths, scope="conv") == 3_391_649_856


def test_the_released_resnet50() -> None:
    """The released widths give 2.597 of 3.856 billion multiply-adds, convolutions only, strides in the 1x1 layers."""
    released = {
        "2b": (101, 51, 39), "2c": (97, 50, 37), "3a": (144, 128, 106), "3b": (205, 105, 72), "3c": (198, 105, 72),
        "3d": (288, 128, 110), "4a": (278, 256, 225), "4b": (418, 209, 147), "4c": (407, 204, 158),
        "4d": (423, 212, 155), "4e": (412, 211, 148), "4f": (595, 256, 213), "5a": (606, 512, 433),
        "5b": (1222, 512, 437), "5c": (1147, 512, 440), "2a": (35, 64, 55),
    }  # fmt: skip
    net = build("resnet50", shape=(3, 224, 224))
    for stage in (net.layer2, net.layer3, net.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    example = torch.zeros(1, 3, 224, 224)
    space = ChannelSpace(with_samplers(net, example), example)
    assert space.macs(scope="conv") / 1e9 == pytest.approx(3.856, abs=5e-4)
    widths = {}
    for block_name, counts in released.items():
        inside = f"layer{int(block_name[0]) - 1}.{'abcdef'.index(block_name[1])}"
        names = (f"{inside}.conv1.select", f"{inside}.conv1.conv", f"{inside}.conv2")
        widths |= dict(zip(names, counts, strict=True))
    assert space.macs(widths, scope="conv") / 1e9 == pytest.approx(2.597, abs=1e-3)

    found = ChannelPruning(ratios=RATIOS["resnet50"]).widths(space, Budget(macs=2.597 / 3.856, scope="conv"))
    for name, width in widths.items():
        assert found[name] / width == pytest.approx(1, abs=0.07), name


def test_ratios_must_name_groups_that_can_be_cut(trained: nn.Module, context: Context) -> None:
    with pytest.raises(ValueError, match=r"ratios\['conv9'\]: the groups that can be cut are conv1, conv2, conv3"):
        pruned_by(trained, context, ratios={"conv9": 1.0})
    with pytest.raises(ValueError, match="ratios keep at least"):
        pruned_by(trained, context, macs=0.01, ratios={"conv1": 1.0})
    pruned = pruned_by(trained, context, macs=0.7, ratios={"conv2": 1.0}, images=200)
    assert pruned.plan.widths["conv1"] == 16 and pruned.plan.widths["conv2"] < 16
