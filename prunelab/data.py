"""Image classification data sets held as whole uint8 tensors, and their batches.

A data set is decoded once, split once and cached as one safetensors file; after that every batch is cut out of the
tensors with a handful of whole-batch operations, so no worker processes are needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import lzma
import math
import operator
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from prunelab._checks import Legal, check, instance, integer, one_of, optional
from prunelab._files import cache_folder, write_atomically, writing_cache

SPLIT_SEED = 20200401
"""Seed of every train/validation split: part of a data set's definition, never of an experiment."""

UNEQUAL_SIZE = 64
"""Side in pixels given to images of unequal sizes when the caller names none."""

_SPLITS = ("train", "val", "test")
_CACHE_FORMAT = 1  # raise it when the same source would decode or split differently
_ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".zip")
_PICTURES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".ppm": "PPM", ".webp": "WebP"}
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError)


class Split(NamedTuple):
    """Images `uint8 [N, C, H, W]` (channels last in memory) and their labels `int64 [N]`."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """A data set, split and ready to train on.

    `mean` and `std` are those of the training split, per channel, in [0, 1] units. `padding` (pixels) and `flip`
    describe the augmentation of training batches. `source` says where the pixels come from, since a JPEG copy of a data
    set is not quite that data set. `digest` is the sha256 of the class names, the statistics and all three splits.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    digest: str
    source: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def example(self) -> Tensor:
        """A batch of one black image, `float32 [1, C, H, W]`, to trace a network with."""
        return torch.zeros(1, *self.shape, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.train.images.device

    def to(self, device: torch.device | str) -> Data:
        """Return the same data set with its images and labels on `device`."""
        train, val, test = (
            Split(*(tensor.to(device) for tensor in part)) for part in (self.train, self.val, self.test)
        )
        return dataclasses.replace(self, train=train, val=val, test=test)

    def normalise(self, images: Tensor) -> Tensor:
        """Return `(images / 255 - mean) / std` for `uint8 [N, C, H, W]` as `float32`, channels last in memory."""
        check("images", images, instance(Tensor, "a tensor"))
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != len(self.mean):
            raise ValueError(
                f"images must be uint8 [N, {len(self.mean)}, H, W], not {images.dtype} {list(images.shape)}"
            )
        number, channels, height, width = images.shape
        # One multiply and one add over rows of W x C numbers: broadcasting over C = 3 alone is ten times slower.
        scale, shift = (
            torch.tensor(constants, device=images.device).repeat(width)
            for constants in (
                [1 / (255 * std) for std in self.std],
                [-mean / std for mean, std in zip(self.mean, self.std, strict=True)],
            )
        )
        rows = images.permute(0, 2, 3, 1).reshape(number, height, width * channels)
        normalised = rows.to(torch.float32).mul_(scale).add_(shift)
        return normalised.view(number, height, width, channels).permute(0, 3, 1, 2)

    def batches(
        self, split: Literal["train", "val", "test"], batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate once over a split in batches of normalised images `float32 [B, C, H, W]` and labels `int64 [B]`.

        With a `generator` (on the CPU) the batches are for training: shuffled, each image mirrored with probability 1/2
        if `flip` and cut at a uniformly random place out of its copy padded by `padding` zeros, and the last batch
        dropped if it is not full. The zeros are added after normalisation, so the border is exactly the mean colour.
        Without one they are for evaluation: in order, plain and complete.

        Raises:
            ValueError: if the split is unknown, `batch_size` is below 1 or, in training, above the size of the split,
                or the generator is not on the CPU.
        """
        check("split", split, one_of(_SPLITS))
        check("batch_size", batch_size, integer(1))
        check("generator", generator, optional(instance(torch.Generator, "a torch.Generator")))
        part: Split = getattr(self, split)
        if generator is None:
            return self._plain(part, batch_size)
        if batch_size > len(part.labels):
            raise ValueError(
                f"batch_size must be at most {len(part.labels)}, the size of the {split} split of {self.name}, "
                f"not {batch_size}"
            )
        if generator.device.type != "cpu":
            raise ValueError(f"generator must be on the CPU, not on {generator.device}")
        return self._augmented(part, batch_size, generator)

    def _plain(self, part: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(part.images.split(batch_size), part.labels.split(batch_size), strict=True):
            yield self.normalise(images), labels

    def _augmented(self, part: Split, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        number = len(part.labels)
        full = number - number % batch_size
        # All of the pass's random numbers at once: one transfer to the device instead of one per batch.
        order = torch.randperm(number, generator=generator)[:full].to(self.device)
        corners = torch.randint(2 * self.padding + 1, (full, 2), generator=generator).to(self.device)
        mirrored = (torch.rand(full, generator=generator) < 0.5).to(self.device)
        pixels = part.images.permute(0, 2, 3, 1)  # as they lie in memory, so that index_select copies whole images
        draws = (order.split(batch_size), corners.split(batch_size), mirrored.split(batch_size))
        for chosen, corner, mirror in zip(*draws, strict=True):
            images = pixels.index_select(0, chosen).permute(0, 3, 1, 2)
            if self.flip:
                images = torch.where(mirror[:, None, None, None], images.flip(3), images)
            yield _crop(self.normalise(images), corner, self.padding), part.labels[chosen]


def _crop(images: Tensor, corners: Tensor, padding: int) -> Tensor:
    """Cut each image out of its copy padded by zeros, at its own `corners [B, 2]` (top, left)."""
    height, width = images.shape[2:]
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, corners[:, 0], corners[:, 1]]


@dataclass(frozen=True)
class _Kind:
    """What is known of a data set beforehand; the defaults are those of any folder of photographs."""

    channels: int = 3
    crop: int = 8  # padding is the image's side divided by this
    flip: bool = True
    dataset: str = ""  # torchvision's class, and the folder it keeps its files in
    folder: str = ""
    image_size: int | None = None
    digits: range | None = None  # which of scikit-learn's


_KINDS = {
    "digits": _Kind(channels=1, flip=False, digits=range(10)),
    "digits-0-4": _Kind(channels=1, flip=False, digits=range(5)),
    "digits-5-9": _Kind(channels=1, flip=False, digits=range(5, 10)),
    "mnist": _Kind(channels=1, crop=14, flip=False, dataset="MNIST", folder="MNIST/raw"),
    "fashion-mnist": _Kind(channels=1, crop=14, dataset="FashionMNIST", folder="FashionMNIST/raw"),
    "cifar10": _Kind(dataset="CIFAR10", folder="cifar-10-batches-py"),
    "cifar100": _Kind(dataset="CIFAR100", folder="cifar-100-python"),
    "flowers102": _Kind(dataset="Flowers102", folder="flowers-102", image_size=UNEQUAL_SIZE),
    "flowers17": _Kind(),
}

NAMES: tuple[str, ...] = tuple(_KINDS)
"""The built-in data sets."""

LEGAL = Legal(
    f"one of {', '.join(map(repr, NAMES))}, or an image folder or archive, by its path or its name in PRUNELAB_DATA",
    lambda name: name in NAMES or (name and _exists(name)),
)
"""What `load` takes for a name."""


class _Decoded(NamedTuple):
    classes: tuple[str, ...]
    splits: dict[str, Split]  # train and test, or train, val and test
    source: str


class _Source(NamedTuple):
    digest: str  # changes when the source does
    decode: Callable[[int | None], _Decoded]  # given the side in pixels, or None for the images' own


def load(name: str, *, image_size: int | None = None) -> Data:
    """Load a data set by name, decoding it first if it is not in the cache.

    `name` is one of `NAMES`, or an image archive (.tar, .tar.xz, .tar.gz, .zip) or folder laid out as
    `<name>/<split>/<class>/<picture>`, given by path or by its name inside the folder `PRUNELAB_DATA`. The splits are
    `train` and `test` (or `val`); others are ignored. Built-in names are looked for in `PRUNELAB_DATA` first, as such
    an archive or folder or as torchvision lays them out, and are otherwise downloaded by torchvision.

    Where the source has no validation split of its own, one tenth of the training images, drawn by class, are set aside
    (digits, which come as one set: 60% train, 20% val, 20% test; `digits-0-4` and `digits-5-9` are five classes each).
    `image_size` is the side in pixels that images are resized (shorter side) and centre-cropped to: by default their
    own, or 64 where they differ in size.

    Raises:
        ValueError: if the name is unknown, `image_size` is below 1, or the archive or the cached file is damaged.
        FileNotFoundError: if the data set is not in `PRUNELAB_DATA` and cannot be downloaded.
    """
    legal = f"one of {', '.join(NAMES)}, or the path of an image folder or archive"
    check("name", name, Legal(legal, lambda name: isinstance(name, str) and name))
    check("image_size", image_size, optional(integer(1)))
    kind = _KINDS.get(name, _Kind())
    if kind.digits:
        return _assemble(name, kind, _digits(kind.digits, image_size))
    image_size = image_size or kind.image_size
    source = _find(name, kind)
    key = hashlib.sha256(
        f"{_CACHE_FORMAT} {SPLIT_SEED} {kind.channels} {image_size} {source.digest}".encode()
    ).hexdigest()
    path = cache_folder() / "data" / f"{_stem(Path(name))}-{key[:16]}.safetensors"
    if path.exists():
        return _read_cache(path, name, kind)
    data = _assemble(name, kind, source.decode(image_size))
    with writing_cache():
        _write_cache(path, data, source.digest)
    return data


def from_datasets(
    train: Dataset[Any],
    test: Dataset[Any],
    *,
    name: str,
    val: Dataset[Any] | None = None,
    classes: Sequence[str] | None = None,
) -> Data:
    """Make a `Data` of your own images and labels, given as map-style torch data sets.

    Tensors are given as `TensorDataset(images, labels)`; of a `DataLoader`, its `dataset`. Every image is read once and
    kept in memory, so a random transform would be drawn once and for all: leave it out, and normalisation too. The rest
    is as for an image folder: without `val`, one tenth of the training images, drawn by class, are set aside, and
    training batches are mirrored and cut out of padded copies; `dataclasses.replace(data, flip=False, padding=0)` is
    the same data set without.

    Args:
        train: pairs (image, label). Images are all of one size: tensors [C, H, W] of uint8, or of floats in [0, 1],
            which are rounded to 256 levels; or PIL pictures of 8 bits a channel, grey ones of one channel and all
            others as RGB. Labels are integers from 0 to K - 1, K >= 2, of which each occurs.
        test: the same, where a label need not occur.
        name: what the data set is called.
        val: as `test`, or None.
        classes: the names of the K classes, in the order of the labels; None: those in `train.classes`, as data sets of
            torchvision have them, or else the numbers.

    Raises:
        ValueError: any of these is not so (it names the data set, and the index where it is one image's), or there are
            fewer than 2 training images per class and no `val`.
    """
    datasets = {"train": train, "test": test} | ({} if val is None else {"val": val})
    for split, dataset in datasets.items():
        check(split, dataset, _MAP_STYLE)
    check("name", name, Legal("a text that is not empty", lambda name: isinstance(name, str) and name))
    classes = getattr(train, "classes", None) if classes is None else classes
    check("classes", classes, optional(_CLASSES))
    splits = {split: _read(split, dataset) for split, dataset in datasets.items()}
    number = len(splits["train"].labels.unique()) if classes is None else len(classes)
    for split, part in splits.items():
        _check_split(split, part, splits["train"], number)
    names = tuple(classes or map(str, range(number)))
    return _assemble(name, _Kind(), _Decoded(names, splits, f"torch data set {type(train).__name__}"))


# --- Where the pixels come from ---------------------------------------------------------------------------------------


def _find(name: str, kind: _Kind) -> _Source:
    """Find the source of a data set, without reading it."""
    root = os.environ.get("PRUNELAB_DATA")
    folder = Path(root) if root else None
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"PRUNELAB_DATA names {folder}, which is not a folder")
    if folder is not None and (found := _image_source(folder, name)):
        return _images(found, kind.channels)
    if folder is not None and kind.dataset and (folder / kind.folder).is_dir():
        layout = folder / kind.folder
        return _Source(_digest_of(layout), lambda size: _torchvision(kind, folder, size, download=False))
    if kind.dataset:
        return _Source("torchvision", lambda size: _download(name, kind, size))
    if name in _KINDS:
        raise FileNotFoundError(f"{name} is not at hand: {_advice(name)}")
    path = Path(name)
    if _holds_images(path):
        return _images(path, kind.channels)
    raise ValueError(
        f"unknown data set {name!r}: choose one of {', '.join(NAMES)}, or name an image folder or archive "
        f"({', '.join(_ARCHIVES)}) by its path or by its name in the folder PRUNELAB_DATA"
    )


def _exists(name: str) -> bool:
    """Whether there is an image folder or archive of that path, or of that name in the folder `PRUNELAB_DATA`."""
    root, path = os.environ.get("PRUNELAB_DATA"), Path(name)
    known = root is not None and Path(root).is_dir() and _image_source(Path(root), name)
    return bool(known) or _holds_images(path)


def _holds_images(path: Path) -> bool:
    return path.is_dir() or (path.is_file() and path.name.endswith(_ARCHIVES))


def _image_source(folder: Path, name: str) -> Path | None:
    """Return the image folder or archive called `name`, or failing that `name_<size>`, inside `folder`."""
    entries = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() or entry.name.endswith(_ARCHIVES)]
    exact = [entry for entry in entries if name in (entry.name, _stem(entry))]
    found = exact or [entry for entry in entries if re.fullmatch(rf"{re.escape(name)}_\d+", _stem(entry))]
    if len(found) > 1:
        raise ValueError(
            f"{name} is ambiguous in {folder}: keep one of {', '.join(entry.name for entry in found)}, "
            f"or load it by its full name"
        )
    return found[0] if found else None


def _stem(path: Path) -> str:
    suffix = next((suffix for suffix in _ARCHIVES if path.name.endswith(suffix)), "")
    return path.name.removesuffix(suffix)


def _advice(name: str) -> str:
    accepted = f"{name}.tar.xz or a folder {name}/<split>/<class>/<picture>"
    if layout := _KINDS[name].folder:
        accepted += f", or torchvision's {layout}"
    return f"set PRUNELAB_DATA to a folder that holds it ({accepted})"


def _digest_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, or of a folder's listing (reading every picture would take too long)."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    listing = hashlib.sha256()
    for entry in sorted(path.rglob("*")):
        if entry.is_file():
            status = entry.stat()
            listing.update(f"{entry.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return listing.hexdigest()


def _digits(classes: range, image_size: int | None) -> _Decoded:
    digits = load_digits()
    wanted = np.isin(digits.target, classes)
    pixels = np.rint(digits.images[wanted] * (255 / 16)).astype(np.uint8)  # counts of 0 to 16
    labels = torch.from_numpy(digits.target[wanted]).long() - classes.start
    everything = Split(_resize(torch.from_numpy(pixels)[:, None], image_size), labels)
    rest, test = _set_aside(everything, 0.2)
    train, val = _set_aside(rest, 0.25)
    return _Decoded(tuple(map(str, classes)), {"train": train, "val": val, "test": test}, "scikit-learn")


def _download(name: str, kind: _Kind, image_size: int | None) -> _Decoded:
    folder = cache_folder() / "torchvision"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _torchvision(kind, folder, image_size, download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name} is not at hand and could not be downloaded ({error}): {_advice(name)}, or connect to the network"
        ) from error


def _torchvision(kind: _Kind, folder: Path, image_size: int | None, *, download: bool) -> _Decoded:
    dataset_class = getattr(torchvision.datasets, kind.dataset)
    if kind.dataset == "Flowers102":
        arguments: dict[str, dict[str, str | bool]] = {split: {"split": split} for split in _SPLITS}
    else:
        arguments = {"train": {"train": True}, "test": {"train": False}}
    try:
        datasets = {split: dataset_class(folder, download=download, **chosen) for split, chosen in arguments.items()}
    except RuntimeError as error:
        if download:
            raise
        raise ValueError(f"{folder / kind.folder} is damaged or incomplete: {error}") from error
    splits = {split: _tensors(dataset, image_size) for split, dataset in datasets.items()}
    return _Decoded(tuple(datasets["train"].classes), splits, "torchvision")


def _tensors(dataset: torchvision.datasets.VisionDataset, image_size: int | None) -> Split:
    if isinstance(dataset, torchvision.datasets.Flowers102):
        pairs = [(_fit(image, image_size), label) for image, label in tqdm(dataset, desc="decode", unit="image")]
        images, labels = zip(*pairs, strict=True)
        return Split(torch.stack(images), torch.tensor(labels))
    pixels = torch.as_tensor(dataset.data)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return Split(_resize(pixels, image_size), torch.as_tensor(dataset.targets))


# --- Data sets of torch -----------------------------------------------------------------------------------------------


_MAP_STYLE = Legal(
    "a map-style torch Dataset that is not empty, such as TensorDataset(images, labels)",
    lambda dataset: isinstance(dataset, Dataset) and not isinstance(dataset, IterableDataset) and len(dataset),  # type: ignore[arg-type]
)
_CLASSES = Legal(
    "a list of different names, at least two",
    lambda names: (
        isinstance(names, list | tuple)
        and all(isinstance(name, str) for name in names)
        and len(names) == len(set(names)) > 1
    ),
)
_PAIR = Legal("a pair (image, label)", lambda pair: isinstance(pair, list | tuple) and len(pair) == 2)
_LABEL = Legal("an integer >= 0, the number of a class", lambda label: operator.index(label) in range(2**31))
_MODES = {"1": "L", "L": "L", "LA": "L"} | dict.fromkeys(("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"), "RGB")


def _read(split: str, dataset: Any) -> Split:
    """Read every pair of a data set, and check it by itself."""
    images: list[Tensor] = []
    labels: list[int] = []
    for index in tqdm(range(len(dataset)), desc=f"read {split}", unit="image", leave=False, delay=2):
        pair = dataset[index]
        check(f"{split}[{index}]", pair, _PAIR)
        check(f"{split}[{index}]: label", pair[1], _LABEL)
        image = _to_uint8(f"{split}[{index}]: image", pair[0])
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"{split}[{index}]: image is {list(image.shape)}; it must be {list(images[0].shape)} as {split}[0] is"
            )
        images.append(image)
        labels.append(operator.index(pair[1]))
    return Split(torch.stack(images), torch.tensor(labels))


def _to_uint8(name: str, image: object) -> Tensor:
    """Return an image as `uint8 [C, H, W]` on the CPU."""
    if isinstance(image, Image.Image):
        if image.mode in _MODES:
            return _fit(image.convert(_MODES[image.mode]), None)
    elif isinstance(image, Tensor) and image.ndim == 3 and image.numel():
        if image.dtype == torch.uint8:
            return image.cpu()
        if image.is_floating_point() and image.min() >= 0 and image.max() <= 1:
            return (255 * image.float()).round().to("cpu", torch.uint8)
    raise ValueError(
        f"{name} is {_description(image)}; it must be a PIL picture of 8 bits a channel, or a tensor [C, H, W] of "
        "uint8 or of floats in [0, 1], which is not normalised yet"
    )


def _description(image: object) -> str:
    if isinstance(image, Image.Image):
        return f"a picture of mode {image.mode!r}"
    if not isinstance(image, Tensor):
        return f"of type {type(image).__name__}"
    kind = f"{image.dtype} {list(image.shape)}"
    if not image.is_floating_point() or not image.numel():
        return kind
    return f"{kind} from {image.min():g} to {image.max():g}"


def _check_split(split: str, part: Split, train: Split, number: int) -> None:
    """Check the size of a split's images against the training images', and its labels against the number of classes."""
    size, wanted = (list(each.images.shape[1:]) for each in (part, train))
    if size != wanted:
        raise ValueError(f"{split}: images are {size}; they must be {wanted} as those of train are")
    found = part.labels.unique()
    if found[-1] >= number or (part is train and not 1 < len(found) == number):
        raise ValueError(
            f"{split}: {len(found)} different labels from {found[0]} to {found[-1]}; they must be 0 to "
            f"{max(number, 2) - 1}, and each must occur in train"
        )


# --- Image folders and archives ---------------------------------------------------------------------------------------


def _images(path: Path, channels: int) -> _Source:
    return _Source(_digest_of(path), lambda size: _decode(path, channels, size))


def _decode(path: Path, channels: int, image_size: int | None) -> _Decoded:
    """Decode every picture of the splits `train`, `val` and `test`, in the order of their names."""
    images: dict[tuple[str, str, str], Tensor] = {}
    try:
        for name, content in tqdm(_pictures(path), desc=f"decode {path.name}", unit="image"):
            picture = _open(content, "/".join(name))
            if picture.mode not in _MODES:
                mode = f"{'/'.join(name)} has the mode {picture.mode!r}"
                raise ValueError(f"{path}: {mode}; pictures must have 8 bits a channel, as {', '.join(_MODES)} have")
            image = _fit(picture.convert("L" if channels == 1 else "RGB"), image_size)
            if image_size is None and images and image.shape != next(iter(images.values())).shape:
                image_size = UNEQUAL_SIZE
                image, images = _resize(image, image_size), {k: _resize(v, image_size) for k, v in images.items()}
            images[name] = image
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged ({error}): replace it by a whole copy") from error
    found = {split for split, _, _ in images}
    if "train" not in found or len(found) == 1:
        raise ValueError(
            f"{path} must hold pictures ({', '.join(_PICTURES)}) as <split>/<class>/<picture>, with splits train and "
            f"test (or val); it has pictures of {', '.join(sorted(found)) or 'no split'}"
        )
    classes = tuple(sorted({label for split, label, _ in images if split == "train"}))
    if strange := sorted({label for _, label, _ in images} - set(classes)):
        raise ValueError(f"{path} has classes without training images: {', '.join(strange)}")
    names = sorted(images)
    splits = {}
    for split in found:
        chosen = [name for name in names if name[0] == split]
        splits[split] = Split(
            torch.stack([images[name] for name in chosen]), torch.tensor([classes.index(name[1]) for name in chosen])
        )
    if "test" not in splits:
        splits["test"] = splits.pop("val")
    formats = sorted({_PICTURES[Path(name).suffix.lower()] for _, _, name in names})
    source = f"image {'folder' if path.is_dir() else 'archive'} {path.name} ({', '.join(formats)})"
    return _Decoded(classes, splits, source)


def _pictures(path: Path) -> Iterator[tuple[tuple[str, str, str], bytes]]:
    """Yield (split, class, file name) and content of every picture; nothing is ever extracted to disk."""
    members = _folder_members if path.is_dir() else _zip_members if path.suffix == ".zip" else _tar_members
    for member, read in members(path):
        parts = PurePosixPath(member.replace("\\", "/")).parts
        if ".." in parts or member.startswith(("/", "\\")):
            raise ValueError(f"{path} is refused: its member {member!r} points outside the archive")
        picture = parts[-1:] and Path(parts[-1]).suffix.lower() in _PICTURES and not parts[-1].startswith(".")
        if picture and len(parts) in (3, 4) and parts[-3] in _SPLITS:
            yield (parts[-3], parts[-2], parts[-1]), read()


_Members = Iterator[tuple[str, Callable[[], bytes]]]  # names, and how to read the contents


def _folder_members(path: Path) -> _Members:
    for file in sorted(path.rglob("*")):
        if file.is_file():
            yield file.relative_to(path).as_posix(), file.read_bytes


def _zip_members(path: Path) -> _Members:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield member.filename, partial(archive.read, member)


def _tar_members(path: Path) -> _Members:
    with path.open("rb") as file:
        if path.suffix == ".tar":  # a plain tar cut between two members reads like a whole one but for its end mark
            file.seek(max(0, path.stat().st_size - 1024))
            if file.read().strip(b"\0"):
                raise tarfile.ReadError("its end is missing")
            file.seek(0)
        with tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                if member.isreg() and (content := archive.extractfile(member)):
                    yield member.name, content.read


def _open(content: bytes, name: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:  # all of these are ways in which Pillow says "broken"
        raise OSError(f"its picture {name} cannot be decoded") from error
    return picture


def _fit(picture: Image.Image, image_size: int | None) -> Tensor:
    pixels = torch.from_numpy(np.array(picture))
    return _resize(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1), image_size)


def _resize(images: Tensor, image_size: int | None) -> Tensor:
    """Resize `[..., C, H, W]` so that the shorter side is `image_size`, and cut out the central square."""
    if image_size is None:
        return images
    return transforms.center_crop(transforms.resize(images, [image_size], antialias=True), [image_size, image_size])


# --- Splits, statistics and the cache ---------------------------------------------------------------------------------


def _assemble(name: str, kind: _Kind, decoded: _Decoded) -> Data:
    splits = dict(decoded.splits)
    if "val" not in splits:
        if (rarest := int(splits["train"].labels.bincount().min())) < 2:
            raise ValueError(f"{decoded.source} must hold at least 2 training images per class, not {rarest}")
        splits["train"], splits["val"] = _set_aside(splits["train"], 0.1)
    splits = {
        split: Split(part.images.contiguous(memory_format=torch.channels_last), part.labels.contiguous())
        for split, part in splits.items()
    }
    mean, std = _statistics(splits["train"].images)
    return _data(name, kind, decoded.classes, splits, mean, std, decoded.source)


def _data(
    name: str,
    kind: _Kind,
    classes: tuple[str, ...],
    splits: dict[str, Split],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    source: str,
) -> Data:
    digest = hashlib.sha256(json.dumps([classes, mean, std]).encode())
    for split in _SPLITS:
        for tensor in (splits[split].images.permute(0, 2, 3, 1), splits[split].labels):
            digest.update(f"{split} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().reshape(-1).data)
    padding = min(splits["train"].images.shape[2:]) // kind.crop
    return Data(
        name=name,
        classes=classes,
        **splits,
        mean=mean,
        std=std,
        padding=padding,
        flip=kind.flip,
        digest=digest.hexdigest(),
        source=source,
    )


def _set_aside(part: Split, fraction: float) -> tuple[Split, Split]:
    """Divide a split in two, class by class; the second gets `fraction` of the images. Both keep the images' order."""
    labels = part.labels.numpy()
    number = max(math.ceil(fraction * len(labels)), len(np.unique(labels)))  # at least one image per class
    rest, aside = train_test_split(np.arange(len(labels)), test_size=number, stratify=labels, random_state=SPLIT_SEED)
    rest, aside = np.sort(rest), np.sort(aside)
    return Split(part.images[rest], part.labels[rest]), Split(part.images[aside], part.labels[aside])


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel, in [0, 1] units, from exact integer sums."""
    levels = torch.arange(256)
    mean, std = [], []
    for channel in images.unbind(1):
        histogram = torch.bincount(channel.flatten(), minlength=256)
        number, total, squares = channel.numel(), int((histogram * levels).sum()), int((histogram * levels**2).sum())
        mean.append(total / number / 255)
        deviation = (squares * number - total**2) ** 0.5 / number
        std.append(max(deviation, 1) / 255)  # at least one grey level, so that a blank channel divides by something
    return tuple(mean), tuple(std)


def _write_cache(path: Path, data: Data, source_digest: str) -> None:
    tensors = {}
    for split in _SPLITS:
        part: Split = getattr(data, split)
        tensors[f"{split}_images"] = part.images.permute(0, 2, 3, 1).contiguous()
        tensors[f"{split}_labels"] = part.labels
    facts = {"classes": data.classes, "mean": data.mean, "std": data.std}
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    metadata |= {"source": data.source, "source_digest": source_digest, "digest": data.digest}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def _read_cache(path: Path, name: str, kind: _Kind) -> Data:
    mend = "delete it and it will be decoded again"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            splits = {
                split: Split(file.get_tensor(f"{split}_images").permute(0, 3, 1, 2), file.get_tensor(f"{split}_labels"))
                for split in _SPLITS
            }
        classes, mean, std = (tuple(json.loads(metadata[key])) for key in ("classes", "mean", "std"))
        data = _data(name, kind, classes, splits, mean, std, metadata["source"])
        intact = data.digest == metadata["digest"]
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the cached file {path} is damaged ({error}): {mend}") from error
    if not intact:
        raise ValueError(f"the cached file {path} is damaged (its digest does not match): {mend}")
    return data
