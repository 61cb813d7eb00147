"""After pruning: batch norm folded exactly, files that give the network back, ONNX with the same outputs, and times."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_channels import Net, conv, network, plans, randomise
from torch import Tensor, nn
from torchvision.models import DenseNet, MobileNetV2

from prunelab import cost, deploy, models
from prunelab.data import load
from prunelab.layers import ColumnConv2d
from prunelab.methods.channel_pruning import ChannelPruning
from prunelab.structure import Budget, ChannelSpace, ColumnSpace, Space, UntraceableError
from prunelab.training import Context, Recipe

SHAPE = 3, 32, 32
EXAMPLE = torch.zeros(1, *SHAPE)


def images(count: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def norms(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def halved(kind: type[Space], net: nn.Module, budget: float = 0.5) -> nn.Module:
    space = kind(net, EXAMPLE)
    return space.shrink(space.plan_for(space.scores("l1"), Budget(budget)))


# Batch norm


@torch.no_grad()
def assert_folded(net: nn.Module, x: Tensor, left: list[str]) -> None:
    folded, expected = deploy.fold_batch_norm(net), net.eval()(x)
    assert norms(folded) == left
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("convnet-bn", ChannelSpace), ("convnet-bn", ColumnSpace), ("resnet20-b", ColumnSpace), ("vgg16", ChannelSpace),
        ("mobilenet_v2", ChannelSpace), ("regnet_y_400mf", ChannelSpace), ("shufflenet_v2_x0_5", ChannelSpace),
    ],
)  # fmt: skip
def test_every_batch_norm_behind_a_layer_is_folded(name: str, kind: type[Space]) -> None:
    net, x = network(name)
    space = kind(net, x)
    small = space.shrink(plans(space)["random"])
    assert norms(small)
    assert_folded(small, x, [])


def test_batch_norm_in_front_of_layers_stays() -> None:
    net, x = network("densenet40")
    assert_folded(net, x, norms(net))  # each reads a concatenation, or a stem that others read
    small, x = densenet(), images(2).double()
    behind = ["features.norm0", *(f"features.denseblock{i}.denselayer{j}.norm2" for i in (1, 2) for j in (1, 2))]
    assert_folded(randomise(small), x, [name for name in norms(small) if name not in behind])


PAIR = {"a": conv(3, 4), "n": nn.BatchNorm2d(4)}
KEPT: dict[str, Net] = {
    "another reader of the layer": Net(lambda s, x: s.n(y := s.a(x)) + y, **PAIR),
    "a layer called twice": Net(lambda s, x: s.n(s.a(x)) + s.m(s.a(-x)), **PAIR, m=nn.BatchNorm2d(4)),
    "a batch norm called twice": Net(lambda s, x: s.n(s.a(x)) + s.n(s.b(x)), **PAIR, b=conv(3, 4)),
    "weights read elsewhere": Net(lambda s, x: s.n(s.a(x)) + nn.functional.conv2d(x, s.a.weight, padding=1), **PAIR),
    "something in between": Net(lambda s, x: s.n(s.a(x).relu()), **PAIR),
    "no running statistics": Net(
        lambda s, x: s.n(s.a(x)), a=conv(3, 4), n=nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "computed weights": Net(
        lambda s, x: s.n(s.a(x)), a=nn.utils.parametrizations.weight_norm(conv(3, 4)), n=nn.BatchNorm2d(4)
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_batch_norm_that_is_not_the_only_reader_stays(case: str) -> None:
    net = KEPT[case].double()
    for norm in map(net.get_submodule, norms(net)):
        if norm.track_running_stats:
            randomise(norm)
    assert_folded(net, images(2, (3, 6, 6)).double(), norms(net))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_behind_a_linear_layer_is_folded(affine: bool) -> None:
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(108, 5, bias=False), nn.BatchNorm1d(5, affine=affine), nn.ReLU()
    ).double()
    net[2].running_mean.uniform_(-1, 1)
    net[2].running_var.uniform_(0.5, 2)
    assert_folded(net, images(3, (3, 6, 6)).double(), [])


def test_folding_leaves_the_network_as_it_was_and_keeps_its_memory_format() -> None:
    net = models.build("convnet-bn", width=0.5, seed=0).to(memory_format=torch.channels_last).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    folded = deploy.fold_batch_norm(net)
    assert net.training
    assert not any(module.training for module in folded.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert folded.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_forward_that_depends_on_values_cannot_be_folded() -> None:
    with pytest.raises(UntraceableError, match="Net cannot be traced: it has a forward that depends on values"):
        deploy.fold_batch_norm(Net(lambda s, x: s.n(s.a(x)) if x.sum() > 0 else x, **PAIR))


# Files

FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from prunelab import deploy
torch.set_num_threads(1)
net = deploy.load(sys.argv[1])
images = load_file(sys.argv[2])["images"].contiguous(memory_format=torch.channels_last)
with torch.inference_mode():
    save_file({"outputs": net(images).clone()}, sys.argv[3])
sys.exit(any(name.startswith("onnx") for name in sys.modules))  # which take a while to import
"""


def cut_twice(net: nn.Module) -> tuple[nn.Module, list[deploy.Plan]]:
    """Cut channels first, then columns of what is left."""
    channels = ChannelSpace(net, EXAMPLE)
    first = channels.plan_for(channels.scores("l1"), Budget(0.5))
    columns = ColumnSpace(channels.shrink(first), EXAMPLE)
    second = columns.plan_for(columns.scores("l1"), Budget(0.5))
    return columns.shrink(second), [first, second]


def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    dense = randomise(models.build("resnet20-b", seed=3, width=0.5)).float().to(memory_format=torch.channels_last)
    small, cuts = cut_twice(dense)
    deploy.save(tmp_path / "small", small, cuts, shape=SHAPE, model="resnet20-b", width=0.5)
    save_file({"images": images(4)}, tmp_path / "images")
    command = [sys.executable, "-c", FRESH, *(str(tmp_path / name) for name in ("small", "images", "outputs"))]
    subprocess.run(command, check=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        expected = small.eval()(images(4).contiguous(memory_format=torch.channels_last))
    torch.set_num_threads(threads)
    assert torch.equal(load_file(tmp_path / "outputs")["outputs"], expected)
    again = deploy.load(tmp_path / "small")
    assert again.state_dict().keys() == small.state_dict().keys()
    for name, tensor in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert again.state_dict()[name].is_contiguous() == tensor.is_contiguous()
        assert again.state_dict()[name].dtype == tensor.dtype
    assert not any(module.training for module in again.modules())
    assert [type(m) for m in again.modules()] == [type(m) for m in small.modules()]


def test_the_file_is_plain_data(tmp_path: Path) -> None:
    dense = models.build("convnet-bn", width=0.25, seed=0)
    small, cuts = cut_twice(dense)
    deploy.save(tmp_path / "small.safetensors", small, cuts, shape=SHAPE, model="convnet-bn", width=0.25)
    raw = (tmp_path / "small.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    recipe = json.loads(header["__metadata__"]["prunelab"])
    assert recipe["model"] == "convnet-bn"
    assert [plan["space"] for plan in recipe["plans"]] == ["channels", "columns"]
    assert recipe["plans"][0]["keep"] == {group: list(kept) for group, kept in cuts[0].keep.items()}
    assert load_file(tmp_path / "small.safetensors").keys() == small.state_dict().keys()
    assert len(raw) < 1.2 * cost.size_bytes(small) + 30_000


class Tied(nn.Module):
    """A user's own network, with one kernel in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.b.weight = self.a.weight
        self.a.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(x))


def test_a_users_own_network_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, other = Tied().double(), Tied()
    space = ChannelSpace(dense, EXAMPLE.double())
    plan = space.plan({"a": [1, 2]})
    small = space.shrink(plan).eval()
    deploy.save(tmp_path / "own", small, plan, shape=SHAPE)
    again = deploy.load(tmp_path / "own", other)
    assert torch.equal(again(images(2).double()), small(images(2).double()))  # the type too is that of the file
    assert again.a.weight is again.b.weight
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in small.parameters()]
    assert other.a.weight.shape == (4, 3, 3, 3)
    assert other.a.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="own was saved without the name of a model: give load the dense network"):
        deploy.load(tmp_path / "own")
    with pytest.raises(ValueError, match=r"own does not fit its network: Plan\(channels; a: 2/4\) does not fit"):
        deploy.load(tmp_path / "own", models.build("convnet"))


def test_a_network_that_was_not_cut_comes_back(tmp_path: Path) -> None:
    dense = models.build("convnet", width=0.25, classes=4, seed=1).eval()
    deploy.save(tmp_path / "dense", dense, [], shape=SHAPE, model="convnet", width=0.25, classes=4)
    assert torch.equal(deploy.load(tmp_path / "dense")(images(2)), dense(images(2)))


def saved(folder: Path) -> Path:
    net = models.build("convnet-bn", width=0.25, seed=0)
    space = ChannelSpace(net, EXAMPLE)
    plan = space.plan_for(space.scores("l1"), Budget(0.5))
    deploy.save(folder / "small", space.shrink(plan), plan, shape=SHAPE, model="convnet-bn", width=0.25)
    return folder / "small"


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "a short header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "truncated weights": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a pickle": lambda path: torch.save(models.build("convnet").state_dict(), path),
    "other tensors": lambda path: save_file({"conv1.weight": torch.zeros(1)}, path),
    "no plans": lambda path: save_file({"x": torch.zeros(1)}, path, {"prunelab": "{}"}),
    "no JSON": lambda path: save_file({"x": torch.zeros(1)}, path, {"prunelab": "{"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = saved(tmp_path)
    DAMAGE[damage](path)
    with pytest.raises(ValueError, match=r"small is damaged, or is not a network that deploy.save wrote") as caught:
        deploy.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere"):
        deploy.load(tmp_path / "nowhere")


def test_the_wrong_plan_is_not_saved_and_the_old_file_stays(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    net = models.build("convnet-bn", width=0.25, seed=0)
    space = ChannelSpace(net, EXAMPLE)
    plan = space.plan_for(space.scores("l1"), Budget(0.5))
    small = space.shrink(plan)
    for wrong in (space.plan({}), [], [plan, ColumnSpace(small, EXAMPLE).plan({"conv2": [0]})]):
        with pytest.raises(ValueError, match=r"small: the tensors are not those of Sequential cut by these plans: \w+"):
            deploy.save(path, small, wrong, shape=SHAPE, model="convnet-bn", width=0.25)
    with pytest.raises(ValueError, match=r"bn1.bias would be \(\d+,\), is absent"):
        deploy.save(path, deploy.fold_batch_norm(small), plan, shape=SHAPE, model="convnet-bn", width=0.25)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]


def test_biases_that_channel_pruning_left_come_back(tmp_path: Path) -> None:
    dense = nn.Sequential(conv(1, 6, bias=False), nn.ReLU(), conv(6, 4, bias=False), nn.Flatten(), nn.Linear(256, 10))
    context = Context(load("digits"), Recipe(epochs=1, lr=0.01, batch_size=32), seed=0, progress=False)
    pruned = ChannelPruning(images=200)(randomise(dense).float(), Budget(0.5, "conv"), context)
    assert pruned.net.get_submodule("2").bias is not None
    deploy.save(tmp_path / "cut", pruned.net, pruned.plan, shape=(1, 8, 8))
    x = images(2, (1, 8, 8))
    assert torch.equal(deploy.load(tmp_path / "cut", dense)(x), pruned.net.eval()(x))


# ONNX


def mobilenet() -> nn.Module:
    return MobileNetV2(num_classes=5, width_mult=0.25, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]])


def densenet() -> nn.Module:
    return DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=5)


SMALL: dict[str, Callable[[], nn.Module]] = {
    "convnet-bn": lambda: halved(ChannelSpace, models.build("convnet-bn", width=0.5)),
    "resnet20": lambda: halved(ChannelSpace, models.build("resnet20", width=0.5)),
    "mobilenet": lambda: halved(ChannelSpace, mobilenet()),
    "densenet": lambda: halved(ChannelSpace, densenet()),
    "columns": lambda: halved(ColumnSpace, models.build("convnet-bn", width=0.5)),
}


@pytest.mark.parametrize("name", SMALL)
def test_onnx_runtime_computes_the_same(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    small = SMALL[name]()
    folded = deploy.fold_batch_norm(randomise(small).float())
    folded.train()
    found = deploy.export_onnx(folded, EXAMPLE, tmp_path / "small.onnx")
    assert found < deploy.TOLERANCE
    assert folded.training
    exported = deploy.OnnxNet(tmp_path / "small.onnx", threads=1)
    for batch in (1, 5):
        with torch.no_grad():
            expected = folded.eval()(images(batch))
        torch.testing.assert_close(exported(images(batch)), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["small.onnx"]


def test_columns_are_written_as_the_kernel_with_zeros(tmp_path: Path) -> None:
    small = SMALL["columns"]()
    assert any(isinstance(layer, ColumnConv2d) for layer in small.modules())
    plain = deploy._with_dense_kernels(small).eval()
    assert [type(layer) for layer in plain if "Conv" in type(layer).__name__] == [nn.Conv2d] * 3
    with torch.no_grad():
        torch.testing.assert_close(plain(images(2)), small.eval()(images(2)), rtol=1e-5, atol=1e-5)


def test_wrong_outputs_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    honest = deploy._to_onnx
    monkeypatch.setattr(deploy, "_to_onnx", lambda net, x: honest(nn.Sequential(*net, nn.Softplus()), x))
    with pytest.raises(RuntimeError, match=r"wrong.onnx is not written: ONNX Runtime's outputs differ .* by \d"):
        deploy.export_onnx(net, images(1, (3, 2, 2)), tmp_path / "wrong.onnx")
    assert not list(tmp_path.iterdir())


def test_a_head_of_zeros_is_exported(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    assert deploy.export_onnx(net, images(1, (3, 2, 2)), tmp_path / "zeros.onnx") == 0


def test_only_float32_on_the_cpu_is_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="computes in float32 on the CPU"):
        deploy.export_onnx(models.build("convnet").double(), EXAMPLE.double(), tmp_path / "net.onnx")


# Times


def test_the_report_says_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = models.build("convnet", width=0.25, seed=0)
    nets = {"dense": dense, "cut": halved(ChannelSpace, dense)}
    macs = {label: cost.macs(net, EXAMPLE) for label, net in nets.items()}
    turns: list[tuple[str, int]] = []

    def seconds(net: nn.Module, example: Tensor) -> float:
        label = next((label for label, known in nets.items() if known is net), "onnx")
        turns.append((label, len(example)))
        return len(example) * (0.5 if label == "cut" else 2.0)

    monkeypatch.setattr(cost, "_seconds", seconds)
    options = {"threads": 1, "repeats": 2, "warmup": 1, "progress": False}
    table = deploy.report(nets, EXAMPLE, batches=(1, 3), runtimes=("torch",), **options)
    assert turns == [("dense", 1), ("cut", 1)] * 2 + [("dense", 3), ("cut", 3)] * 2
    assert table[["runtime", "batch", "threads", "device"]].drop_duplicates().to_numpy().tolist() == [
        ["torch", 1, 1, "cpu"],
        ["torch", 3, 1, "cpu"],
    ]
    assert table.milliseconds.tolist() == table.low.tolist() == table.high.tolist() == [2000, 500, 6000, 1500]
    assert table.speedup.tolist() == [1, 4, 1, 4]
    assert table.macs.tolist() == [macs["dense"], macs["cut"]] * 2
    assert table.macs_reduction.tolist() == [1, macs["dense"] / macs["cut"]] * 2
    assert table.parameters.tolist()[:2] == [cost.parameters(net) for net in nets.values()]


def test_both_runtimes_are_timed() -> None:
    nets, one = {"conv": nn.Sequential(conv(3, 4), nn.ReLU())}, images(1, (3, 8, 8))
    table = deploy.report(nets, one, batches=(1, 2), threads=1, repeats=3, warmup=1, progress=False)
    assert table.runtime.tolist() == ["torch", "torch", "onnxruntime", "onnxruntime"]
    assert table.batch.tolist() == [1, 2, 1, 2]
    assert (table.low <= table.milliseconds).all()
    assert (table.milliseconds <= table.high).all()
    assert np.isfinite(table.speedup).all()


def test_a_network_that_onnx_runtime_does_not_take_is_timed_by_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    nets, one = {"double": nn.Sequential(conv(3, 4), nn.ReLU()).double()}, images(1, (3, 8, 8)).double()
    options = {"batches": (1,), "repeats": 1, "warmup": 0, "progress": False}
    assert deploy.report(nets, one, **options).runtime.tolist() == ["torch"]
    monkeypatch.setattr(cost, "_seconds", lambda net, example: pytest.fail("timed before the refusal"))
    with pytest.raises(ValueError, match="ONNX Runtime computes in float32 on the CPU"):
        deploy.report(nets, one, runtimes=["torch", "onnxruntime"], **options)


def test_a_network_on_a_gpu_is_timed_by_torch_alone() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    net = nn.Sequential(conv(3, 4), nn.ReLU()).cuda()
    table = deploy.report({"net": net}, images(1, (3, 8, 8)).cuda(), batches=(1,), progress=False)
    assert table[["runtime", "device"]].to_numpy().tolist() == [["torch", "cuda:0"]]


def timed(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, list[float]]) -> Callable[[], object]:
    """Return a report on a network, its half and a copy of it, whose passes take so long."""
    dense = models.build("convnet", width=0.25, seed=0)
    nets = {"dense": dense, "half": halved(ChannelSpace, dense), "copy": models.build("convnet", width=0.25, seed=1)}
    passes = {nets[label]: iter(2 * times) for label, times in seconds.items()}
    monkeypatch.setattr(cost, "_seconds", lambda net, example: next(passes[net]))
    options = {"batches": (1, 4), "runtimes": ("torch",), "repeats": 3, "warmup": 0, "progress": False}
    return lambda: deploy.report(nets, EXAMPLE, **options)


def test_fewer_multiply_adds_in_more_time_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quartiles of 1, 2 and 3 seconds are 1.5 and 2.5, of 3, 4 and 5 they are 3.5 and 4.5."""
    report = timed(monkeypatch, {"dense": [1, 2, 3], "half": [3, 4, 5], "copy": [7, 7, 7]})
    expected = (
        r"half has 2\.\d\d times fewer multiply-adds than dense, and is slower: 0\.50 times as fast \(torch, batch "
    )
    with pytest.warns(UserWarning, match=rf"^{expected}1\); {expected}4\)$") as caught:
        report()
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("half", [[2, 3, 4], [1, 2, 3], [1, 1, 1]], ids=["within the noise", "as fast", "faster"])
def test_what_is_not_slower_outside_of_the_noise_is_not_named(
    monkeypatch: pytest.MonkeyPatch, half: list[float]
) -> None:
    """Warnings are errors here: quartiles of 2, 3 and 4 seconds begin at 2.5, where those of the dense network end."""
    timed(monkeypatch, {"dense": [1, 2, 3], "half": half, "copy": [7, 7, 7]})()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nets": {}}, "nets is empty: give at least one network"),
        ({"batches": (4, 0)}, r"batches is \(4, 0\); it must be a list of integers >= 1"),
        ({"runtimes": ("tensorrt",)}, r"unknown runtimes \['tensorrt'\]: legal names are 'torch', 'onnxruntime'"),
        ({"repeats": 0}, "repeats is 0; it must be an integer >= 1"),
    ],
)
def test_bad_settings_of_a_report_are_named(change: dict[str, object], message: str) -> None:
    settings = {"nets": {"dense": models.build("convnet", width=0.25)}, "runtimes": ("torch",), "progress": False}
    with pytest.raises(ValueError, match=message):
        deploy.report(**{**settings, "example": EXAMPLE, **change})
