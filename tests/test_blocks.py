"""Block spaces: branches found by hand, the constant they leave behind, and networks without them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_channels import Net, assert_same, conv, randomise
from test_channels import network as common_network
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torchvision.ops import StochasticDepth

from prunelab import cost, models
from prunelab.layers import AddConstant
from prunelab.methods.base import space_of
from prunelab.structure import BlockSpace, Budget, ChannelSpace, ColumnSpace, Plan, UntraceableError

BRANCHES = {
    "resnet20": 9, "resnet20-b": 9, "resnet56": 27, "preactivation": 9,
    "resnet18": 8, "resnext50_32x4d": 16, "mobilenet_v2": 10, "efficientnet_b0": 9,
    "regnet_y_400mf": 16, "convnext_tiny": 8,
}  # fmt: skip


def network(name: str) -> tuple[nn.Module, Tensor]:
    if name != "preactivation":  # a shallow ResNet-164
        return common_network(name)
    net, (_, x) = _resnet(29, width=0.25), common_network("resnet20")
    return randomise(net), x


def _resnet(depth: int, width: float = 1.0) -> nn.Module:
    """Build a depth that has no name: pre-activation bottlenecks at 9n + 2 layers, option A at 6n + 2."""
    task = models._Task(10, (3, 32, 32), width)
    if depth % 9 == 2:
        return models._preactivation_resnet(task, depth=depth)
    return models._resnet(task, depth=depth, shortcut=models._shortcut_a)


def plans(space: BlockSpace, seed: int = 0) -> dict[str, Plan]:
    """Return plans at random, at the extremes, and one without a run of neighbours."""
    random, names = np.random.default_rng(seed), [group.name for group in space.groups]
    removed = {
        "everything": [],
        "nothing": names,
        "random": [name for name in names if random.random() < 0.5],
        "run": names[len(names) // 3 : -len(names) // 3],
    }
    return {case: space.plan({name: [] for name in gone}) for case, gone in removed.items()}


@pytest.mark.parametrize("name", BRANCHES)
def test_masked_and_small_network_agree(name: str) -> None:
    net, x = network(name)
    net.train()
    next(m for m in net.modules() if isinstance(m, nn.Conv2d)).eval()
    modes = {key: module.training for key, module in net.named_modules()}
    before = {key: value.clone() for key, value in net.state_dict().items()}
    space = BlockSpace(net, x)
    assert len(space.groups) == BRANCHES[name]
    for case, plan in plans(space).items():
        masked, small = space.mask(plan), space.shrink(plan)
        assert all(module.training == modes.get(key, True) for key, module in small.named_modules())
        assert type(small) is type(net)
        assert set(dict(small.named_parameters())) == set(space.cut(plan, dict(net.named_parameters())))
        with torch.no_grad():
            dense, expected, found = net.eval()(x), masked.eval()(x), small.eval()(x)
        assert expected.isfinite().all()
        assert_same(found, expected)
        assert torch.equal(dense, expected) == (case == "everything")
        for scope in ("all", "conv"):
            assert space.macs(plan, scope) == cost.macs(small, x, scope)
        assert space.parameters(plan) == cost.parameters(small)
        for key, training in modes.items():
            net.get_submodule(key).training = training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert len(before) == len(net.state_dict())


@pytest.mark.parametrize("name", ["resnet20-b", "resnet18", "efficientnet_b0", "convnext_tiny"])
def test_a_training_step_is_that_of_the_masked_network_with_removed_branches_frozen(name: str) -> None:
    """A frozen branch of zero weights adds its constant; everything else has to learn, and count statistics, alike."""
    net, x = network(name)
    x = x.repeat(4, 1, 1, 1) + torch.linspace(0, 1, 8, dtype=x.dtype).view(8, 1, 1, 1)
    space = BlockSpace(net.train(), x)
    plan = plans(space)["random"]
    masked, small = space.mask(plan), space.shrink(plan)
    for branch in space.branches:
        if not plan.keep[branch.name]:
            block = masked.get_submodule(branch.block).eval()
            for shortcut in ("shortcut", "downsample"):
                if isinstance(getattr(block, shortcut, None), nn.Module):
                    getattr(block, shortcut).train()
    outputs = []
    for model in (masked, small):
        optimizer = SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)  # dropout and stochastic depth draw the same
        logits = model(x)
        F.cross_entropy(logits, torch.arange(len(x)) % 7).backward()
        outputs.append(logits.detach())
        optimizer.step()
    assert_same(outputs[1], outputs[0])
    after = masked.state_dict()
    for key, value in small.state_dict().items():
        if key in after:
            torch.testing.assert_close(value, _with_constant(space, plan, key, after[key]), rtol=1e-7, atol=1e-9)
    assert not torch.equal(small.state_dict()[key], net.state_dict()[key])


def _with_constant(space: BlockSpace, plan: Plan, key: str, value: Tensor) -> Tensor:
    """Add what a projection's bias has taken over from its branch, in the networks whose branches end in batch norm."""
    for branch in space.branches:
        if not plan.keep[branch.name] and key == f"{branch.bias}.bias":
            norms = {tensor.rsplit(".", 1)[0] for tensor in branch.tensors} - set(branch.layers)
            norm = space.net.get_submodule(max(norms))
            return value + norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
    return value


def test_only_modules_that_still_run_are_left() -> None:
    net, x = network("efficientnet_b0")
    space = BlockSpace(net.train(), x)
    small = space.shrink(plans(space)["nothing"]).train()
    assert sum(isinstance(m, StochasticDepth) for m in net.modules()) == 16
    assert sum(isinstance(m, StochasticDepth) for m in small.modules()) == 7  # of the blocks without a shortcut
    assert sum(isinstance(m, AddConstant) for m in small.modules()) == 9


# By hand


class Two(nn.Module):
    """A stem and two residual blocks of two channels, each y = relu(x + norm(conv(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 1)
        self.conv1, self.norm1 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2, eps=0.0)
        self.conv2, self.norm2 = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, eps=0.0)
        self.head = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)) + x)
        return self.head(x)


def test_the_constant_worked_out_by_hand() -> None:
    net = Two().double().eval()
    state = {
        "norm1.weight": [2.0, 3.0], "norm1.bias": [1.0, -1.0], "norm1.running_mean": [4.0, 2.0],
        "norm1.running_var": [4.0, 9.0], "conv2.bias": [5.0, 7.0], "norm2.weight": [1.0, 2.0],
        "norm2.bias": [0.5, 0.0], "norm2.running_mean": [1.0, 3.0], "norm2.running_var": [16.0, 4.0],
    }  # fmt: skip
    net.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=False)
    space = BlockSpace(net, torch.zeros(1, 1, 4, 4, dtype=torch.float64))
    assert [(g.name, g.size) for g in space.groups] == [("add", 1), ("add_1", 1)]
    small = space.shrink(space.plan({"add": [], "add_1": []}))
    # 1 − 4·2/2 = −3 and −1 − 2·3/3 = −3; 0.5 + (5 − 1)·1/4 = 1.5 and (7 − 3)·2/2 = 4
    assert small.constant.value.flatten().tolist() == [-3.0, -3.0]
    assert small.constant2.value.flatten().tolist() == [1.5, 4.0]
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    left = F.relu(net.stem(x) - 3) + torch.tensor([1.5, 4.0]).view(2, 1, 1)
    assert_same(small(x).detach(), net.head(F.relu(left)).detach())
    assert set(dict(small.named_parameters())) == {"stem.weight", "stem.bias", "head.weight", "head.bias"}
    # 16 places: stem 2, conv1 2·2·9, conv2 4, head 4 products each
    assert (space.macs(), space.macs(space.plan({"add": []})), space.macs({"add_1": 0})) == (736, 160, 672)
    assert (space.parameters(), space.parameters({"add": 0})) == (60, 20)


def test_a_projection_takes_the_constant() -> None:
    net, x = network("resnet20-b")
    space = BlockSpace(net, x)
    small = space.shrink(space.plan({"stage2.0": []}))
    assert not any(isinstance(module, AddConstant) for module in small.modules())
    norm, shortcut = net.stage2[0].bn2, net.stage2[0].shortcut.bn
    constant = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(small.stage2[0].shortcut.bn.bias, shortcut.bias + constant)


@pytest.mark.parametrize("depth", [14, 18])
def test_removing_blocks_is_building_fewer(depth: int) -> None:
    """ResNet-20 without 3 (or 1) of its blocks has the counts of a ResNet built without them."""
    net, x = models.build("resnet20", seed=0), torch.zeros(1, 3, 32, 32)
    space = BlockSpace(net, x)
    gone = ["stage1.2", "stage2.2", "stage3.2"] if depth == 14 else ["stage2.1"]
    small = space.shrink(space.plan({name: [] for name in gone}))
    if depth == 14:
        built = _resnet(14)
    else:
        built = models.build("resnet20", seed=0)
        del built.stage2[1]
    assert cost.macs(small, x) == cost.macs(built, x) == space.macs(space.plan({name: [] for name in gone}))
    assert cost.parameters(small) == cost.parameters(built)


def test_depths_of_ssl() -> None:
    """SSL-ResNet-12 of 5, 0 and 6 convolutions at 32, 16 and 8 pixels loses a whole stage: its group may be empty."""
    net, x = models.build("resnet20", seed=0), torch.zeros(1, 3, 32, 32)
    space = BlockSpace(net, x)
    assert [layer for branch in space.branches[:4] for layer in branch.layers] == [
        f"stage{stage}.{block}.conv{i}" for stage, block in ((1, 0), (1, 1), (1, 2), (2, 0)) for i in (1, 2)
    ]
    small = space.shrink(space.plan({name: [] for name in ("stage1.1", "stage2.0", "stage2.1", "stage2.2")}))
    layers = cost.breakdown(small, x)
    sizes = [output[-1] for output in layers[layers.kind == "Conv2d"].output]
    assert [sizes.count(size) for size in (32, 16, 8)] == [5, 0, 6]


# Budgets


@pytest.mark.parametrize("what", ["macs", "parameters"])
@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_budgets_are_met_and_used(what: str, ranking: str) -> None:
    net, x = network("resnet18")
    space = BlockSpace(net, x)
    scores = space.scores("random")
    count: Callable[..., int] = getattr(space, what)
    for fraction in (0.9, 0.6, 0.3):
        plan = space.plan_for(scores, Budget(**{what: fraction}), ranking)
        assert count(plan) <= fraction * count()
        gone = [name for name, kept in plan.keep.items() if not kept]
        for name in gone:  # not one of them fits beside what was kept
            assert count({**plan.widths, name: 1}) > fraction * count()
        highest = max(gone, key=lambda name: float(scores[name]))
        better = [name for name, score in scores.items() if score > scores[highest]]
        assert all(plan.keep[name] for name in better)
    least = count(dict.fromkeys(scores, 0)) / count()
    assert not any(space.plan_for(scores, Budget(**{what: least + 1e-9}), ranking).widths.values())
    with pytest.raises(ValueError, match=f"budget {what}=.* cannot be met"):
        space.plan_for(scores, Budget(**{what: least - 1e-3}), ranking)
    with pytest.raises(ValueError, match="ranking is 'best'; it must be"):
        space.plan_for(scores, Budget(**{what: 0.5}), "best")


def test_scores_are_norms_of_the_whole_branch() -> None:
    net, x = network("resnet20")
    space = BlockSpace(net, x)
    first = net.stage2[0]
    norm = (first.conv1.weight.square().sum() + first.conv2.weight.square().sum()).sqrt()
    torch.testing.assert_close(space.scores("l2")["stage2.0"], norm[None])
    table = space.describe(space.plan({"stage2.0": []}))
    assert table.group[table.removed == 1].tolist() == ["stage2.0"]
    assert table.macs_per_unit.tolist() == [space.macs() - space.macs({group.name: 0}) for group in space.groups]


# What follows a cut


def test_what_is_left_can_be_cut_further() -> None:
    net, x = network("resnet18")
    blocks = BlockSpace(net.eval(), x)
    small = blocks.shrink(plans(blocks)["random"])
    for space in (ChannelSpace(small, x), ColumnSpace(small, x), BlockSpace(small, x)):
        plan = space.plan_for(space.scores("random"), Budget(0.6))
        assert_same(space.shrink(plan)(x).detach(), space.mask(plan)(x).detach())
        assert space.macs(plan) == cost.macs(space.shrink(plan), x)
    assert_same(copy.deepcopy(small)(x).detach(), small(x).detach())


def test_a_saved_plan_and_state_give_the_network_again(tmp_path: Path) -> None:
    """What is left of a block does not depend on the weights: a fresh network, cut, takes the cut one's state."""
    net, x = network("mobilenet_v2")
    space = BlockSpace(net, x)
    plan = plans(space)["random"]
    plan.save(tmp_path / "plan.json")
    small = space.shrink(plan)
    fresh = models.torchvision.models.mobilenet_v2(num_classes=7).double().eval()
    again = BlockSpace(fresh, x).shrink(Plan.load(tmp_path / "plan.json"))
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small.eval()(x))


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.05, momentum=0.9), lambda p: Adam(p, lr=0.01)])
def test_an_optimiser_goes_on_with_what_is_left(make: Callable[..., Optimizer]) -> None:
    net, x = network("resnet20")
    optimizer = make(list(net.train().parameters()))
    F.cross_entropy(net(x), torch.arange(2)).backward()
    optimizer.step()
    space = BlockSpace(net, x)
    plan = plans(space)["random"]
    small = space.shrink(plan)
    state = {name: copy.deepcopy(optimizer.state[p]) for name, p in net.named_parameters()}
    carried = space.carry(plan, optimizer, small)
    assert len(carried.state) == len(list(small.parameters())) < len(state)
    for name, parameter in small.named_parameters():
        assert carried.state[parameter].keys() == state[name].keys()
        for key, value in carried.state[parameter].items():
            assert torch.equal(value, state[name][key])
    with pytest.raises(RuntimeError, match="shrunk"):
        optimizer.step()


# What is a branch, and what is not


class Block(nn.Module):
    """What a toy network holds, as a module of its own."""

    def __init__(self, forward: Callable[[Block, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def se(net: nn.Module, x: Tensor) -> Tensor:
    batch, channels, _, _ = x.size()
    return x * torch.sigmoid(net.up(net.down(x.mean((2, 3))).relu())).view(batch, channels, 1, 1)


FOUND: dict[str, tuple[nn.Module, list[str]]] = {
    "two in one module": (
        nn.Sequential(conv(3, 4), Block(lambda s, x: (lambda y: y + s.b(y))(x + s.a(x)), a=conv(4, 4), b=conv(4, 4))),
        ["1", "1#2"],
    ),
    "inner ones of a global skip": (
        Net(
            lambda s, x: (lambda y: s.end(y + s.body(y)))(s.stem(x)),
            stem=conv(3, 4), end=conv(4, 2),
            body=nn.Sequential(conv(4, 4), Block(lambda s, x: x + s.a(x), a=conv(4, 4)), nn.BatchNorm2d(4)),
        ),
        ["body.1"],
    ),
    "squeeze-and-excitation behind the last convolution": (
        Net(
            lambda s, x: (lambda y: s.end(F.relu(y + se(s, s.n(s.b(y))), inplace=True)))(s.stem(x)),
            stem=conv(3, 4), b=conv(4, 4), n=nn.BatchNorm2d(4), down=nn.Linear(4, 2), up=nn.Linear(2, 4),
            end=conv(4, 2),
        ),
        ["add"],
    ),
    "zero whatever the weights, then written over": (
        Net(
            lambda s, x: (lambda y: s.end(F.relu(y.add(s.b(y)), inplace=True)))(s.stem(x).sigmoid()),
            stem=conv(3, 4), b=conv(4, 4, bias=False), end=conv(4, 2),
        ),
        ["add"],
    ),
    "a branch of linear layers": (
        Net(
            lambda s, x: (lambda y: s.end(y + s.b(y).relu()))(s.stem(x.flatten(1))),
            stem=nn.Linear(108, 5), b=nn.Linear(5, 5), end=nn.Linear(5, 2),
        ),
        ["add"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_branches_are_those_found_by_hand(case: str) -> None:
    net, x = randomise(copy.deepcopy(FOUND[case][0])).eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    space = BlockSpace(net, x)
    assert [group.name for group in space.groups] == FOUND[case][1]
    for gone in ({group.name: [] for group in space.groups}, {space.groups[-1].name: []}):
        plan = space.plan(gone)
        small = space.shrink(plan)
        assert_same(small(x).detach(), space.mask(plan)(x).detach())
        assert (space.macs(plan), space.parameters(plan)) == (cost.macs(small, x), cost.parameters(small))
        F.cross_entropy(small.train()(x).flatten(1), torch.arange(2)).backward()


NOT_FOUND: dict[str, nn.Module] = {
    "read elsewhere": Net(
        lambda s, x: (lambda y, z: s.end(torch.cat([y + z, z], 1)))(s.stem(x), s.b(s.stem(x))),
        stem=conv(3, 4), b=conv(4, 4), end=conv(8, 2),
    ),
    "equal depth": Net(lambda s, x: s.end(s.a(x) + s.b(x)), a=conv(3, 4), b=conv(3, 4), end=conv(4, 2)),
    "shared weights": Net(
        lambda s, x: (lambda y: s.end(s.b(y + s.b(y))))(s.stem(x)), stem=conv(3, 4), b=conv(4, 4), end=conv(4, 2)
    ),
    "no convolution": Net(
        lambda s, x: (lambda y: s.end(y + s.p(y)))(s.stem(x)), stem=conv(3, 4), p=nn.AvgPool2d(3, 1, 1), end=conv(4, 2)
    ),
    "one map for all channels": Net(
        lambda s, x: (lambda y: s.end(y + s.b(y)))(s.stem(x)), stem=conv(3, 4), b=conv(4, 1), end=conv(4, 2)
    ),
    "its input is written over": Net(
        lambda s, x: (lambda y: s.end(y + s.b(s.r(y))))(s.stem(x)),
        stem=conv(3, 4), r=nn.ReLU(inplace=True), b=conv(4, 4), end=conv(4, 2),
    ),
    "what it is added to is no map of the image": Net(
        lambda s, x: s.end(s.b(x) + s.place), b=conv(3, 4), place=nn.Parameter(torch.rand(1, 4, 6, 6)), end=conv(4, 2)
    ),
    "its border shows": Net(
        lambda s, x: (lambda y: s.end(y + s.p(s.b(y))))(s.stem(x)),
        stem=conv(3, 4), b=conv(4, 4), p=nn.AvgPool2d(3, 1, 1), end=conv(4, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_FOUND)
def test_what_could_not_be_left_out_exactly_is_no_branch(case: str) -> None:
    with pytest.raises(ValueError, match="Net has no blocks that could be removed"):
        BlockSpace(randomise(copy.deepcopy(NOT_FOUND[case])), torch.zeros(1, 3, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "kind"), [("vgg16", "Sequential"), ("densenet40", "Sequential"), ("squeezenet1_0", "SqueezeNet")]
)
def test_a_network_without_branches_is_named(name: str, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind} has no blocks that could be removed"):
        space_of("blocks", *network(name))


def test_a_block_that_would_train_differently_is_named() -> None:
    def forward(s: Block, x: Tensor) -> Tensor:
        return F.dropout(x + s.a(x), 0.5, s.training)

    def inside(s: Block, x: Tensor) -> Tensor:
        return x + F.dropout(s.a(x), 0.5, s.training)

    x = torch.zeros(1, 3, 6, 6)
    with pytest.raises(UntraceableError, match=r"cannot cut '1' of type Block safely: .* training"):
        BlockSpace(nn.Sequential(conv(3, 4), Block(forward, a=conv(4, 4))), x)
    assert len(BlockSpace(nn.Sequential(conv(3, 4), Block(inside, a=conv(4, 4))), x).groups) == 1


class OptionalResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv(4, 4)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.a(x) + (x if residual is None else residual)


def test_a_block_with_optional_arguments_is_named() -> None:
    with pytest.raises(
        UntraceableError, match=r"cannot cut '1' of type OptionalResidual safely: .* arguments, residual"
    ):
        BlockSpace(nn.Sequential(conv(3, 4), OptionalResidual()), torch.zeros(1, 3, 6, 6))


def test_a_cut_block_keeps_what_its_parent_asks_for_and_its_hooks() -> None:
    class Halving(Block):
        halves = False

    block = Halving(lambda s, x: x + s.a(x), a=conv(4, 4))
    block.halves = True
    net = Net(
        lambda s, x: s.end(F.max_pool2d(s.block(s.stem(x)), 2 if s.block.halves else 1)),
        stem=conv(3, 4), block=block, end=conv(4, 2),
    )  # fmt: skip
    net, x = randomise(net).eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    net.block.register_forward_hook(lambda module, args, output: 2 * output)
    space = BlockSpace(net, x)
    plan = space.plan({"block": []})
    small = space.shrink(plan)
    assert small.block.halves
    assert_same(small(x).detach(), space.mask(plan)(x).detach())


def test_only_a_branch_may_be_gone_altogether() -> None:
    net = nn.Sequential(conv(3, 1), conv(1, 2))
    space = ChannelSpace(net, torch.zeros(1, 3, 6, 6))
    with pytest.raises(ValueError, match="1 of group '0' must stay"):
        space.mask(space.plan({"0": []}))
