"""Measure the ranks of feature maps: ways to count singular values, and a whole network on some hundred images.

python benchmarks/ranks.py [--model resnet56] [--images 500] [--repeats 3]

Uses CIFAR-10 where `PRUNELAB_DATA` has it, else the digits at 32 pixels. The network has random weights, which changes
nothing but the ranks. A way is right on a map if it counts what singular values in float64 count.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import typer
from torch import Tensor

from prunelab import data, models, scores
from prunelab.structure import ChannelSpace
from prunelab.structure.maps import mean_over_maps

EPSILON = torch.finfo(torch.float32).eps
T = TypeVar("T")
SAMPLE = 4096  # maps of each size that the ways are compared on


def singular_values(maps: Tensor) -> Tensor:
    """Count the singular values above max(H, W)·ε·σ₁."""
    values = torch.linalg.svdvals(maps)
    return (values > max(maps.shape[-2:]) * EPSILON * values[..., :1]).sum(-1)


def gram(maps: Tensor) -> Tensor:
    """Count the eigenvalues σ² of MMᵀ above the square of the same bound."""
    squares = torch.linalg.eigvalsh(maps @ maps.mT)
    return (squares > (max(maps.shape[-2:]) * EPSILON) ** 2 * squares[..., -1:]).sum(-1)


def triangular(maps: Tensor) -> Tensor:
    """Count the diagonal entries of R in M = QR above the same bound times the largest."""
    diagonal = torch.linalg.qr(maps, mode="r").R.diagonal(dim1=-2, dim2=-1).abs()
    return (diagonal > max(maps.shape[-2:]) * EPSILON * diagonal.amax(-1, keepdim=True)).sum(-1)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "map_rank, what prunelab does": scores.map_rank,
    "singular values, float32": singular_values,
    "singular values, float64": lambda maps: singular_values(maps.double()),
    "eigenvalues of MMᵀ, float32": gram,
    "eigenvalues of MMᵀ, float64": lambda maps: gram(maps.double()),
    "QR without pivots, float32": triangular,
}


def main(model: str = "resnet56", images: int = 500, repeats: int = 3, threads: int = torch.get_num_threads()) -> None:
    """Print microseconds per map and wrong ranks of each way, then seconds for the whole network."""
    torch.set_num_threads(threads)
    source = data.load("cifar10") if os.environ.get("PRUNELAB_DATA") else data.load("digits", image_size=32)
    net = models.build(model, classes=len(source.classes), shape=source.shape, seed=0).eval()
    space = ChannelSpace(net, source.example)
    batch, _ = next(source.batches("train", images, torch.Generator().manual_seed(0)))
    print(f"{model}, {source.name} ({source.source}), {threads} threads, medians of {repeats}")

    found = sample(space, batch)
    print(f"{'µs per map (wrong ranks)':30s}" + "".join(f"{f'{h} x {w}':>20s}" for h, w in found))
    for label, way in WAYS.items():
        cells = []
        for maps in found.values():
            seconds, ranks = timed(partial(way, maps), repeats)
            wrong = (ranks != singular_values(maps.double())).double().mean()
            cells.append(f"{1e6 * seconds / len(maps):10.1f} ({wrong:6.2%})")
        print(f"{label:30s}" + "".join(f"{cell:>20s}" for cell in cells))

    seconds, _ = timed(partial(space.scores, scores.feature_rank(batch)), 1)
    print(f"all ranks of {model} on {images} images: {seconds:.1f} s")


def sample(space: ChannelSpace, batch: Tensor) -> dict[tuple[int, int], Tensor]:
    """Return some of the network's feature maps, {(H, W): [maps, H, W]}."""
    found: dict[tuple[int, int], list[Tensor]] = {}

    def keep(maps: Tensor) -> Tensor:
        found.setdefault((maps.shape[2], maps.shape[3]), []).append(maps.flatten(0, 1).clone())
        return maps.mean((2, 3))

    mean_over_maps(space, keep, [batch[:8]])
    every = {size: torch.cat(maps) for size, maps in found.items()}
    return {size: maps[torch.linspace(0, len(maps) - 1, SAMPLE).long()] for size, maps in every.items()}


def timed(function: Callable[[], T], repeats: int) -> tuple[float, T]:
    """Return the median seconds of some calls, and what the last one returned."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), result


if __name__ == "__main__":
    typer.run(main)
