"""Molchanov et al.: Θ by brute force, the ranking, and what the pruning phase leaves behind."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.data import load
from prunelab.methods import taylor
from prunelab.methods.base import Pruned
from prunelab.methods.taylor import Taylor, gated, normalised, ranking
from prunelab.models import build
from prunelab.structure import Budget, ChannelSpace, Plan
from prunelab.training import Context, Recipe, State

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(load("digits"), Recipe(epochs=1, lr=0.05, batch_size=64), seed=0, progress=False)


def theta_of(net: nn.Module, images: Tensor, labels: Tensor, batches: int = 1) -> dict[str, Tensor]:
    """Θ of a network in the mode that it is in, from `batches` equal parts of the images."""
    space = ChannelSpace(net, images[:1])
    with gated(space) as theta:
        for part, answers in zip(images.chunk(batches), labels.chunk(batches), strict=True):
            F.cross_entropy(net(part), answers).backward()
            theta.collect()
        found = theta.take().split(space.sizes.tolist())
    return dict(zip((g.name for g in space.groups), found, strict=True))


def batch(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPE, generator=generator), torch.randint(10, (count,), generator=generator)


def tiny(seed: int = 0, *, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace), nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 2), nn.ReLU(inplace), nn.Flatten(),
        nn.Linear(16, 6), nn.ReLU(inplace), nn.Linear(6, 10),
    )  # fmt: skip
    nn.init.normal_(net[1].bias)
    return net.eval()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("batches", [1, 3])
def test_theta_by_brute_force_behind_the_relu(inplace: bool, batches: int) -> None:
    """Example by example and map by map, after the activation, where the paper has its maps."""
    net, (images, labels) = tiny(inplace=inplace), batch()
    found = theta_of(net, images, labels, batches)
    net = tiny()
    for group, relu in (("0", 2), ("4", 5), ("7", 8)):
        expected = torch.zeros(net[relu](net[:relu](images)).shape[1])
        for image, label in zip(images, labels, strict=True):
            maps = net[: relu + 1](image[None]).detach().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(net[relu + 1 :](maps), label[None]), maps)
            for k in range(maps.shape[1]):
                expected[k] += (slope[0, k] * maps[0, k]).mean().abs() / len(images)
        torch.testing.assert_close(found[group], expected)


def test_theta_does_not_depend_on_the_batch_size() -> None:
    net, (images, labels) = tiny(), batch()
    once, in_parts = theta_of(net, images, labels), theta_of(net, images, labels, batches=4)
    for group in once:
        torch.testing.assert_close(once[group], in_parts[group])


def test_theta_starts_anew_once_it_is_taken() -> None:
    net, (images, labels) = tiny(), batch()
    with gated(ChannelSpace(net, images[:1])) as theta:
        for part, answers in zip(images.chunk(2), labels.chunk(2), strict=True):
            F.cross_entropy(net(part), answers).backward()
            theta.collect()
            found = theta.take()
    torch.testing.assert_close(found, torch.cat([*theta_of(net, images[6:], labels[6:]).values()]))


def test_theta_is_the_change_of_a_loss_that_is_linear_in_the_gate() -> None:
    """With C = mean over examples of Σ logits, removing a map changes C by ∂C/∂gate exactly."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    images, _ = batch(1)
    space = ChannelSpace(net, images)
    with gated(space) as theta:
        whole = net(images).sum()
        whole.backward()
        theta.collect()
        found = theta.take()
    for k in range(4):
        without = space.mask(space.plan({"0": [i for i in range(4) if i != k]}))
        torch.testing.assert_close(found[k] * 36, (whole - without(images).sum()).abs())


def test_several_writers_of_a_unit_add_up() -> None:
    net, (images, labels) = build("resnet20", shape=SHAPE, width=0.25, seed=0).eval(), batch(4)
    found = theta_of(net, images, labels)["conv"]
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        def hook(module: nn.Module, inputs: object, maps: Tensor) -> None:
            maps.retain_grad()
            seen[name] = maps

        net.get_submodule(name).register_forward_hook(hook)

    inside = {f"stage{s}.{b}.bn2": {1: 0, 2: 2, 3: 6}[s] for s in (1, 2, 3) for b in range(3)} | {"bn": 0}
    for name in inside:
        keep(name)
    F.cross_entropy(net(images), labels, reduction="sum").backward()  # examples do not meet: their own gradients
    expected = torch.zeros(4)
    for name, first in inside.items():  # the four channels sit behind 2 zeros in stage 2, behind 6 in stage 3
        maps = seen[name]
        expected += (maps.grad * maps.detach()).mean((2, 3)).abs().mean(0)[first : first + 4]
    torch.testing.assert_close(found, expected)


def test_gates_leave_the_output_and_the_network_alone() -> None:
    net, (images, _) = tiny(), batch()
    plain = net(images)
    space = ChannelSpace(net, images[:1])
    with gated(space):
        assert torch.equal(net(images), plain)
    assert not any(module._forward_hooks for module in net.modules())


# -- the ranking ------------------------------------------------------------------------------------------------------


def test_vgg16_has_the_papers_4224_feature_maps() -> None:
    space = ChannelSpace(build("vgg16", shape=(3, 32, 32), seed=0), torch.zeros(1, 3, 32, 32))
    assert sum(group.size for group in space.groups if group.name.startswith("conv")) == 4224


def test_theta_hat_has_unit_norm_and_no_scale() -> None:
    space = ChannelSpace(build("convnet-bn", shape=SHAPE, seed=0), torch.zeros(1, *SHAPE))
    theta = torch.rand(int(space.sizes.sum()), generator=torch.Generator().manual_seed(0))
    whole = space.plan({})
    scores = ranking(space, theta, whole, 0.0)
    assert all(score.norm().item() == pytest.approx(1) for score in scores.values())
    conv1, rest = theta.split([32, 96])
    scaled = ranking(space, torch.cat([conv1 * 1000, rest]), whole, 0.0)
    for group in scores:
        torch.testing.assert_close(scaled[group], scores[group])
    assert torch.equal(normalised(torch.zeros(3)), torch.zeros(3))


def test_the_cost_of_a_map_is_in_mflops_at_the_present_widths() -> None:
    space = ChannelSpace(build("convnet-bn", shape=(3, 32, 32), seed=0), torch.zeros(1, 3, 32, 32))
    theta = torch.ones(128)
    free = ranking(space, theta, space.plan({}), 0.0)

    def charged(first: int) -> dict[str, float]:
        scores = ranking(space, theta, space.plan({"conv1": range(first)}), 1e-3)
        return {g: (free[g][0] - scores[g][0]).item() * 1e3 for g in scores}

    # 2 FLOPs x 25 weights x inputs x positions of the map
    assert charged(32) == pytest.approx(
        {"conv1": 50 * 3 * 1024e-6, "conv2": 50 * 32 * 256e-6, "conv3": 50 * 32 * 64e-6}, rel=1e-2
    )
    assert charged(8)["conv2"] == pytest.approx(50 * 8 * 256e-6, rel=1e-2)
    assert charged(8)["conv3"] == pytest.approx(charged(32)["conv3"], rel=1e-2)


def test_the_removed_never_come_back() -> None:
    space = ChannelSpace(build("convnet-bn", shape=SHAPE, seed=0), torch.zeros(1, *SHAPE))
    plan = space.plan({"conv1": range(16)})
    scores = ranking(space, torch.ones(128), plan, 0.0)
    assert scores["conv1"].isneginf().tolist() == [False] * 16 + [True] * 16
    after = space.plan_for(scores, Budget(0.4), ranking="global")
    assert set(after.keep["conv1"]) <= set(range(16))


def test_removing_a_map_shrinks_the_next_layers_inputs() -> None:
    net = tiny()
    small = ChannelSpace(net, torch.zeros(1, *SHAPE))
    cut = small.shrink(small.plan({"0": [0, 1, 3, 4]}))
    assert torch.equal(cut[4].weight, net[4].weight[:, [0, 1, 3, 4]])
    assert cut[4].in_channels == cut[1].num_features == cut[0].out_channels == 4


# -- the method -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("convnet-bn", 1.0), ("vgg11", 0.25), ("resnet20", 0.5)], ids=lambda p: p[0])
def case(request: pytest.FixtureRequest, context: Context) -> tuple[nn.Module, dict[str, Tensor], Pruned]:
    name, width = request.param
    net = build(name, shape=SHAPE, width=width, seed=0)
    before = copy.deepcopy(net.state_dict())
    return net, before, Taylor(updates=4, share=1.0)(net, Budget(0.5, "conv"), context)


def test_widths_fall_round_by_round(case: tuple[nn.Module, dict[str, Tensor], Pruned], context: Context) -> None:
    net, _, pruned = case
    space = ChannelSpace(net, context.data.example)
    history = pruned.history["widths"]
    rounds = len(context.data.train.labels) // 64 // 4
    assert len(history) == rounds
    assert history[-1] == pruned.plan.widths
    shares = [space.macs(widths, "conv") / space.macs(scope="conv") for widths in history]
    for number, share in enumerate(shares, start=1):
        assert 0 <= 1 - 0.5 * number / rounds - share < 0.01
    for earlier, later in pairwise(history):
        assert all(later[group] <= earlier[group] for group in later)


@pytest.mark.parametrize(("name", "seed"), [("convnet-bn", 0), ("convnet-bn", 1), ("resnet20", 0)])
def test_what_is_removed_never_comes_back(
    monkeypatch: pytest.MonkeyPatch, context: Context, name: str, seed: int
) -> None:
    """Nor does what budget the units' unequal costs leave over give a group a unit back that was gone before."""
    plans: list[Plan] = []

    class Watched(taylor._Removal):
        def after_step(self, state: State) -> None:
            super().after_step(state)
            plans.append(self.plan)

    monkeypatch.setattr(taylor, "_Removal", Watched)
    net = build(name, shape=SHAPE, width=0.5, seed=seed)
    pruned = Taylor(updates=1, share=1.0)(net, Budget(0.25, "conv"), context)
    assert len(pruned.history["widths"]) >= 16
    for earlier, later in pairwise(plans):
        assert all({*later.keep[group]} <= {*earlier.keep[group]} for group in later.keep)


def test_with_a_large_lambda_the_costliest_maps_go(context: Context) -> None:
    net = build("convnet-bn", shape=SHAPE, width=0.5, seed=0)
    free, charged = (
        Taylor(flops_regularisation=strength, updates=4, share=1.0)(net, Budget(0.5, "conv"), context).plan.widths
        for strength in (0.0, 1e6)
    )
    # 25 weights x inputs x positions: 1,600 MACs a map of conv1, 6,400 of conv2, at most 1,600 of conv3
    assert charged["conv1"] == 16 and charged["conv3"] == 32
    assert charged["conv2"] < free["conv2"]


def test_net_is_untouched_and_epochs_are_counted(
    case: tuple[nn.Module, dict[str, Tensor], Pruned], context: Context
) -> None:
    net, before, pruned = case
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert not any(module._forward_hooks for module in (*net.modules(), *pruned.net.modules()))
    per_epoch = len(context.data.train.labels) // 64
    assert pruned.epochs == (per_epoch // 4 * 4) / per_epoch <= context.recipe.epochs


def test_the_cut_network_is_the_masked_one(context: Context) -> None:
    """What is removed was already zero in training: the cut network computes what the trained one does."""
    trained: list[nn.Module] = []

    class Watched(ChannelSpace):
        def shrink(self, plan):  # type: ignore[no-untyped-def]
            trained.append(copy.deepcopy(self.net))
            return super().shrink(plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunelab.methods.taylor.ChannelSpace", Watched)
        net = build("resnet20", shape=SHAPE, width=0.5, seed=0)
        pruned = Taylor(updates=4, share=1.0)(net, Budget(0.5), context)
    images, _ = batch(8)
    torch.testing.assert_close(pruned.net.eval()(images), trained[0].eval()(images), rtol=1e-4, atol=1e-4)


def test_runs_repeat_bit_for_bit(context: Context) -> None:
    net = build("convnet-bn", shape=SHAPE, width=0.25, seed=0)
    runs = [
        Taylor(updates=5)(net, Budget(0.5), Context(context.data, context.recipe, seed, progress=False))
        for seed in (0, 0, 1)
    ]
    assert runs[0].plan == runs[1].plan
    first, again, other = (run.net.state_dict() for run in runs)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(first[key].shape != other[key].shape or not torch.equal(first[key], other[key]) for key in first)


def test_share_bounds_the_effort(context: Context) -> None:
    net = build("convnet-bn", shape=SHAPE, width=0.25, seed=0)
    per_epoch = len(context.data.train.labels) // 64
    short = Taylor(updates=1000, share=0.25)(net, Budget(0.5), context)
    assert short.epochs == int(0.25 * per_epoch) / per_epoch  # one round of fewer updates
    assert len(short.history["widths"]) == 1
    with pytest.raises(ValueError, match=r"share is 0\.01: of 1 epochs that is not one update"):
        Taylor(share=0.01)(net, Budget(0.5), context)


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [
        ("flops_regularisation", -1.0, ">= 0"),
        ("updates", 0, "integer >= 1"),
        ("updates", 2.5, "integer >= 1"),
        ("share", 0.0, r"\(0, 1\]"),
        ("share", 1.1, r"\(0, 1\]"),
        ("lr", 0.0, "> 0"),
        ("lr", float("nan"), "> 0"),
    ],
)
def test_illegal_fields_are_named(field: str, value: float, legal: str) -> None:
    with pytest.raises(ValueError, match=f"taylor: {field} is {value}; it must be .*{legal}"):
        Taylor(**{field: value})  # type: ignore[arg-type]
