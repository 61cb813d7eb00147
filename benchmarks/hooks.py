"""What a method's training hook adds to a plain training step, measured in turns in one run.

python benchmarks/hooks.py [--model convnet-bn] [--steps 20] [--rounds 5]

Uses CIFAR-10 where `PRUNELAB_DATA` has it, else the digits at 32 pixels.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import torch
import typer

from prunelab import data, models
from prunelab.methods.slimming import Penalty
from prunelab.methods.spp import SPP, Pruning
from prunelab.methods.ssl import SSL, Pressure, penalised
from prunelab.structure import Budget, ChannelSpace, ColumnSpace, RowColumnSpace
from prunelab.training import Hook, Recipe, fit


def main(model: str = "convnet-bn", steps: int = 20, rounds: int = 5, batch_size: int = 128) -> None:
    """Print milliseconds per step without and with each hook, and the ratio of the medians."""
    images = data.load("cifar10") if os.environ.get("PRUNELAB_DATA") else data.load("digits", image_size=32)
    budget = Budget(macs=0.25, scope="conv")
    steps_per_epoch = len(images.train.labels) // batch_size
    recipe = Recipe(steps / steps_per_epoch, lr=1e-3, batch_size=batch_size)

    def spp(unit: type[ColumnSpace] | type[ChannelSpace]) -> Callable[[torch.nn.Module], Hook]:
        def hook(net: torch.nn.Module) -> Hook:
            space = unit(net, images.example)
            return Pruning(space, SPP().counts(space, budget), SPP(t=10))

        return hook

    def ssl(settings: SSL) -> Callable[[torch.nn.Module], Hook]:
        def hook(net: torch.nn.Module) -> Hook:
            space = RowColumnSpace(net, images.example)
            return Pressure(space, penalised(space, ("filters", "columns")), settings, budget)

        return hook

    hooks: dict[str, Callable[[torch.nn.Module], Hook]] = {
        "plain": lambda net: Hook(),
        "SPP, columns": spp(ColumnSpace),
        "SPP, filters": spp(ChannelSpace),
        "slimming": lambda net: Penalty(1e-4),
        "SSL": ssl(SSL()),
        "SSL, proximal": ssl(SSL(update="proximal")),
    }
    seconds: dict[str, list[float]] = {name: [] for name in hooks}
    for _ in range(rounds):
        for name, make in hooks.items():
            net = models.build(model, classes=len(images.classes), shape=images.shape, seed=0)
            run = fit(net, images, recipe, seed=0, hook=make(net), progress=False)
            seconds[name].append(run.seconds / run.steps)
    plain = statistics.median(seconds["plain"])
    print(f"{model}, {images.name} ({images.source}), batch {batch_size}, {torch.get_num_threads()} threads")
    for name, found in seconds.items():
        middle = statistics.median(found)
        low, high = min(found) * 1e3, max(found) * 1e3
        print(f"{name:14s} {middle * 1e3:8.1f} ms a step [{low:.1f}, {high:.1f}]  {middle / plain:.3f}x")


if __name__ == "__main__":
    typer.run(main)
