"""What a step of DMCP's search costs beside a plain training step, measured in turns in one run.

python benchmarks/dmcp.py [--model convnet-bn] [--steps 10] [--rounds 3]

Uses CIFAR-10 where `PRUNELAB_DATA` has it, else the digits at 32 pixels.
"""

from __future__ import annotations

import os
import statistics

import torch
import typer

from prunelab import data, models
from prunelab.methods.dmcp import DMCP, Chains, ExpectedCost, Search, Supernet
from prunelab.structure import Budget, ChannelSpace
from prunelab.training import Recipe, fit


def main(model: str = "convnet-bn", steps: int = 10, rounds: int = 3, batch_size: int = 128) -> None:
    """Print milliseconds per step of plain training and of both halves of the search, and the ratios of the medians."""
    images = data.load("cifar10") if os.environ.get("PRUNELAB_DATA") else data.load("digits", image_size=32)
    recipe = Recipe(steps * batch_size / len(images.train.labels), lr=1e-3, batch_size=batch_size)
    budget = Budget(macs=0.25, scope="conv")

    def build() -> torch.nn.Module:
        return models.build(model, classes=len(images.classes), shape=images.shape, seed=0)

    def plain() -> float:
        run = fit(build(), images, recipe, seed=0, progress=False)
        return run.seconds / run.steps

    def search(warmup: float) -> float:
        space = ChannelSpace(build(), images.example)
        cost = ExpectedCost(space, budget)
        hook = Search(Supernet(space), Chains(space.sizes), cost, budget.fraction, DMCP(warmup=warmup))
        run = fit(hook.supernet, images, recipe, seed=0, hook=hook, progress=False)
        return run.seconds / run.steps

    seconds: dict[str, list[float]] = {"plain": [], "four networks": [], "and α": []}
    for _ in range(rounds):
        seconds["plain"].append(plain())
        seconds["four networks"].append(search(warmup=0.999))
        seconds["and α"].append(search(warmup=0))
    middle = statistics.median(seconds["plain"])
    print(f"{model}, {images.name} ({images.source}), batch {batch_size}, {torch.get_num_threads()} threads")
    for name, found in seconds.items():
        low, high = min(found) * 1e3, max(found) * 1e3
        ratio = statistics.median(found) / middle
        print(f"{name:14s} {statistics.median(found) * 1e3:8.1f} ms a step [{low:.1f}, {high:.1f}]  {ratio:.3f}x")


if __name__ == "__main__":
    typer.run(main)
