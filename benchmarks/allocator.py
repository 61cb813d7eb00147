"""What it saves to keep freed memory while training on a CPU, measured in turns in one run.

python benchmarks/allocator.py [--steps 10] [--rounds 5]

Each turn is a process of its own, as an allocator cannot be set back. One thread.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
import typer

from prunelab import models
from prunelab._memory import keep_freed_memory

MODELS = "convnet-bn", "model-c", "resnet20", "vgg16"


def measure(model: str, steps: int, keep: bool) -> tuple[float, float]:
    """Return milliseconds per step, and the peak of memory in MiB."""
    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    net = models.build(model, seed=0).to(memory_format=torch.channels_last)
    images = torch.rand(128, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (128,))
    for step in range(-2, steps):  # two to warm up
        if step == 0:
            began = time.perf_counter()
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()
    milliseconds = (time.perf_counter() - began) / steps * 1e3
    return milliseconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(steps: int = 10, rounds: int = 5) -> None:
    """Print, for each network, both times per step with their range, the ratio of the medians, and both peaks."""
    spawn = multiprocessing.get_context("spawn")
    for model in MODELS:
        found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for _ in range(rounds):
            for keep, turns in found.items():
                with ProcessPoolExecutor(1, spawn) as process:
                    turns.append(process.submit(measure, model, steps, keep).result())
        line = f"{model:11s}"
        for keep, turns in found.items():
            times, peaks = zip(*turns, strict=True)
            line += f"  {'kept' if keep else 'default'} {statistics.median(times):6.0f} ms"
            line += f" [{min(times):.0f}, {max(times):.0f}], peak {statistics.median(peaks):.0f} MiB"
        default, kept = (statistics.median(time for time, _ in found[keep]) for keep in (False, True))
        print(f"{line}  {kept / default:.2f}x")


if __name__ == "__main__":
    typer.run(main)
