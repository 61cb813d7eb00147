"""Folders in ImageNet's layout, streamed from disk, and the papers' recipes for ImageNet.

A folder holds train/<class>/<picture> and val/<class>/<picture>. What a picture looks like in an epoch depends on the
seed, the epoch and its place in the folder alone, never on how many workers or processes share the work.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2 as transforms

from prunelab.training import Recipe

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, as torchvision's weights expect
RESIZED = 256 / 224  # of the size: a validation picture's shorter side before its centre is cut out
ORDER, AUGMENTATION, NOISE = range(3)  # what random numbers are for


class Setting(NamedTuple):
    """A recipe for ImageNet, and where its numbers come from."""

    recipe: Recipe
    source: str


def _epochs(updates: int, batch_size: int) -> float:
    """Return how many passes over ImageNet's 1,281,167 training images so many updates make."""
    return updates / (1_281_167 // batch_size)


RECIPES: dict[str, Setting] = {
    "alexnet": Setting(
        Recipe(_epochs(220_000, 256), 1e-3, "step", 256, 0.9, False, 2.5e-4, (80 / 220, 160 / 220, 200 / 220)),
        "SSL's released configuration: fine-tuning of CaffeNet after the group lasso",
    ),
    "vgg16": Setting(
        Recipe(_epochs(200_000, 128), 1e-5, "constant", 128, 0.9, False, 0.0),
        "Channel Pruning's released solver: fine-tuning of VGG-16 cut by 3C",
    ),
    "vgg16-scratch": Setting(
        Recipe(90, 0.01, "step", 256, 0.9, False, 1e-4, (1 / 3, 2 / 3)),
        "Rethinking's released code, for VGG without batch norm; the momentum is the one it has on CIFAR",
    ),
    "resnet50": Setting(
        Recipe(90, 0.1, "step", 256, 0.9, False, 1e-4, (1 / 3, 2 / 3)),
        "Rethinking's released code; the momentum as it has on CIFAR",
    ),
    "mobilenet_v2": Setting(
        Recipe(250, 0.8, "one-cycle", 2048, 0.9, True, 4e-5),
        "ours, after DMCP's released code: its epochs, highest rate and weight decay, and the batch that MMRazor's "
        "configuration is named after; not its cosine after a short warm-up, its label smoothing of 0.1, and its "
        "batch norms and biases without weight decay",
    ),
    "fine-tune": Setting(
        Recipe(20, 1e-3, "constant", 256, 0.9, False, 1e-4),
        "L1 filter pruning's epochs and rate; batch and weight decay of Rethinking's released code",
    ),
}
"""The papers' settings. None of them has been run here: ImageNet was not trained on."""


def open_split(folder: str | os.PathLike[str], name: str) -> ImageFolder:
    """List the pictures of `train` or `val`.

    Raises:
        FileNotFoundError: the split is missing or has no class, or a class has no picture.
    """
    if not (Path(folder) / name).is_dir():
        layout = "train/<class>/<picture> and val/<class>/<picture>"
        raise FileNotFoundError(f"{folder} has no folder {name}: ImageNet's layout is {layout}")
    return ImageFolder(str(Path(folder) / name))


def training_batches(
    split: ImageFolder,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    size: int = 224,
    workers: int = 4,
    rank: int = 0,
    processes: int = 1,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return one process's part of the batches of one pass: float32 [B, 3, size, size], cut and mirrored, and labels.

    A split is shuffled, then dealt out like cards, so the parts of all processes make up the batch that one process
    would have had alone. The last batch is dropped if it is not full.

    Args:
        split: from `open_split`.
        batch_size: of this part.
        seed: >= 0.
        epoch: the pass, >= 0.
        size: pixels of a picture's side.
        workers: processes that decode; 0 decodes in the caller's.
        rank: which part, in [0, processes).
        processes: how many parts there are.

    Raises:
        ValueError: on iteration, a picture that cannot be decoded, which is named.
    """
    transform = _transform(transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip())
    pictures = _Pictures(split, transform, seed, AUGMENTATION, epoch)
    sampler: DistributedSampler[Any] = DistributedSampler(
        pictures, processes, rank, seed=derived_seed(seed, ORDER, epoch), drop_last=True
    )
    return _loader(pictures, batch_size, workers, sampler=sampler, drop_last=True)


def validation_batches(
    split: ImageFolder, batch_size: int, *, size: int = 224, workers: int = 4, rank: int = 0, processes: int = 1
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return one process's part of the split in batches, each picture's centre cut out, with arguments as above."""
    transform = _transform(transforms.Resize(round(RESIZED * size)), transforms.CenterCrop(size))
    return _loader(Subset(_Pictures(split, transform), range(rank, len(split), processes)), batch_size, workers)


def derived_seed(seed: int, *purpose: int) -> int:
    """Return a seed for one purpose; the numbers of two purposes, or of two seeds, have nothing to do with another."""
    return int(np.random.SeedSequence(seed, spawn_key=purpose).generate_state(1)[0])


class _Pictures(Dataset[tuple[Tensor, int]]):
    """Transformed pictures; `seed` and a picture's place decide its random numbers."""

    def __init__(self, split: ImageFolder, transform: transforms.Transform, *seed: int) -> None:
        self.split, self.transform, self.seed = split, transform, seed or (0,)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        path, label = self.split.samples[place]
        try:
            picture: Image.Image = self.split.loader(path)
        except (OSError, SyntaxError, ValueError) as error:  # all of these are ways in which Pillow says "broken"
            raise ValueError(f"the picture {path} cannot be decoded: {error}") from error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derived_seed(*self.seed, place))
            return self.transform(picture), label


def _transform(*cut: transforms.Transform) -> transforms.Transform:
    """Return a cut, then normalisation to float32 [3, H, W]."""
    scaled = transforms.ToDtype(torch.float32, scale=True)
    return transforms.Compose(
        [*cut, transforms.ToImage(), scaled, transforms.Normalize(MEAN, STD), transforms.ToPureTensor()]
    )


def _loader(pictures: Dataset[Any], batch_size: int, workers: int, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(
        pictures,
        batch_size,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # of its own: the global one is for dropout
        **arguments,
    )
