"""Does a convolution over some columns of its im2col matrix pay? Milliseconds against PyTorch's dense convolutions.

python benchmarks/columns.py layers     # three layers at 1/2, 1/4 and 1/10 of their columns: inference
python benchmarks/columns.py training   # the same, forward and backward
python benchmarks/columns.py networks   # VGG-16 and AlexNet at a quarter of the MACs, by columns and by filters

What is compared is timed in turns in one run, so that what else the machine does hits all alike. A speedup is over the
better of the dense convolutions in contiguous and in channels_last memory.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision import models
from tqdm import tqdm

from prunelab import Budget, ChannelSpace, ColumnSpace, cost
from prunelab.layers import ColumnConv2d

LAYERS: dict[str, tuple[nn.Conv2d, tuple[int, ...]]] = {
    "VGG-16 conv3_2": (nn.Conv2d(256, 256, 3, padding=1), (1, 256, 56, 56)),
    "VGG-16 conv4_2": (nn.Conv2d(512, 512, 3, padding=1), (1, 512, 28, 28)),
    "AlexNet conv2": (nn.Conv2d(64, 192, 5, padding=2), (8, 64, 27, 27)),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {"VGG-16": models.vgg16, "AlexNet": models.alexnet}
DENSE = ("contiguous", "channels_last")
KEPT = (1 / 2, 1 / 4, 1 / 10)
Call = Callable[[], object]


def milliseconds(calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    """Run every call once a round, after two rounds that are not timed; return quartiles [low, median, high]."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in tqdm(range(-2, repeats), leave=False):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= 0:
                found[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.quantiles(values, n=4, method="inclusive") for name, values in found.items()}


def peak_megabytes(call: Call) -> float:
    """Return the most memory that PyTorch held at once during a call, beyond what it held before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def in_columns(conv: nn.Conv2d, fraction: float) -> ColumnConv2d:
    """Keep a random fraction of a convolution's columns."""
    width = conv.weight[0].numel()
    kept = torch.randperm(width, generator=torch.Generator().manual_seed(0))[: round(width * fraction)]
    return ColumnConv2d(conv, kept.sort().values)


def channels_last(layer: nn.Module) -> nn.Module:
    """Return a copy with its kernels in channels_last memory."""
    return copy.deepcopy(layer).to(memory_format=torch.channels_last)


def run(layer: nn.Module, x: Tensor, training: bool) -> Call:
    """Return a call of `layer`, with the gradients of its input and its parameters when training."""
    if not training:
        return lambda: layer(x)
    x = x.clone().requires_grad_()
    gradient = torch.randn_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], gradient)


def matmul(layer: ColumnConv2d, positions: int, training: bool) -> Call:
    """Return a call of the layer's matrix products alone: one, and two more when training."""
    weight = layer.weight.detach()
    rows, output = torch.randn(weight.shape[1], positions), torch.randn(weight.shape[0], positions)
    return (lambda: (weight @ rows, weight.t() @ output, output @ rows.t())) if training else (lambda: weight @ rows)


def by_im2col(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve through the whole im2col matrix."""
    assert not isinstance(conv.padding, str)
    return conv.weight.flatten(1) @ F.unfold(x, conv.kernel_size, padding=conv.padding)


def layers(repeats: int, training: bool) -> None:
    """Print a line per layer and share of its columns, and the geometric mean of the speedups at each share."""
    names = (*DENSE, "columns", "matmul alone")
    print("forward and backward" if training else "inference", "in ms: median [quartiles]; peak memory in MB")
    print(
        f"{'layer':15}{'kept':>5}"
        + "".join(f"{name:>21}" for name in names)
        + f"{'speedup':>9}{'MB':>7}{'im2col MB':>11}"
    )
    speedups: dict[float, list[float]] = {fraction: [] for fraction in KEPT}
    for name, (conv, shape) in LAYERS.items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        naive = peak_megabytes(partial(by_im2col, conv, x))
        for fraction in KEPT:
            ours = in_columns(conv, fraction)
            calls = {
                "contiguous": run(conv, x, training),
                "channels_last": run(channels_last(conv), x.contiguous(memory_format=torch.channels_last), training),
                "columns": run(ours, x, training),
                "matmul alone": matmul(ours, conv(x)[:, 0].numel(), training),
            }
            found = milliseconds(calls, repeats)
            speedups[fraction].append(min(found[key][1] for key in DENSE) / found["columns"][1])
            cells = "".join(
                f"{f'{m:.1f} [{low:.1f}, {high:.1f}]':>21}" for low, m, high in (found[key] for key in names)
            )
            memory = f"{peak_megabytes(calls['columns']):7.1f}{naive:11.1f}"
            print(f"{name:15}{fraction:5.2f}{cells}{speedups[fraction][-1]:8.2f}x{memory}", flush=True)
    for fraction, found_here in speedups.items():
        print(f"geometric mean at {fraction:.2f} of the columns: {statistics.geometric_mean(found_here):.2f}x")


def networks(repeats: int, name: str, batch: int) -> None:
    """Print what a network and its convolutional part alone gain at a quarter of the convolution MACs, by unit."""
    net, x = NETWORKS[name]().eval(), torch.randn(batch, 3, 224, 224)
    cut = {}
    for unit, make in {"columns": ColumnSpace, "filters": ChannelSpace}.items():
        space = make(net, x[:1])
        cut[unit] = space.shrink(space.plan_for(space.scores("random"), Budget(macs=0.25, scope="conv")))
    print(f"{name}, batch {batch}, in ms: median [quartiles]")
    for part in ("whole", "features"):

        def piece(whole: nn.Module, part: str = part) -> nn.Module:
            return whole if part == "whole" else whole.get_submodule(part)

        calls: dict[str, dict[str, Call]] = {}
        for label, whole in {"dense": net, **cut}.items():
            calls[label] = {
                f"{label} contiguous": run(piece(whole), x, training=False),
                f"{label} channels_last": run(
                    channels_last(piece(whole)), x.contiguous(memory_format=torch.channels_last), training=False
                ),
            }
        found = milliseconds({key: call for both in calls.values() for key, call in both.items()}, repeats)
        best = {label: min((found[key] for key in both), key=lambda q: q[1]) for label, both in calls.items()}
        macs = {label: cost.macs(piece(whole), x) for label, whole in {"dense": net, **cut}.items()}
        for label, (low, median, high) in best.items():
            speedup, reduction = best["dense"][1] / median, macs["dense"] / macs[label]
            print(
                f"{part:9}{label:8}{median:9.1f} [{low:.1f}, {high:.1f}]  speedup {speedup:.2f}x"
                f" / MACs reduction {reduction:.2f}x = {speedup / reduction:.2f}",
                flush=True,
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "training", "networks"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--network", choices=NETWORKS, action="append", help="for networks; both if not given")
    parser.add_argument("--batch", type=int, action="append", help="for networks; 1 and 8 if not given")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads, medians of {arguments.repeats}")
    if arguments.what == "networks":
        with torch.inference_mode():
            for name in arguments.network or NETWORKS:
                for batch in arguments.batch or (1, 8):
                    networks(arguments.repeats, name, batch)
    else:
        with torch.inference_mode(arguments.what == "layers"):
            layers(arguments.repeats, training=arguments.what == "training")


if __name__ == "__main__":
    main()
