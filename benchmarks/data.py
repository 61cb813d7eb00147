"""Measure the data path: images per second against torchvision's, and its share of a training epoch.

It uses CIFAR-10 from the folder `PRUNELAB_DATA`, or the digits at 32 pixels without it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from prunelab.data import Data, load


class PictureByPicture(Dataset[tuple[torch.Tensor, int]]):
    """The training split one image at a time, through torchvision's transforms: the usual way."""

    def __init__(self, data: Data) -> None:
        self.pictures = [to_pil_image(image) for image in data.train.images]
        self.labels = data.train.labels.tolist()
        mirror = [v2.RandomHorizontalFlip()] if data.flip else []
        self.transform = v2.Compose(
            [
                v2.RandomCrop(data.shape[1:], padding=data.padding),
                *mirror,
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(data.mean, data.std),
            ]
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return one augmented, normalised image and its label."""
        return self.transform(self.pictures[index]), self.labels[index]


Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def seconds_per_batch(batches: Batches, limit: int, warmup: int = 3) -> float:
    """Return the mean seconds per batch over `limit` batches, the first few (starting workers) left out."""
    iterator: Iterator[object] = iter(batches)
    for _ in islice(iterator, warmup):
        pass
    start = time.perf_counter()
    number = sum(1 for _ in islice(iterator, limit))
    return (time.perf_counter() - start) / number


def training_step_seconds(data: Data, batch_size: int, steps: int) -> tuple[float, float]:
    """Return the median seconds of getting a batch and of a whole step, for ConvNet with SGD on the CPU."""
    from prunelab.models import build

    net = build("convnet", classes=len(data.classes), shape=data.shape, seed=0).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    batches = data.batches("train", batch_size, torch.Generator().manual_seed(0))
    next(batches)  # the first one also shuffles the whole split
    waits, totals = [], []
    for _ in range(steps):
        start = time.perf_counter()
        images, labels = next(batches)
        waits.append(time.perf_counter() - start)
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        totals.append(time.perf_counter() - start)
    return statistics.median(waits), statistics.median(totals)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=100, help="batches to time per round, at most")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all loaders; the median is reported")
    parser.add_argument("--steps", type=int, default=20, help="training steps to time")
    arguments = parser.parse_args()
    data = load("cifar10") if os.environ.get("PRUNELAB_DATA") else load("digits", image_size=32)
    size = arguments.batch_size
    print(f"{data.name} {data.shape} from {data.source}, batch {size}, {torch.get_num_threads()} threads")

    dataset, generator = PictureByPicture(data), torch.Generator().manual_seed(0)

    def dataloader(workers: int) -> Batches:
        return DataLoader(dataset, size, shuffle=True, drop_last=True, num_workers=workers, generator=generator)

    limit = min(arguments.batches, len(data.train.labels) // size - 3)
    if limit < 1:
        parser.error(f"--batch-size must leave at least 4 batches of {len(data.train.labels)} images")
    loaders = {
        "prunelab": lambda: data.batches("train", size, generator),
        "DataLoader, 0 workers": lambda: dataloader(0),
        "DataLoader, 2 workers": lambda: dataloader(2),
    }
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(arguments.rounds):  # in turn, so that a busy moment of the machine hits all alike
        for name, loader in loaders.items():
            times[name].append(seconds_per_batch(loader(), limit))
    print(f"{'loader':24}{'ms/batch':>10}{'images/s':>12}{'ratio':>8}")
    ours = statistics.median(times["prunelab"])
    for name, values in times.items():
        seconds = statistics.median(values)
        print(f"{name:24}{1e3 * seconds:10.2f}{size / seconds:12,.0f}{seconds / ours:7.1f}x")

    steps = min(arguments.steps, len(data.train.labels) // size - 1)
    wait, total = training_step_seconds(data, size, steps)
    print(f"ConvNet training step {1e3 * total:.1f} ms, of which batches() {1e3 * wait:.2f} ms ({wait / total:.1%})")


if __name__ == "__main__":
    main()
