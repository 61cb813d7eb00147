"""Measure the structure engine beside Torch-Pruning: speed, exactness, peak memory; and the cost of a plan.

Torch-Pruning is not a dependency: `pip install --group benchmarks`. Each table can be had alone, as in
`python benchmarks/structure.py speed`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torchvision.models import get_model

from prunelab import cost
from prunelab.models import build
from prunelab.structure import Budget, ChannelSpace
from prunelab.structure.space import kept_count

try:
    import torch_pruning
except ImportError:
    torch_pruning = None

SPEED = ("vgg16_bn", "resnet50", "densenet121", "googlenet", "mobilenet_v2")
EXACT = (
    "alexnet", "vgg16_bn", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "googlenet", "inception_v3",
    "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0", "efficientnet_v2_s",
    "regnet_x_400mf", "regnet_y_400mf", "shufflenet_v2_x1_0", "convnext_tiny",
)  # fmt: skip
MEMORY = ("vgg16_bn", "resnet50", "densenet121", "mobilenet_v2")
SIDES = {"inception_v3": 299}  # of the images that test exactness; its auxiliary head takes no smaller ones
IMAGE = torch.zeros(1, 3, 224, 224)
T = TypeVar("T")


def network(name: str) -> nn.Module:
    """Build one of torchvision's networks, with its auxiliary heads."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    return get_model(name, weights=None, **options)


# -- speed -------------------------------------------------------------------------------------------------------------


def cut(space: ChannelSpace) -> nn.Module:
    """Score, plan and shrink: half of the filters go, by their L1 norm."""
    return space.shrink(space.plan_for(space.scores("l1"), [0.5] * len(space.groups)))


class TorchPruning:
    """The same done by Torch-Pruning, to a copy: it changes the network."""

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        self.net = net = copy.deepcopy(net)
        classifier = [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)][-1]
        importance = torch_pruning.importance.MagnitudeImportance(p=1)
        self.pruner = torch_pruning.pruner.MagnitudePruner(
            net, example, importance, pruning_ratio=0.5, ignored_layers=[classifier]
        )

    def cut(self) -> nn.Module:
        """Take the one step."""
        self.pruner.step()
        return self.net


def speed(repeats: int) -> None:
    """Time building and cutting at half of the filters, at 224x224, ours and Torch-Pruning's turn by turn."""
    print("milliseconds to build and to cut at half of the filters; MACs kept / dense")
    print(f"{'':20}{'prunelab':>32}{'Torch-Pruning':>34}")
    columns = f"{'build':>8}{'cut':>8}{'both':>8}{'MACs':>8}  "
    print(f"{'network':20}{columns}{columns}{'ratio':>8}")
    for name in SPEED:
        net = network(name).eval()
        cut(ChannelSpace(net, IMAGE))  # not timed
        ours, theirs = [], []
        for _ in range(repeats):
            space, build_seconds = timed(partial(ChannelSpace, net, IMAGE))
            small, cut_seconds = timed(partial(cut, space))
            ours.append((build_seconds, cut_seconds, build_seconds + cut_seconds))
            if torch_pruning:
                pruner, build_seconds = timed(partial(TorchPruning, net, IMAGE))
                pruned, cut_seconds = timed(pruner.cut)
                theirs.append((build_seconds, cut_seconds, build_seconds + cut_seconds))
        line = f"{name:20}{milliseconds(ours)}{cost.macs(small, IMAGE) / space.macs():8.4f}  "
        if torch_pruning:
            ratio = statistics.median(both for *_, both in theirs) / statistics.median(both for *_, both in ours)
            line += f"{milliseconds(theirs)}{cost.macs(pruned, IMAGE) / space.macs():8.4f}  {ratio:7.0f}x"
        print(line, flush=True)


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Return the result of one call and its seconds."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def milliseconds(seconds: Sequence[tuple[float, ...]]) -> str:
    """Format the median of each column."""
    return "".join(f"{1e3 * statistics.median(column):8.0f}" for column in zip(*seconds, strict=True))


# -- exactness ---------------------------------------------------------------------------------------------------------


def exactness() -> None:
    """Say which networks are cut exactly: float64, half of the units of every group at random, outputs and training.

    Torch-Pruning is given the masked network: the half with the smallest L1 norm is all zeros, so that removing it
    changes no output. "differs" says that other channels went: of grouped convolutions it takes the same share in every
    group, and it cuts channels whose layer norm counts them.
    """
    print("output of the cut against the masked network, float64, half of the units at random; and a training pass")
    print(f"{'network':20}{'prunelab':24}Torch-Pruning")
    for name in EXACT:
        net, side = network(name).double(), SIDES.get(name, 96)
        x = torch.randn(2, 3, side, side, dtype=torch.float64)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the first batch sets the statistics: something has to reach the output
        with torch.no_grad():
            net(x)
        space = ChannelSpace(net, x)
        plan = space.plan_for(space.scores("random"), [0.5] * len(space.groups))
        masked = space.mask(plan)
        ours = verdict(partial(space.shrink, plan), masked, x)
        theirs = verdict(partial(cut_by_torch_pruning, masked, x), masked, x) if torch_pruning else ""
        print(f"{name:20}{ours:24}{theirs}", flush=True)


def cut_by_torch_pruning(net: nn.Module, example: Tensor) -> nn.Module:
    """Build and cut."""
    return TorchPruning(net, example).cut()


def verdict(cut: Callable[[], nn.Module], masked: nn.Module, x: Tensor) -> str:
    """Cut, compare the outputs with those of the masked network, and take the gradients of a training pass."""
    try:
        small = cut()
        with torch.no_grad():
            found, expected = small.eval()(x), masked.eval()(x)
    except Exception as failure:
        return f"fails ({type(failure).__name__})"
    error = float((found - expected).abs().max() / expected.abs().max())
    exact = f"{'exact' if error < 1e-9 else 'differs'} ({error:.0e})"
    try:
        outputs = small.train()(x)
        torch.cat(outputs if isinstance(outputs, tuple) else (outputs,)).square().sum().backward()
    except Exception as failure:
        return f"{exact}, training fails ({type(failure).__name__})"
    return f"{exact}, trains"


# -- memory ------------------------------------------------------------------------------------------------------------


def memory() -> None:
    """Print the peak memory of a process that holds a network and shrinks it, in multiples of the weights (Linux)."""
    print("peak memory while shrinking / weights, the network itself included, by the share of the units that stays")
    print(f"{'network':20}{'weights, MB':>12}{'0.5':>8}{'0.99':>8}")
    for name in MEMORY:
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
            (size, half), (_, most) = processes.map(peak, [name] * 2, [0.5, 0.99])
        print(f"{name:20}{size / 2**20:12.0f}{half:8.2f}{most:8.2f}", flush=True)


def peak(name: str, share: float) -> tuple[int, float]:
    """Return the bytes of a network's weights, and the peak memory of this process over what it began with, in them."""
    cut(ChannelSpace(build("convnet"), torch.zeros(1, 3, 32, 32)))  # loads what is loaded at the first call
    start = most_resident()
    with torch.device("meta"):
        net = network(name)
    net.to_empty(device="cpu")  # its own initialisation would take memory besides
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.detach().fill_(1)
    space = ChannelSpace(net, IMAGE)
    space.shrink(space.plan({group.name: range(kept_count(group.size, share)) for group in space.groups}))
    size = cost.size_bytes(net)
    return size, (most_resident() - start) / size


def most_resident() -> int:
    """Return the most bytes that this process has held at once; `getrusage` would count those of its parent too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# -- the cost of a plan ------------------------------------------------------------------------------------------------


def closed_form(repeats: int) -> None:
    """Time what a search loop calls."""
    space = ChannelSpace(build("resnet56", seed=0), torch.zeros(1, 3, 32, 32))
    plan = space.plan_for(space.scores("l1"), Budget(macs=0.5))
    widths = space.widths(plan)
    calls: dict[str, Callable[[], object]] = {
        "space.macs(plan)": lambda: space.macs(plan),
        "space.macs(plan.widths)": lambda: space.macs(plan.widths),
        "space.cost(widths), the closed form alone": lambda: space.cost(widths),
    }
    for label, call in calls.items():
        seconds = statistics.median(timeit.repeat(call, number=1000, repeat=repeats)) / 1000
        print(f"ResNet-56 {label}: {1e6 * seconds:.1f} µs")


def main() -> None:
    """Print the tables."""
    tables: dict[str, Callable[[argparse.Namespace], None]] = {
        "speed": lambda given: speed(given.repeats),
        "exactness": lambda given: exactness(),
        "memory": lambda given: memory(),
        "cost": lambda given: closed_form(given.repeats),
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", default=list(tables), help=", ".join(tables))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    if unknown := set(given.tables) - set(tables):
        parser.error(f"no table {', '.join(unknown)}: legal values are {', '.join(tables)}")
    torch.set_num_threads(given.threads)
    print(f"medians of {given.repeats}, {given.threads} threads")
    if torch_pruning is None:
        print("Torch-Pruning is not installed, its columns stay empty: pip install --group benchmarks")
    for table in given.tables:
        tables[table](given)


if __name__ == "__main__":
    main()
