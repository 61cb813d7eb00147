"""Measure how many candidate plans a second a search can cost: in closed form, and by counting cut networks.

python benchmarks/search.py [--model resnet56] [--unit filters+columns] [--plans 20000]

An action of AutoCompress is drawn, ordered by layer size and multiplied until it meets the target, which costs some
thirty plans and more; no network is built for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import typer

from prunelab import cost, models
from prunelab.methods.autocompress import Actions
from prunelab.methods.base import space_of
from prunelab.structure import Budget


def main(
    model: str = "resnet56", unit: str = "filters+columns", plans: int = 20_000, target: float = 0.5, repeats: int = 5
) -> None:
    """Print plans per second of each way, the best of some repeats, on one thread."""
    torch.set_num_threads(1)
    space = space_of(unit, models.build(model, seed=0), torch.zeros(1, 3, 32, 32))
    draw, spent = np.random.default_rng(0), space.spent(Budget(target))
    widths = draw.integers(1, space.sizes + 1, (plans, len(space.sizes)))
    actions = Actions(space, space.plan({}), Budget(target))
    rates = draw.uniform(0, 1, (20, len(space.sizes)))
    some = [space.plan_for(space.scores("l2"), row.tolist()) for row in widths[:3]]
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "plans, all at once: space.cost": (plans, lambda: space.cost(widths)),
        "plans, one by one: space.spent": (plans // 10, lambda: [spent(row) for row in widths[: plans // 10]]),
        "actions that meet the target": (len(rates), lambda: [actions.widths(actions.guided(row)) for row in rates]),
        "plans, by counting the cut network": (
            len(some),
            lambda: [cost.macs(space.shrink(plan), space.example) for plan in some],
        ),
    }
    print(f"{model}, {unit}: {len(space.sizes)} groups, {space.sizes.sum()} units")
    found = {what: count / min(_seconds(way) for _ in range(repeats)) for what, (count, way) in ways.items()}
    *_, slowest = found.values()
    for what, rate in found.items():
        print(f"{what:36} {rate:12,.0f} a second {rate / slowest:10,.0f} x")


def _seconds(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


if __name__ == "__main__":
    typer.run(main)
