"""Columns of the im2col matrix: the space, and the convolution that keeps some of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunelab import cost, layers, models
from prunelab.layers import ColumnConv2d, ZeroPadChannels
from prunelab.structure import Budget, ChannelSpace, ColumnSpace, UntraceableError

CONVOLUTIONS = [
    nn.Conv2d(3, 5, 3),
    nn.Conv2d(3, 5, 3, padding=1, bias=False),
    nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(0, 1)),
    nn.Conv2d(3, 4, 3, stride=2, padding=2, dilation=2),
    nn.Conv2d(3, 4, (1, 3), stride=(1, 2), padding=(1, 2), dilation=(1, 3)),
    nn.Conv2d(4, 3, 1, stride=2),
]


def some_columns(conv: nn.Conv2d, seed: int = 0) -> Tensor:
    width = conv.weight[0].numel()
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))[: max(1, width // 2)].sort().values


def image(channels: int) -> Tensor:
    return torch.randn(2, channels, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_loops(conv: nn.Conv2d, columns: Tensor, x: Tensor) -> Tensor:
    """Convolve one multiply-add at a time, over the given columns only."""
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = conv.kernel_size, conv.stride, conv.dilation, conv.padding
    assert not isinstance(ph, str)
    batch, _, height, width = x.shape
    shape = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    y = torch.zeros(batch, conv.out_channels, *shape, dtype=x.dtype)
    if conv.bias is not None:
        y += conv.bias.view(-1, 1, 1)
    for row, column in np.ndindex(*shape):
        for j in columns.tolist():
            channel, dy, dx = j // (kh * kw), j // kw % kh, j % kw
            top, left = row * sh + dy * dh - ph, column * sw + dx * dw - pw
            if 0 <= top < height and 0 <= left < width:
                y[:, :, row, column] += x[:, channel, top, left, None] * conv.weight[:, channel, dy, dx]
    return y


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_is_the_convolution_by_loops(conv: nn.Conv2d) -> None:
    conv, x = conv.double(), image(conv.in_channels)
    columns = some_columns(conv)
    layer = ColumnConv2d(conv, columns)
    with torch.no_grad():
        gathered, expected = layer(x), by_loops(conv, columns, x)
    with torch.inference_mode():
        assert torch.equal(layer(x), gathered)
    assert torch.equal(layer(x).detach(), gathered)
    zeroed = torch.zeros_like(conv.weight).flatten(1)
    zeroed[:, columns] = conv.weight.detach().flatten(1)[:, columns]
    zeroed = zeroed.view_as(conv.weight)
    assert torch.equal(layer.dense_weight(), zeroed)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(gathered, expected, **close)
    dense = F.conv2d(x, zeroed, conv.bias, conv.stride, conv.padding, conv.dilation).detach()
    torch.testing.assert_close(gathered, dense, **close)


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_gradients_are_the_dense_ones_at_the_kept_columns(conv: nn.Conv2d) -> None:
    conv, x = conv.double(), image(conv.in_channels).requires_grad_()
    columns = some_columns(conv)
    layer = ColumnConv2d(conv, columns)
    zeroed = layer.dense_weight().detach().requires_grad_()
    expected = F.conv2d(x, zeroed, conv.bias, conv.stride, conv.padding, conv.dilation)
    weights = torch.randn(expected.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    dense = torch.autograd.grad((expected * weights).sum(), [zeroed, x])
    found = torch.autograd.grad((layer(x) * weights).sum(), [layer.weight, x])
    torch.testing.assert_close(found[0], dense[0].flatten(1)[:, columns], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], dense[1], rtol=1e-12, atol=1e-12)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[nn.Conv2d, Tensor, Tensor, int]:
    """Draw a convolution, some of its columns, an input, and how many values make a block."""
    size = st.tuples(st.integers(1, 3), st.integers(1, 3))
    channels, filters, seed = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    conv = nn.Conv2d(
        channels, filters, draw(size), draw(size), draw(st.tuples(st.integers(0, 3), st.integers(0, 3))), draw(size)
    ).double()
    columns = torch.tensor(sorted(draw(st.sets(st.integers(0, conv.weight[0].numel() - 1), min_size=1))))
    x = torch.randn(draw(st.integers(1, 3)), channels, *draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))).double()
    layout = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    return conv, columns, x.contiguous(memory_format=layout), draw(st.sampled_from([1, 50, 2**19]))


@settings(max_examples=150, deadline=None)
@given(geometries())
def test_outputs_and_gradients_are_the_dense_ones(case: tuple[nn.Conv2d, Tensor, Tensor, int]) -> None:
    conv, columns, x, block = case
    (kh, kw), (dy, dx) = conv.kernel_size, conv.dilation
    assert not isinstance(conv.padding, str)
    assume(x.shape[2] + 2 * conv.padding[0] > dy * (kh - 1) and x.shape[3] + 2 * conv.padding[1] > dx * (kw - 1))
    layer, x = ColumnConv2d(conv, columns), x.requires_grad_()
    kernel = layer.dense_weight().detach().requires_grad_()
    expected = F.conv2d(x, kernel, conv.bias, conv.stride, conv.padding, conv.dilation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_BLOCK", block)
        found = layer(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    dense = torch.autograd.grad(expected, [x, kernel, conv.bias], weights)
    ours = torch.autograd.grad(found, [x, layer.weight, layer.bias], weights)
    for gradient, reference in zip(ours, (dense[0], dense[1].flatten(1)[:, columns], dense[2]), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


def test_gradients_are_the_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_BLOCK", 60)
    conv = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)).double()
    layer, x = ColumnConv2d(conv, torch.tensor([0, 3, 4, 7, 11])), torch.randn(2, 2, 7, 4, dtype=torch.float64)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    inputs = [t.detach().requires_grad_() for t in (x, layer.weight, layer.bias)]
    assert torch.autograd.gradcheck(call, inputs)


def test_only_the_gradients_asked_for_are_computed() -> None:
    layer, x = ColumnConv2d(nn.Conv2d(2, 3, 3), torch.arange(5)), torch.randn(1, 2, 5, 5)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad.tolist() == [9.0, 9.0, 9.0]


def test_a_batch_of_none() -> None:
    assert ColumnConv2d(nn.Conv2d(2, 3, 3), torch.arange(5))(torch.zeros(0, 2, 5, 6)).shape == (0, 3, 3, 4)


def test_the_state_is_weights_and_columns() -> None:
    conv, x = CONVOLUTIONS[1].double(), image(3)
    layer, other = (ColumnConv2d(conv, some_columns(conv, seed)) for seed in (0, 1))
    assert list(layer.state_dict()) == ["weight", "columns"]
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_an_exported_graph_holds_the_dense_convolution() -> None:
    conv = CONVOLUTIONS[3].double()
    layer, x = ColumnConv2d(conv, some_columns(conv)).eval(), image(3)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x), rtol=0, atol=1e-12)


def test_under_autocast_it_learns_as_the_dense_convolution_does() -> None:
    conv = copy.deepcopy(CONVOLUTIONS[3]).float()
    layer, x = ColumnConv2d(conv, some_columns(conv)), image(3).float()
    with torch.autocast("cpu"):
        y = layer(x)
        y.square().mean().backward()
    kernel = layer.dense_weight().detach().requires_grad_()
    with torch.autocast("cpu"):
        dense = F.conv2d(x, kernel, layer.bias, layer.stride, layer.padding, layer.dilation)
        dense.square().mean().backward()
    assert torch.equal(y, dense)
    assert torch.equal(layer.weight.grad, kernel.grad.flatten(1)[:, layer.columns])


@pytest.mark.parametrize("shape", [(2, 4, 9, 9), (3, 9, 9), (1, 3, 2, 9)], ids=str)
def test_inputs_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    layer = ColumnConv2d(nn.Conv2d(3, 5, 3), torch.arange(4))
    with pytest.raises(ValueError, match=r"ColumnConv2d.* takes no input of shape \(" + ", ".join(map(str, shape))):
        layer(torch.zeros(shape))


def test_a_kernel_of_two_convolutions_is_refused_and_one_called_twice_is_cut() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3)).double()
    net[2].weight = net[0].weight
    with pytest.raises(UntraceableError, match="columns of '0' cannot be cut: 0 and 2 share its kernel"):
        ColumnSpace(net, image(3))
    net[2] = net[0]
    space = ColumnSpace(net, image(3))
    plan = space.plan({"0": [0, 4, 9]})
    small = space.shrink(plan)
    torch.testing.assert_close(small(image(3)), space.mask(plan)(image(3)), rtol=0, atol=1e-12)
    assert space.macs(plan) == cost.macs(small, image(3)) == 3 * 3 * (7 * 6 + 5 * 4)


@pytest.mark.parametrize(
    "options", [{"groups": 2}, {"padding": "same"}, {"padding_mode": "reflect", "padding": 1}], ids=str
)
def test_other_convolutions_are_refused(options: dict[str, object]) -> None:
    conv = nn.Conv2d(4, 4, 3, **options)
    with pytest.raises(ValueError, match="ColumnConv2d takes a convolution of groups=1"):
        ColumnConv2d(conv, torch.arange(3))
    if "groups" not in options:
        with pytest.raises(UntraceableError, match="columns of '1' cannot be cut"):
            ColumnSpace(nn.Sequential(nn.Conv2d(3, 4, 1), conv), torch.zeros(1, 3, 6, 6))


def test_grouped_convolutions_keep_their_columns_but_count() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    example = torch.zeros(1, 3, 8, 8)
    space = ColumnSpace(net, example)
    assert [(group.name, group.size) for group in space.groups] == [("0", 27)]
    assert space.macs() == cost.macs(net, example) == 4 * 27 * 36 + 4 * 2 * 9 * 16


@pytest.mark.parametrize("name", ["convnet", "convnet-bn", "vgg11", "resnet20", "resnet20-b", "densenet40"])
@torch.no_grad()
def test_masked_and_small_network_agree(name: str) -> None:
    net = models.build(name, width=0.25, seed=0).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    space, random = ColumnSpace(net, x), np.random.default_rng(0)
    for counts in ([1] * len(space.groups), random.integers(1, space.sizes + 1).tolist(), space.sizes.tolist()):
        keep = {
            g.name: random.choice(g.size, n, replace=False).tolist() for g, n in zip(space.groups, counts, strict=True)
        }
        plan = space.plan(keep)
        masked, small = space.mask(plan), space.shrink(plan)
        expected, full = masked(x), plan.widths == plan.sizes
        torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
        assert torch.equal(expected, net(x)) == full
        assert (cost.parameters(small) < cost.parameters(net)) != full
        for scope in ("all", "conv"):
            assert space.macs(plan, scope) == cost.macs(small, x, scope)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_half_of_the_columns_are_half_of_the_macs() -> None:
    net, example = models.build("convnet", seed=0), torch.zeros(1, 3, 32, 32)
    space = ColumnSpace(net, example)
    assert [group.size for group in space.groups] == [75, 800, 800]
    plan = space.plan_for(space.scores("l1"), {"conv1": 75, "conv2": 400, "conv3": 400})
    # conv1's 75 columns are odd; the others are cut in exact halves.
    assert space.macs(plan, "conv") == 32 * 32 * 32 * 75 // 1 + (12_288_000 - 32 * 32 * 32 * 75) // 2
    even = models.build("convnet", shape=(4, 32, 32))
    space = ColumnSpace(even, torch.zeros(1, 4, 32, 32))
    plan = space.plan_for(space.scores("l1"), [0.5, 0.5, 0.5])
    assert space.macs(scope="conv") == 2 * space.macs(plan, "conv")
    assert cost.macs(space.shrink(plan), torch.zeros(1, 4, 32, 32), "conv") * 2 == space.macs(scope="conv")


def test_a_budget_of_columns_is_met_to_a_percent() -> None:
    space = ColumnSpace(models.build("convnet", seed=0), torch.zeros(1, 3, 32, 32))
    for fraction in (0.5, 0.25, 0.125):
        plan = space.plan_for(space.scores("l1"), Budget(macs=fraction, scope="conv"))
        assert fraction - 0.01 < space.macs(plan, "conv") / 12_288_000 <= fraction


def test_scores_of_columns_sum_over_the_filters() -> None:
    net = models.build("convnet", seed=0)
    space = ColumnSpace(net, torch.zeros(1, 3, 32, 32))
    assert torch.equal(space.unit_weights("conv2"), net.conv2.weight.reshape(32, 800).t())
    torch.testing.assert_close(space.scores("l1")["conv2"], net.conv2.weight.abs().sum(0).flatten())


def test_whole_convolutions_stay_plain() -> None:
    net = models.build("convnet", seed=0)
    space = ColumnSpace(net, torch.zeros(1, 3, 32, 32))
    small = space.shrink(space.plan({"conv2": [7, 1]}))
    assert [type(small.get_submodule(f"conv{i}")) for i in (1, 2, 3)] == [nn.Conv2d, ColumnConv2d, nn.Conv2d]
    assert small.conv2.columns.tolist() == [1, 7]
    assert torch.equal(small.conv2.weight, net.conv2.weight.flatten(1)[:, [1, 7]])
    assert "columns=2/800" in repr(small.conv2)


def test_plans_of_the_two_spaces_are_not_mixed_up() -> None:
    net, example = models.build("convnet"), torch.zeros(1, 3, 32, 32)
    columns, channels = ColumnSpace(net, example), ChannelSpace(net, example)
    for space, plan in ((columns, channels.plan({})), (channels, columns.plan({}))):
        for use in (space.mask, space.shrink, space.macs, space.gates):
            with pytest.raises(ValueError, match=f"does not fit this network, which has {space.kind}"):
                use(plan)


def test_zero_padding_of_channels() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = ZeroPadChannels(2, 1)(x)
    assert y.shape == (2, 6, 4, 4)
    assert torch.equal(y[:, 2:5], x)
    assert not y[:, :2].any()
    assert not y[:, 5:].any()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
