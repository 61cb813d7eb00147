"""Training on the digits: what a step computes, what a hook sees, and what a run leaves behind."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from prunelab.data import Data, load
from prunelab.models import build
from prunelab.training import (
    Hook,
    Recipe,
    State,
    _check_finite,
    evaluate,
    fit,
    learning_rate,
    recalibrate,
)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


def linear(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(6, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 10),
    )


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def half_split(data: Data) -> int:
    """Return the batch size that makes two steps an epoch."""
    return len(data.train.labels) // 2


def few_steps(data: Data, steps: int, **fields) -> Recipe:
    """Return a constant recipe of exactly `steps` steps."""
    fields = {"lr": 0.05, "schedule": "constant", "batch_size": 64} | fields
    return Recipe(epochs=steps / (len(data.train.labels) // fields["batch_size"]), **fields)


# The recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", -1),
        ("epochs", float("nan")),
        ("epochs", float("inf")),
        ("lr", 0.0),
        ("lr", -0.1),
        ("lr", float("nan")),
        ("schedule", "cosine"),
        ("batch_size", 0),
        ("batch_size", 12.5),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1e-4),
        ("weight_decay", float("inf")),
        ("milestones", (0.75, 0.5)),
        ("milestones", (0.5, 0.5)),
        ("milestones", (0.0, 0.5)),
        ("milestones", (0.5, 1.0)),
    ],
)
def test_an_illegal_field_is_named_with_its_value(field: str, value: object) -> None:
    with pytest.raises(ValueError) as error:
        Recipe(**{"epochs": 1, "lr": 0.1, field: value})
    assert str(error.value).startswith(f"recipe: {field} is {value!r}; it must be ")


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov is True"):
        Recipe(epochs=1, lr=0.1, momentum=0.0)
    assert Recipe(epochs=1, lr=0.1, momentum=0.0, nesterov=False).momentum == 0


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("one-cycle", {0: 0, 0.125: 0.2, 0.25: 0.4, 0.625: 0.2, 0.85: 0.08, 1: 0}),
        ("step", {0: 0.4, 0.2999: 0.4, 0.3: 0.04, 0.5: 0.04, 0.6: 0.004, 0.9: 0.0004, 1: 0.0004}),
        ("constant", {0: 0.4, 0.5: 0.4, 1: 0.4}),
    ],
)
def test_learning_rate_at_hand_checked_points(schedule, points: dict[float, float]) -> None:
    recipe = Recipe(epochs=1, lr=0.4, schedule=schedule, milestones=(0.3, 0.6, 0.9))
    assert {at: learning_rate(recipe, at) for at in points} == pytest.approx(points, rel=1e-12)


@given(progress=st.floats(0, 1), lr=st.floats(1e-6, 10), schedule=st.sampled_from(["one-cycle", "step", "constant"]))
def test_learning_rate_stays_between_zero_and_the_peak(progress: float, lr: float, schedule) -> None:
    assert 0 <= learning_rate(Recipe(epochs=1, lr=lr, schedule=schedule), progress) <= lr


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_outside_the_run_is_refused(progress: float) -> None:
    with pytest.raises(ValueError, match=r"progress is .*; it must be in \[0, 1\]"):
        learning_rate(Recipe(epochs=1, lr=0.1), progress)


# The step


def test_four_steps_take_the_learning_rate_of_their_middles(digits: Data) -> None:
    class Rates(Hook):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def before_step(self, state: State) -> None:
            self.seen.append(state.optimizer.param_groups[0]["lr"])

    hook = Rates()
    fit(linear(), digits, few_steps(digits, 4, lr=0.3, schedule="one-cycle"), seed=0, hook=hook, progress=False)
    assert hook.seen == pytest.approx([0.15, 0.25, 0.15, 0.05])  # 1/2, 5/6, 1/2 and 1/6 of the peak


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_equals_the_textbook_across_an_epoch_boundary(digits: Data, nesterov: bool) -> None:
    recipe = few_steps(digits, 3, batch_size=half_split(digits), nesterov=nesterov, weight_decay=0.01)
    net = linear()
    values = [p.detach().clone() for p in net.parameters()]
    fit(net, digits, recipe, seed=5, progress=False)

    generator = torch.Generator().manual_seed(5)
    epochs = (digits.batches("train", recipe.batch_size, generator) for _ in range(2))
    velocity = [torch.zeros_like(value) for value in values]
    for _, (images, labels) in zip(range(3), chain.from_iterable(epochs), strict=False):
        weight, bias = (value.requires_grad_() for value in values)
        log_p = (images.flatten(1) @ weight.T + bias).log_softmax(dim=1)
        loss = -log_p[torch.arange(len(labels)), labels].mean()
        gradients = torch.autograd.grad(loss, values)
        for i, gradient in enumerate(gradients):
            value = values[i].detach()
            gradient = gradient + 0.01 * value
            velocity[i] = 0.9 * velocity[i] + gradient
            values[i] = value - 0.05 * (gradient + 0.9 * velocity[i] if nesterov else velocity[i])
    for parameter, value in zip(net.parameters(), values, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


# The hook


def test_the_moments_come_in_order_and_see_the_right_things(digits: Data) -> None:
    class Diary(Hook):
        def __init__(self) -> None:
            self.moments: list[tuple[str, int]] = []

        def start(self, state: State) -> None:
            assert state.net.training and (state.steps, state.steps_per_epoch) == (2, len(digits.train.labels) // 64)
            self.moments.append(("start", state.step))

        def before_step(self, state: State) -> None:
            self.moments.append(("before_step", state.step))
            self.before = weights(state.net)

        def on_loss(self, state: State, loss: Tensor) -> Tensor:
            self.moments.append(("on_loss", state.step))
            assert loss.requires_grad and loss.ndim == 0
            self.gradients = torch.autograd.grad(3 * loss, list(state.net.parameters()), retain_graph=True)
            return 3 * loss

        def after_gradients(self, state: State) -> None:
            self.moments.append(("after_gradients", state.step))
            assert_equal(self.before, weights(state.net))
            for parameter, gradient in zip(state.net.parameters(), self.gradients, strict=True):
                assert parameter.grad is not None and torch.equal(parameter.grad, gradient)

        def after_step(self, state: State) -> None:
            self.moments.append(("after_step", state.step))
            assert all(not torch.equal(self.before[name], value) for name, value in weights(state.net).items())

    hook = Diary()
    fit(linear(), digits, few_steps(digits, 2), seed=0, hook=hook, progress=False)
    step = ("before_step", "on_loss", "after_gradients", "after_step")
    assert hook.moments == [("start", 0)] + [(moment, i) for i in range(2) for moment in step]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_parameter_without_gradient_moves_by_weight_decay_alone(digits: Data, weight_decay: float) -> None:
    class Freeze(Hook):
        def after_gradients(self, state: State) -> None:
            state.net[1].weight.grad.zero_()

    net = linear()
    before = weights(net)
    recipe = few_steps(digits, 3, momentum=0.0, nesterov=False, weight_decay=weight_decay)
    fit(net, digits, recipe, seed=0, hook=Freeze(), progress=False)
    torch.testing.assert_close(net[1].weight.detach(), before["1.weight"] * (1 - 0.05 * weight_decay) ** 3)
    assert not torch.equal(net[1].bias, before["1.bias"])


def test_a_penalty_adds_its_own_gradient(digits: Data) -> None:
    class Gradient(Hook):
        def __init__(self, strength: float) -> None:
            self.strength = strength

        def on_loss(self, state: State, loss: Tensor) -> Tensor:
            return loss + self.strength * state.net[1].weight.square().sum()

        def after_gradients(self, state: State) -> None:
            self.gradient = state.net[1].weight.grad.clone()

    plain, penalised = Gradient(0.0), Gradient(0.7)
    net = linear()
    before = net[1].weight.detach().clone()
    for hook in (plain, penalised):
        fit(copy.deepcopy(net), digits, few_steps(digits, 1), seed=0, hook=hook, progress=False)
    torch.testing.assert_close(penalised.gradient - plain.gradient, 2 * 0.7 * before)


def test_stop_ends_the_run_after_the_step(digits: Data) -> None:
    class StopAt(Hook):
        def before_step(self, state: State) -> None:
            state.stop = state.step == 2

    stopped, whole = linear(), linear()
    history = fit(stopped, digits, few_steps(digits, 9), seed=0, hook=StopAt(), progress=False)
    assert history.steps == 3
    assert history.epochs == 3 / (len(digits.train.labels) // 64)
    fit(whole, digits, few_steps(digits, 3), seed=0, progress=False)
    assert_equal(weights(stopped), weights(whole))  # the constant schedule does not know how long the run was to be


def test_random_draws_in_a_hook_do_not_change_the_batches(digits: Data) -> None:
    class Draw(Hook):
        def before_step(self, state: State) -> None:
            torch.rand(7)

    plain, drawn = linear(), linear()
    fit(plain, digits, few_steps(digits, 5), seed=0, progress=False)
    fit(drawn, digits, few_steps(digits, 5), seed=0, hook=Draw(), progress=False)
    assert_equal(weights(plain), weights(drawn))


# The run


def test_a_seed_fixes_the_run_bit_for_bit(digits: Data) -> None:
    nets, histories = [small() for _ in range(3)], []
    for net, seed, noise in zip(nets, (1, 1, 2), (10, 11, 12), strict=True):
        torch.manual_seed(noise)  # the caller's generator must not matter
        histories.append(fit(net, digits, Recipe(epochs=1.5, lr=0.1, batch_size=64), seed=seed, progress=False))
    assert_equal(weights(nets[0]), weights(nets[1]))
    assert histories[0].loss == histories[1].loss
    assert histories[0].loss != histories[2].loss


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt, FloatingPointError])
def test_the_callers_global_state_is_untouched(
    digits: Data, failure: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", False)
    monkeypatch.setattr(cudnn, "benchmark", True)

    class Fail(Hook):
        def after_step(self, state: State) -> None:
            if failure and state.step == 1:
                raise failure

    def state() -> tuple[bytes, bool, bool, bool]:
        random = torch.get_rng_state().numpy().tobytes()
        return random, cudnn.deterministic, cudnn.benchmark, torch.is_grad_enabled()

    net = small()
    before = state()
    with pytest.raises(failure) if failure else nullcontext():
        fit(net, digits, few_steps(digits, 3), seed=0, hook=Fail(), progress=False)
    assert state() == before
    recalibrate(net, digits, batches=2)
    evaluate(net, digits)
    assert state() == before


@pytest.mark.parametrize(("epochs", "steps"), [(1, 2), (0.5, 1), (0.01, 1), (1.3, 3), (1.2, 2), (2.5, 5), (3, 6)])
def test_the_number_of_steps_is_rounded_and_at_least_one(digits: Data, epochs: float, steps: int) -> None:
    class Losses(Hook):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_loss(self, state: State, loss: Tensor) -> Tensor:
            self.seen.append(loss.item())
            return loss

    hook = Losses()
    recipe = Recipe(epochs=epochs, lr=0.1, batch_size=half_split(digits))
    history = fit(linear(), digits, recipe, seed=0, hook=hook, progress=False)
    assert (history.steps, history.epochs) == (steps, steps / 2)
    per_epoch = [sum(hook.seen[i : i + 2]) / len(hook.seen[i : i + 2]) for i in range(0, steps, 2)]
    assert history.loss == pytest.approx(per_epoch, rel=1e-6)


def test_no_epochs_change_nothing(digits: Data) -> None:
    net = small()
    before = weights(net)
    history = fit(net, digits, Recipe(epochs=0, lr=0.1), seed=0, progress=False)
    assert (history.loss, history.steps, history.epochs) == ((), 0, 0.0)
    assert_equal(weights(net), before)
    assert net.training


def test_the_net_is_left_in_eval_mode_without_gradients(digits: Data) -> None:
    net = small()
    fit(net, digits, few_steps(digits, 1), seed=0, progress=False)
    assert not any(module.training for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_digits_are_learnt(digits: Data) -> None:
    net = build("convnet-bn", shape=(1, 8, 8), seed=0)
    history = fit(net, digits, Recipe(epochs=6, lr=0.1, batch_size=64), seed=0, progress=False)
    assert evaluate(net, digits) > 95
    assert history.loss[-1] < history.loss[0] / 10


def test_a_loss_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(digits: Data) -> None:
    class Blow(Hook):
        def before_step(self, state: State) -> None:
            self.before = weights(state.net)

        def on_loss(self, state: State, loss: Tensor) -> Tensor:
            return loss * float("inf") if state.step == 2 else loss

    net, hook, recipe = linear(), Blow(), few_steps(digits, 5)
    with pytest.raises(FloatingPointError) as error:
        fit(net, digits, recipe, seed=0, hook=hook, progress=False)
    assert "the loss is inf at step 2 " in str(error.value)
    assert repr(recipe) in str(error.value)
    assert_equal(weights(net), hook.before)


def test_a_divergent_run_is_stopped(digits: Data) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step \d+ .*lr=1e\+30"):
        fit(linear(), digits, few_steps(digits, 20, lr=1e30), seed=0, progress=False)


@pytest.mark.parametrize("bad", [10, 37, 59])
def test_the_first_bad_step_is_named_when_losses_are_read_in_blocks(bad: int) -> None:
    losses = torch.ones(60)
    losses[bad:] = float("nan")
    with pytest.raises(FloatingPointError, match=f"the loss is nan at step {bad} "):
        _check_finite(losses, 50, Recipe(epochs=1, lr=0.1))


def test_a_batch_larger_than_the_training_split_is_refused(digits: Data) -> None:
    images = len(digits.train.labels)
    with pytest.raises(ValueError, match=rf"batch_size is {images + 1}; digits has {images} training images"):
        fit(linear(), digits, Recipe(epochs=1, lr=0.1, batch_size=images + 1), seed=0, progress=False)


def test_a_net_that_cannot_be_trained_on_these_images_is_refused(digits: Data) -> None:
    net = build("convnet-bn", shape=digits.shape, width=0.25)
    with pytest.raises(ValueError, match=r"parameters of type torch.float64; .* net.float\(\)"):
        fit(copy.deepcopy(net).double(), digits, Recipe(epochs=1, lr=0.01), seed=0, progress=False)
    with pytest.raises(ValueError, match="every parameter has requires_grad=False"):
        fit(net.requires_grad_(False), digits, Recipe(epochs=1, lr=0.01), seed=0, progress=False)


def test_a_net_with_too_few_outputs_is_refused(digits: Data) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 9))
    with pytest.raises(ValueError, match=r"shape \[64, 9\]; digits needs \[64, 10\]"):
        fit(net, digits, few_steps(digits, 1), seed=0, progress=False)


# Evaluation


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("batch_size", [7, 1024])
def test_accuracy_equals_counting_one_image_at_a_time(digits: Data, split, batch_size: int) -> None:
    net = linear()
    fit(net, digits, few_steps(digits, 10), seed=0, progress=False)
    images, labels = getattr(digits, split)
    weight, bias = net[1].weight.detach(), net[1].bias.detach()
    right = 0
    for image, label in zip(digits.normalise(images), labels, strict=True):
        scores = weight @ image.flatten() + bias
        right += max(range(10), key=lambda k: scores[k].item()) == label.item()
    assert evaluate(net, digits, split, batch_size) == 100 * right / len(labels)


def test_evaluation_keeps_the_net_and_the_mode_of_every_module(digits: Data) -> None:
    net = small().train()
    net[1].eval()
    before, modes = weights(net), [module.training for module in net.modules()]
    evaluate(net, digits)
    assert_equal(weights(net), before)
    assert [module.training for module in net.modules()] == modes


def test_an_evaluated_net_can_be_trained(digits: Data) -> None:
    net = small()
    evaluate(net, digits)  # converts the layout of the weights, and must not do so in inference mode
    before = weights(net)
    fit(net, digits, few_steps(digits, 1), seed=0, progress=False)
    assert all(not torch.equal(before[name], p) for name, p in net.named_parameters())


# Recalibration


def test_recalibrated_statistics_are_the_means_over_the_batches(digits: Data) -> None:
    net = small()
    net[1].running_mean.fill_(9.0)  # stale statistics of a long run, which must leave no trace
    net[1].num_batches_tracked.fill_(100)
    recalibrate(net, digits, batches=3, batch_size=half_split(digits), seed=4)

    generator = torch.Generator().manual_seed(4)
    epochs = (digits.batches("train", half_split(digits), generator) for _ in range(2))
    inputs: dict[int, list[Tensor]] = {1: [], 5: []}
    with torch.no_grad():
        for _, (images, _labels) in zip(range(3), chain.from_iterable(epochs), strict=False):
            x = net[0](images)
            inputs[1].append(x)
            centred = x - x.mean((0, 2, 3), keepdim=True)
            normal = centred / (centred.square().mean((0, 2, 3), keepdim=True) + net[1].eps).sqrt()
            inputs[5].append(net[4](F.relu(normal)))  # dropout is off
    for index, seen in inputs.items():
        mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
        variance = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0)
        torch.testing.assert_close(net[index].running_mean, mean)
        torch.testing.assert_close(net[index].running_var, variance)


def test_recalibration_changes_nothing_but_the_statistics(digits: Data) -> None:
    net = small().eval()
    net[1].train()
    net[1].momentum, net[5].momentum = 0.3, None
    before, modes = weights(net), [module.training for module in net.modules()]
    recalibrate(net, digits, batches=2)
    after = weights(net)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{i}.{kind}" for i in (1, 5) for kind in ("running_mean", "running_var", "num_batches_tracked")}
    assert (net[1].momentum, net[5].momentum) == (0.3, None)
    assert [module.training for module in net.modules()] == modes


def test_recalibration_is_fixed_by_its_seed_and_mends_stale_statistics(digits: Data) -> None:
    net = build("convnet-bn", shape=(1, 8, 8), seed=0)
    fit(net, digits, Recipe(epochs=2, lr=0.1, batch_size=64), seed=0, progress=False)
    trained = evaluate(net, digits)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    stale = evaluate(net, digits)
    again = copy.deepcopy(net)
    recalibrate(net, digits, batches=5)
    recalibrate(again, digits, batches=5)
    assert_equal(weights(net), weights(again))
    assert stale < trained - 10 and evaluate(net, digits) > trained - 2


def test_a_net_without_batch_norm_is_left_alone(digits: Data) -> None:
    net = linear()
    before = weights(net)
    recalibrate(net, digits)
    assert_equal(weights(net), before)
    assert net.training


@pytest.mark.parametrize("name", ["batches", "batch_size"])
def test_recalibration_refuses_to_see_nothing(digits: Data, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be an integer >= 1"):
        recalibrate(small(), digits, **{name: 0})
