"""Measure Channel Pruning: choosing and reconstructing every layer of a network from a sample of images.

python benchmarks/reconstruction.py [--model vgg16] [--macs 0.25] [--images 5000]

Uses CIFAR-10 where `PRUNELAB_DATA` has it, else the digits at 32 pixels. Weights are random: time does not depend on
them.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import typer

from prunelab import data, models
from prunelab.layerwise import LayerByLayer
from prunelab.methods.channel_pruning import RATIOS, ChannelPruning
from prunelab.structure import Budget
from prunelab.training import Context, Recipe

STEPS = ((LayerByLayer, "prepare"), (LayerByLayer, "readers"), (ChannelPruning, "select"), (LayerByLayer, "cut"))


def main(model: str = "vgg16", macs: float = 0.25, images: int = 5000, positions: int = 10) -> None:
    """Print the seconds that the steps took, and all of it."""
    sample = data.load("cifar10") if os.environ.get("PRUNELAB_DATA") else data.load("digits", image_size=32)
    net = models.build(model, classes=len(sample.classes), shape=sample.shape, seed=0)
    method = ChannelPruning(images=images, positions=positions, ratios=RATIOS.get(model))
    seconds: defaultdict[str, float] = defaultdict(float)

    def timed(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = step(*args, **kwargs)
            seconds[name] += time.perf_counter() - began
            return result

        return call

    for owner, name in STEPS:
        setattr(owner, name, timed(name, getattr(owner, name)))
    run = timed("all", method)
    pruned = run(net, Budget(macs=macs, scope="conv"), Context(sample, Recipe(epochs=1, lr=0.1), 0, progress=False))
    print(f"{model}, {sample.name}, {images} images x {positions} positions, {torch.get_num_threads()} threads")
    print(f"kept {macs:g} of the convolution MACs, {len(pruned.history['errors'])} groups: {pruned.plan}")
    print(", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items()))


if __name__ == "__main__":
    typer.run(main)
