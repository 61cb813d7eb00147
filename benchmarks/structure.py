"""Measure the structure engine: building a space, cutting a network, and the closed-form cost of a plan."""

from __future__ import annotations

import argparse
import statistics
import time
import timeit
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from prunelab.models import build
from prunelab.structure import Budget, ChannelSpace

NETWORKS = {
    "resnet56": (3, 32, 32),
    "resnet50": (3, 224, 224),
    "vgg16_bn": (3, 224, 224),
    "densenet121": (3, 224, 224),
    "mobilenet_v2": (3, 224, 224),
}
T = TypeVar("T")


def timed(function: Callable[[], T], repeats: int) -> tuple[T, float]:
    """Return the last result and the median seconds of a few calls, after one that is not timed."""
    result, seconds = function(), []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def microseconds(function: Callable[[], object], repeats: int, calls: int = 1000) -> float:
    """Return the median over `repeats` of the mean time of `calls` calls."""
    return 1e6 * statistics.median(timeit.repeat(function, number=calls, repeat=repeats)) / calls


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"medians of {arguments.repeats}, {arguments.threads} threads")

    print(f"{'network':14}{'groups':>8}{'build ms':>10}{'cut ms':>10}{'both ms':>10}")
    for name, shape in NETWORKS.items():
        net, example = build(name, shape=shape, seed=0), torch.zeros(1, *shape)
        space, build_seconds = timed(partial(ChannelSpace, net, example), arguments.repeats)
        plan = space.plan_for(space.scores("l1"), Budget(macs=0.5))
        _, cut_seconds = timed(partial(space.shrink, plan), arguments.repeats)
        both = build_seconds + cut_seconds
        print(f"{name:14}{len(space.groups):8}{1e3 * build_seconds:10.1f}{1e3 * cut_seconds:10.1f}{1e3 * both:10.1f}")

    space = ChannelSpace(build("resnet56", seed=0), torch.zeros(1, 3, 32, 32))
    plan = space.plan_for(space.scores("l1"), Budget(macs=0.5))
    widths = space.widths(plan)
    calls: dict[str, Callable[[], object]] = {
        "space.macs(plan)": lambda: space.macs(plan),
        "space.macs(plan.widths)": lambda: space.macs(plan.widths),
        "space.cost(widths), the closed form alone": lambda: space.cost(widths),
    }
    for label, call in calls.items():
        print(f"ResNet-56 {label}: {microseconds(call, arguments.repeats):.1f} µs")


if __name__ == "__main__":
    main()
