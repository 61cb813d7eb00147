"""Training, evaluation and batch-norm recalibration: one loop, which pruning methods join through one hook."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ._checks import NETWORK, NOT_NEGATIVE, POSITIVE, Legal, check, check_fields, instance, integer, one_of, within
from ._memory import keep_freed_memory
from ._modes import evaluating
from .data import Data

Schedule = Literal["one-cycle", "step", "constant"]

WARM_UP = 0.25  # fraction of a one-cycle run in which the learning rate rises
GPU_CHECK_STEPS = 50  # reading a loss makes a GPU wait, so there it is read only this often


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD on the cross entropy for `epochs` passes over the training images.

    epochs: passes, >= 0, may be fractional; 0 trains nothing.
    lr: peak learning rate, > 0.
    schedule: see `learning_rate`.
    batch_size: images per step, >= 1; the last partial batch of a pass is dropped.
    momentum: in [0, 1); `nesterov` needs it above 0.
    weight_decay: >= 0, on every parameter.
    milestones: increasing fractions of the run in (0, 1), where the "step" schedule divides the learning rate by 10.

    Raises ValueError naming the field, its value and the legal range.
    """

    epochs: float
    lr: float
    schedule: Schedule = "one-cycle"
    batch_size: int = 128
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = (0.5, 0.75)

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(
            self,
            "recipe",
            epochs=NOT_NEGATIVE,
            lr=POSITIVE,
            schedule=one_of(get_args(Schedule)),
            batch_size=integer(1),
            momentum=within("[0, 1)"),
            nesterov=Legal(
                "True or False, and False when momentum is 0",
                lambda nesterov: isinstance(nesterov, bool) and not (nesterov and self.momentum == 0),
            ),
            weight_decay=NOT_NEGATIVE,
            milestones=Legal("increasing fractions between 0 and 1", _are_increasing),
        )

    def optimizer(self, net: nn.Module) -> torch.optim.SGD:
        """Return the optimiser of every parameter of a network."""
        return torch.optim.SGD(
            net.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )


def _are_increasing(milestones: Sequence[float]) -> bool:
    return isinstance(milestones, tuple | list) and all(
        low < high for low, high in itertools.pairwise((0.0, *milestones, 1.0))
    )


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Return the learning rate when the fraction `progress`, in [0, 1], of the run is done.

    one-cycle: rises linearly from 0 to lr over the first quarter, then falls linearly to 0.
    step: lr, divided by 10 from each milestone on.
    constant: lr.

    Raises ValueError for a progress outside [0, 1].
    """
    check("recipe", recipe, instance(Recipe, "a Recipe"))
    check("progress", progress, within("[0, 1]"))
    if recipe.schedule == "one-cycle":
        return recipe.lr * min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))
    if recipe.schedule == "step":
        return recipe.lr / 10 ** sum(progress >= milestone for milestone in recipe.milestones)
    return recipe.lr


@dataclass
class State:
    """What a hook sees of a run: `step` counts from 0 to `steps` - 1; setting `stop` ends the run after this step.

    `images`, normalised and augmented, and `labels` are what the step trains on.
    """

    net: nn.Module
    optimizer: torch.optim.Optimizer
    step: int
    steps: int
    steps_per_epoch: int
    images: Tensor = field(default_factory=partial(torch.empty, 0))
    labels: Tensor = field(default_factory=partial(torch.empty, 0))
    stop: bool = False


class Hook:
    """How a pruning method takes part in training: override the moments it needs, each of which does nothing here.

    A step is: before_step, forward pass, on_loss, backward pass, after_gradients, optimiser update, after_step.
    """

    def start(self, state: State) -> None:
        """Run once, before the first step, with the net on its device and in training mode."""

    def before_step(self, state: State) -> None:
        """Run before the forward pass, with the step's learning rate already set on the optimiser."""

    def on_loss(self, state: State, loss: Tensor) -> Tensor:
        """Return the loss to differentiate, given the mean cross entropy of the batch (a scalar)."""
        return loss

    def after_gradients(self, state: State) -> None:
        """Run after the backward pass, with this step's gradient in every parameter's `grad`."""

    def after_step(self, state: State) -> None:
        """Run after the optimiser has updated the parameters."""


@dataclass(frozen=True)
class History:
    """What a run did.

    loss: mean over each pass of the loss that was differentiated; the last pass may be a partial one.
    steps: updates made.
    epochs: passes made, steps / steps per epoch.
    seconds: wall-clock time.
    """

    loss: tuple[float, ...]
    steps: int
    epochs: float
    seconds: float


@dataclass(frozen=True)
class Context:
    """What a pruning method is given to work with.

    data: what it trains and measures on.
    recipe: of the training that follows the dense net's; its epochs are all the effort, the method's and the caller's.
    seed: of everything random, >= 0.
    progress: whether to show bars.
    initial: the dense net before its training, and dense: how it was trained. Methods that go back to the start need
        both; they refuse a context without.
    """

    data: Data
    recipe: Recipe
    seed: int
    progress: bool = True
    initial: nn.Module | None = None
    dense: Recipe | None = None

    @property
    def steps_per_epoch(self) -> int:
        """How many updates one pass over the training images makes."""
        return len(self.data.train.labels) // self.recipe.batch_size

    def constant(self, epochs: float, lr: float) -> Recipe:
        """Return the recipe for so many epochs at a constant learning rate."""
        return replace(self.recipe, epochs=epochs, schedule="constant", lr=lr)

    def train(self, net: nn.Module, recipe: Recipe, hook: Hook, label: str, seed: int | None = None) -> History:
        """Train a network in place with `fit`, by the context's seed if no other is given."""
        seed = self.seed if seed is None else seed
        return fit(net, self.data, recipe, seed=seed, hook=hook, progress=self.progress, label=label)


def fit(
    net: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    seed: int,
    hook: Hook | None = None,
    progress: bool = True,
    label: str = "train",
) -> History:
    """Train `net` in place for max(1, round(epochs * steps per epoch)) steps; with 0 epochs return at once.

    The net moves to the data's device and is left in eval mode, without gradients. On a GPU the forward pass runs in
    bfloat16 where autocast allows it. `seed` alone decides the batches; it also seeds PyTorch's global generator for
    the length of the run (dropout, random hooks), after which the caller's generator state is restored. On one CPU with
    one number of threads, a run is reproduced bit for bit; on a GPU, as far as the layers have deterministic kernels.

    Raises ValueError for a batch larger than the training split, a net that is frozen or not float32, and one whose
    output does not match the classes; FloatingPointError, naming step and recipe, for a loss that is not finite.
    """
    check("net", net, NETWORK)
    check("data", data, instance(Data, "a Data"))
    check("recipe", recipe, instance(Recipe, "a Recipe"))
    check("seed", seed, integer(0))
    available = len(data.train.labels)
    if recipe.batch_size > available:
        raise ValueError(f"recipe: batch_size is {recipe.batch_size}; {data.name} has {available} training images")
    if recipe.epochs == 0:
        return History(loss=(), steps=0, epochs=0.0, seconds=0.0)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ValueError("the net cannot be trained: every parameter has requires_grad=False")

    steps_per_epoch = available // recipe.batch_size
    steps = max(1, round(recipe.epochs * steps_per_epoch))
    if data.device.type == "cpu":
        keep_freed_memory()
    began = time.perf_counter()
    hook = hook or Hook()
    _place(net, data).train()
    optimizer = recipe.optimizer(net)
    state = State(net, optimizer, step=0, steps=steps, steps_per_epoch=steps_per_epoch)
    losses = torch.zeros(steps, device=data.device)
    batches = _training_batches(data, recipe.batch_size, seed)
    check_steps = GPU_CHECK_STEPS if data.device.type == "cuda" else 1

    with deterministic(seed, data.device), tqdm(total=steps, desc=label, leave=False, disable=not progress) as bar:
        hook.start(state)
        for step, (images, labels) in zip(range(steps), batches, strict=False):
            state.step, state.images, state.labels = step, images, labels
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, (step + 0.5) / steps)  # mid-step: neither end wastes a step on 0
            hook.before_step(state)
            loss = hook.on_loss(state, F.cross_entropy(_logits(net, images, data), labels))
            losses[step] = loss.detach()
            if (step + 1) % check_steps == 0:
                _check_finite(losses[: step + 1], check_steps, recipe)
                epoch_loss = losses[step - step % steps_per_epoch : step + 1].mean()
                bar.set_postfix_str(f"loss {epoch_loss:.3f}", refresh=False)
            optimizer.zero_grad()
            loss.backward()
            hook.after_gradients(state)
            optimizer.step()
            hook.after_step(state)
            bar.update()
            if state.stop:
                break
    optimizer.zero_grad()
    net.eval()

    made = state.step + 1
    _check_finite(losses[:made], check_steps, recipe)
    return History(
        loss=tuple(float(epoch.mean()) for epoch in losses[:made].split(steps_per_epoch)),
        steps=made,
        epochs=made / steps_per_epoch,
        seconds=time.perf_counter() - began,
    )


def evaluate(
    net: nn.Module, data: Data, split: Literal["train", "val", "test"] = "val", batch_size: int = 1024
) -> float:
    """Return the accuracy on a split, in percent: 100 x right answers / images.

    The net moves to the data's device; the training mode of every module is kept.

    Raises:
        ValueError: `net` is no module, or has parameters other than float32; or `data` is no Data.
    """
    check("data", data, instance(Data, "a Data"))
    _place(net, data)  # outside inference mode, whose tensors could not be trained afterwards
    with evaluating(net), torch.inference_mode():
        right = torch.zeros((), dtype=torch.int64, device=data.device)
        for images, labels in data.batches(split, batch_size):
            right += (_logits(net, images, data).argmax(dim=1) == labels).sum()
    return 100 * right.item() / len(getattr(data, split).labels)


def recalibrate(net: nn.Module, data: Data, batches: int = 20, batch_size: int = 256, seed: int = 0) -> None:
    """Re-estimate the statistics of every BatchNorm1d and BatchNorm2d as plain means over `batches` training batches.

    Removing channels changes what the next layers see, and the running statistics no longer fit. The images are drawn
    and augmented as in training, because those are the images the running statistics of an unpruned net describe.
    Batch norm alone is in training mode (dropout is off); weights, momentum and modes stay as they are. A net without
    batch norm is left untouched. `batch_size` is at most the number of training images; `batches` >= 1.
    """
    check("net", net, NETWORK)
    check("data", data, instance(Data, "a Data"))
    check("batches", batches, integer(1))
    check("batch_size", batch_size, integer(1))
    check("seed", seed, integer(0))
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    source = _training_batches(data, min(batch_size, len(data.train.labels)), seed)
    _place(net, data)
    with evaluating(net), torch.no_grad():
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.train()
            for _, (images, _labels) in zip(range(batches), source, strict=False):
                _logits(net, images, data)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _training_batches(data: Data, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield training batches for ever, shuffled anew for each pass by a generator of their own.

    Their own, so that a hook or a layer that draws random numbers does not change which images the net sees.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from data.batches("train", batch_size, generator)


def _place(net: nn.Module, data: Data) -> nn.Module:
    """Move the net to the data's device, 4-D parameters in the layout the images have."""
    check("net", net, NETWORK)
    if other := {p.dtype for p in net.parameters()} - {torch.float32}:
        raise ValueError(f"the net has parameters of type {other.pop()}; images are torch.float32: use net.float()")
    return net.to(data.device).to(memory_format=torch.channels_last)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return the context of every forward pass: bfloat16 where autocast allows it on a GPU, nothing else elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def _logits(net: nn.Module, images: Tensor, data: Data) -> Tensor:
    """Run the net, in mixed precision on a GPU."""
    with mixed_precision(data.device):
        logits = net(images)
    if logits.shape != (len(images), len(data.classes)):
        wanted = [len(images), len(data.classes)]
        raise ValueError(f"the net returns a tensor of shape {list(logits.shape)}; {data.name} needs {wanted}")
    return logits


def _check_finite(losses: Tensor, recent: int, recipe: Recipe) -> None:
    """Raise FloatingPointError, naming the step, if one of the last `recent` losses is not finite."""
    bad = (~losses[-recent:].isfinite()).nonzero()
    if len(bad):
        step = max(len(losses) - recent, 0) + int(bad[0])
        raise FloatingPointError(f"the loss is {losses[step].item()} at step {step} (counted from 0) of {recipe}")


@contextmanager
def deterministic(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators and choose deterministic convolutions; give the caller's state back at the end."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before
