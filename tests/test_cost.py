from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunelab import cost, models
from prunelab.layers import ColumnConv2d

# MACs


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (nn.Conv2d(3, 5, 3), 5 * 8 * 6 * 3 * 9),
        (nn.Conv2d(3, 5, 3, padding=1), 5 * 10 * 8 * 3 * 9),
        (nn.Conv2d(3, 5, 3, stride=2), 5 * 4 * 3 * 3 * 9),
        (nn.Conv2d(3, 5, 3, dilation=2), 5 * 6 * 4 * 3 * 9),
        (nn.Conv2d(3, 5, (1, 5), stride=(3, 1), padding=(0, 2)), 5 * 4 * 8 * 3 * 5),
        (nn.Conv2d(3, 6, 3, groups=3), 6 * 8 * 6 * 9),
    ],
)
def test_convolution_in_closed_form(conv: nn.Conv2d, expected: int) -> None:
    assert cost.macs(conv, torch.zeros(1, 3, 10, 8)) == expected


def test_linear_counts_every_position() -> None:
    assert cost.macs(nn.Linear(7, 4), torch.zeros(2, 7)) == 28
    assert cost.macs(nn.Linear(7, 4), torch.zeros(2, 5, 7)) == 5 * 28


@pytest.mark.parametrize(
    ("conv", "shape", "expected"),
    [
        (nn.Conv1d(3, 5, 3, stride=2), (10,), 5 * 4 * 3 * 3),
        (nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1)), (2, 5, 6), 4 * 2 * 5 * 6 * 2 * 9),
        (nn.ConvTranspose1d(3, 5, 4, stride=2), (10,), 3 * 10 * 5 * 4),
        (nn.ConvTranspose2d(3, 5, 2, stride=2), (4, 6), 3 * 4 * 6 * 5 * 4),  # in closed form also by its 8 x 12 outputs
        (nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1, output_padding=1, stride=2), (4, 6), 4 * 4 * 6 * 3 * 9),
        (nn.ConvTranspose3d(2, 3, 2), (2, 3, 4), 2 * 24 * 3 * 8),
    ],
    ids=repr,
)
@pytest.mark.parametrize("batch", [1, 3])
def test_other_convolutions_in_closed_form(conv: nn.Module, shape: tuple[int, ...], expected: int, batch: int) -> None:
    example = torch.zeros(batch, conv.in_channels, *shape)
    assert cost.macs(conv, example) == cost.macs(conv, example, "conv") == expected
    assert 2 * batch * expected == flops(conv, example)
    assert cost.breakdown(conv, example).macs.tolist() == [expected]


def test_a_transposed_convolution_may_be_called_by_keyword() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(output_size=[8, 8], input=x)

    assert cost.macs(Net(), torch.zeros(1, 2, 4, 4)) == 2 * 16 * 3 * 9


@pytest.mark.parametrize("bias", [True, False])
def test_parametrized_weights_are_counted(bias: bool) -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3, bias=bias))
    assert cost.macs(conv, torch.zeros(1, 3, 10, 8)) == 5 * 8 * 6 * 3 * 9
    table = cost.breakdown(conv, torch.zeros(1, 3, 10, 8))
    assert table.macs.sum() == 5 * 8 * 6 * 3 * 9
    assert table.parameters.sum() == cost.parameters(conv) == 5 * 27 + 5 + 5 * bias


def test_column_convolution_counts_the_columns_it_keeps() -> None:
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    columns = ColumnConv2d(conv, torch.tensor([0, 4, 13, 26]))
    example = torch.zeros(2, 3, 10, 8)
    assert cost.macs(columns, example) == cost.macs(columns, example, "conv") == 5 * 5 * 4 * 4
    assert cost.macs(conv, example) == 5 * 5 * 4 * 27


def test_scope_conv_leaves_linear_layers_out() -> None:
    net = models.build("model-c")
    example = torch.zeros(1, 3, 32, 32)
    assert cost.macs(net, example) - cost.macs(net, example, "conv") == 512 * 256 + 256 * 10


def test_layer_called_twice_counts_twice() -> None:
    conv = nn.Conv2d(2, 2, 1)
    net = nn.Sequential(conv, conv)
    assert cost.macs(net, torch.zeros(1, 2, 3, 3)) == 2 * 36
    assert cost.breakdown(net, torch.zeros(1, 2, 3, 3))["macs"].tolist() == [72]


@pytest.mark.parametrize("batch", [1, 4])
def test_batch_is_divided_out(batch: int) -> None:
    assert cost.macs(models.build("resnet20"), torch.zeros(batch, 3, 32, 32)) == 40_551_040


def flops(net: nn.Module, example: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net.eval()(example)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", models.NAMES)
def test_twice_the_macs_are_pytorchs_flops(name: str) -> None:
    net, example = models.build(name), torch.zeros(1, 3, 32, 32)
    assert 2 * cost.macs(net, example) == flops(net.to("meta"), example.to("meta"))


@pytest.mark.parametrize(
    "name",
    [
        "alexnet", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v2",
        "mobilenet_v3_small", "resnet18", "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5",
        "squeezenet1_1", "convnext_tiny",
    ],
)  # fmt: skip
def test_twice_the_macs_are_pytorchs_flops_on_torchvision(name: str) -> None:
    shape = (3, 96, 96)
    with torch.device("meta"):  # no weights: drawing them takes longer than all the counting
        net, example = models.build(name, shape=shape), torch.zeros(1, *shape)
    assert 2 * cost.macs(net, example) == flops(net, example)


class Scaled(nn.Module):
    """Weights that are no layer's: of two dimensions, or of one, however shaped."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.linear, self.weight = nn.Linear(4, 4), nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.weight


UNCOUNTED: dict[str, tuple[nn.Module, Tensor, int, str]] = {
    "recurrent": (nn.LSTM(3, 4, batch_first=True), torch.zeros(2, 5, 3), 0, r"the network itself \(LSTM\)$"),
    "attention": (
        nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        torch.zeros(2, 5, 8),
        5 * (8 * 8 + 8 * 16 + 16 * 8),
        r"not counted: 1\.self_attn \(MultiheadAttention\)$",
    ),
    "weights of no layer": (
        nn.Sequential(Scaled((4, 4)), Scaled((1, 4, 4))),
        torch.zeros(2, 4, 4),
        2 * 4 * 16,
        r"not counted: 0 \(Scaled\), 1 \(Scaled\)$",
    ),
}


@pytest.mark.parametrize("name", UNCOUNTED)
@pytest.mark.parametrize("count", [cost.macs, lambda net, x: cost.breakdown(net, x).macs.sum()])
def test_matrices_that_are_not_counted_are_named_once(count: Callable[[nn.Module, Tensor], int], name: str) -> None:
    net, example, macs, message = UNCOUNTED[name]
    with pytest.warns(UserWarning, match=message) as caught:
        assert count(net, example) == macs
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("layer", "example"),
    [
        (nn.Embedding(5, 3), torch.zeros(2, 5, dtype=torch.int64)),
        (nn.LayerNorm([3, 4, 4]), torch.zeros(2, 3, 4, 4)),
        (Scaled((1, 4, 1)), torch.zeros(2, 4, 4)),
        (nn.Identity(), torch.zeros(2, 4)),
    ],
)
def test_what_multiplies_by_no_matrix_is_not_warned_of(layer: nn.Module, example: Tensor) -> None:
    """Warnings are errors here; neither does a layer that the pass leaves out call for one."""
    layer.register_module("head", nn.LSTM(3, 3))
    assert cost.macs(layer, example) == (4 * 16 if isinstance(layer, Scaled) else 0)


def test_counting_leaves_the_network_alone() -> None:
    net = models.build("resnet20", seed=0)
    net.stage2.eval()  # as when some batch-norm layers are frozen
    modes = [module.training for module in net.modules()]
    tensors = list(net.state_dict(keep_vars=True).values())
    values = [tensor.detach().clone() for tensor in tensors]

    cost.macs(net, torch.zeros(2, 3, 32, 32))
    cost.breakdown(net, torch.zeros(2, 3, 32, 32))
    cost.latency(net, torch.zeros(2, 3, 32, 32), repeats=1, warmup=0)

    assert [module.training for module in net.modules()] == modes
    assert all(a is b for a, b in zip(net.state_dict(keep_vars=True).values(), tensors, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, values, strict=True))
    assert not any(module._forward_hooks for module in net.modules())


def test_failed_count_leaves_the_network_alone() -> None:
    net = models.build("convnet")
    with pytest.raises(ValueError, match=r"takes no input of shape \(1, 4, 32, 32\)"):
        cost.macs(net, torch.zeros(1, 4, 32, 32))
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())
    assert net.conv1.weight.device.type == "cpu"


# Parameters and bytes


def test_parameters_and_bytes_of_a_small_net() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert cost.parameters(net) == 4 * 27 + 4 + 2 * 4
    # Two running statistics of four floats and one 64-bit batch counter are stored besides the parameters.
    assert cost.size_bytes(net) == 4 * cost.parameters(net) + 2 * 4 * 4 + 8
    assert cost.size_bytes(net.to(torch.bfloat16)) == 2 * cost.parameters(net) + 2 * 4 * 2 + 8


def test_columns_cost_their_indices() -> None:
    columns = ColumnConv2d(nn.Conv2d(3, 5, 3, bias=False), torch.tensor([0, 4, 13, 26]))
    assert cost.parameters(columns) == 5 * 4
    assert cost.size_bytes(columns) == 5 * 4 * 4 + 4 * 8


def test_shared_parameter_counts_once() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    assert cost.parameters(nn.Sequential(first, second)) == 9


def test_breakdown_of_a_small_net() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    table = cost.breakdown(net, torch.zeros(5, 3, 4, 4))
    assert table.to_dict("list") == {
        "name": ["0", "1", "4"],
        "kind": ["Conv2d", "BatchNorm2d", "Linear"],
        "output": [(4, 2, 2), (4, 2, 2), (2,)],
        "macs": [4 * 4 * 27, 0, 32],
        "parameters": [4 * 28, 8, 34],
    }


def test_layer_that_returns_a_tuple_has_no_output_shape() -> None:
    class Attention(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            return super().forward(x, x, x)

    with pytest.warns(UserWarning, match=r"not counted: the network itself \(Attention\)"):
        table = cost.breakdown(Attention(4, 2), torch.zeros(2, 3, 4)).set_index("name")
    assert table.loc["", "output"] is None
    assert table["parameters"].sum() == 4 * (3 * 4 + 4) + 4 * 4


@pytest.mark.parametrize("name", models.NAMES)
def test_breakdown_adds_up(name: str) -> None:
    net, example = models.build(name, width=0.25), torch.zeros(1, 3, 32, 32)
    table = cost.breakdown(net, example)
    assert table["macs"].sum() == cost.macs(net, example)
    assert table["parameters"].sum() == cost.parameters(net)


# Latency


class Probe(nn.Module):
    """Notes the state of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[bool, bool, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, torch.is_inference_mode_enabled(), torch.get_num_threads()))
        return x


def test_latency_evaluates_after_a_warm_up_with_its_threads() -> None:
    probe, threads = Probe(), torch.get_num_threads()
    result = cost.latency(probe, torch.zeros(7, 1), repeats=3, warmup=2, threads=threads + 1)
    assert probe.calls == [(False, True, threads + 1)] * 5
    assert (result.batch, result.threads, result.device) == (7, threads + 1, "cpu")
    assert probe.training
    assert torch.get_num_threads() == threads


def test_latency_gives_the_median_and_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 4, 10, 11, 20, 25, 30, 32, 40, 43])  # passes of 4, 1, 5, 2 and 3 seconds
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    result = cost.latency(Probe(), torch.zeros(1, 1), repeats=5, warmup=1)
    assert (result.low, result.median, result.high) == (2, 3, 4)


def test_several_networks_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, turns = Probe(), Probe(), []
    passes = {first: iter([3.0, 1.0, 2.0]), second: iter([6.0, 9.0, 3.0])}
    monkeypatch.setattr(cost, "_seconds", lambda net, x: turns.append(net) or next(passes[net]))
    found = cost.latencies({"a": first, "b": second}, torch.zeros(2, 1), repeats=3, warmup=1)
    assert turns == [first, second] * 3
    assert {label: (time.low, time.median, time.high) for label, time in found.items()} == {
        "a": (1.5, 2.0, 2.5),
        "b": (4.5, 6.0, 7.5),
    }


def test_latency_restores_everything_when_the_network_fails() -> None:
    threads, net = torch.get_num_threads(), nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cost.latency(net, torch.zeros(1, 4), threads=threads + 1)
    assert net.training
    assert torch.get_num_threads() == threads


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, x: cost.macs(net, x, "linear"), "scope is 'linear'; it must be one of 'all', 'conv'"),
        (lambda net, x: cost.macs(net, x[:0]), r"at least one image, got shape \(0, 3\)"),
        (lambda net, x: cost.breakdown(net, x[0, 0]), r"at least one image, got shape \(\)"),
        (lambda net, x: cost.latency(net, x, repeats=0), "repeats is 0; it must be an integer >= 1"),
        (lambda net, x: cost.latency(net, x, warmup=-1), "warmup is -1; it must be an integer >= 0"),
        (lambda net, x: cost.latency(net, x, threads=0), "threads is 0; it must be an integer >= 1"),
    ],
)
def test_bad_input_is_named(call: Callable[[nn.Module, Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(nn.Linear(3, 3), torch.zeros(2, 3))


def test_counting_leaves_computed_weights_where_they_are() -> None:
    net = nn.utils.spectral_norm(nn.Conv2d(3, 5, 3))
    before = net.weight
    assert cost.macs(net, torch.zeros(1, 3, 8, 8)) == 5 * 3 * 9 * 36
    assert net.weight is before


def test_a_forward_may_make_constants() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1))

    assert cost.macs(Scaled(3, 4, 3, padding=1), torch.zeros(1, 3, 6, 6)) == 36 * 9 * 3 * 4
