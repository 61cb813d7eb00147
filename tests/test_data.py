from __future__ import annotations

import dataclasses
import gzip
import itertools
import lzma
import os
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor, ToTensor, v2

from prunelab import cost, methods, models
from prunelab.data import NAMES, UNEQUAL_SIZE, Data, Split, from_datasets, load
from prunelab.structure import Budget
from prunelab.training import Context, Recipe, evaluate, fit, recalibrate


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a test a cache of its own and no data."""
    monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PRUNELAB_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Data]:
    """CIFAR-10 loaded twice: the second time certainly from the cache."""
    if not os.environ.get("PRUNELAB_DATA"):
        pytest.skip("PRUNELAB_DATA names no folder with CIFAR-10")
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("PRUNELAB_CACHE"):
            patch.setenv("PRUNELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load("cifar10"), load("cifar10")


def picture_folder(root: Path, name: str = "tiny", sizes: tuple[tuple[int, int], ...] = ((12, 10),)) -> Path:
    """Write noise as PNG, so that pixels survive: 2 classes, per class 6 training and 3 test images."""
    rng = np.random.default_rng(0)
    number = 0
    for split, count in (("train", 6), ("test", 3), ("train_dup_of_test", 2)):
        for label in ("ash", "birch"):
            folder = root / name / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                width, height = sizes[number % len(sizes)]
                number += 1
                Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (root / name / "README.md").write_text("not a picture")
    return root / name


def pack(folder: Path, suffix: str) -> Path:
    archive = folder.parent / "packed" / f"{folder.name}{suffix}"
    archive.parent.mkdir(exist_ok=True)
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(folder.rglob("*"), reverse=True):
                file.write(path, path.relative_to(folder.parent))
    else:
        with tarfile.open(archive, "w") as file:
            file.add(folder, folder.name)
        if suffix == ".tar.gz":
            archive.write_bytes(gzip.compress(archive.read_bytes()))
        elif suffix == ".tar.xz":
            archive.write_bytes(lzma.compress(archive.read_bytes()))
    return archive


def indexed(images: torch.Tensor, padding: int, flip: bool) -> Data:
    """Return a data set whose labels say which image is which."""
    split = Split(images, torch.arange(len(images)))
    channels = images.shape[1]
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]
    return Data("indexed", ("any",), split, split, split, mean, std, padding, flip, digest="", source="test")


def noise(number: int, channels: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (number, channels, height, width), generator=generator, dtype=torch.uint8)


# --- Splits -----------------------------------------------------------------------------------------------------------


def rows(split: Split) -> list[bytes]:
    return [image.numpy().tobytes() for image in split.images]


def test_digits_are_split_60_20_20_into_every_image_once() -> None:
    from sklearn.datasets import load_digits

    data = load("digits")
    assert data.shape == (1, 8, 8)
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [1077, 360, 360]
    everything = sorted(rows(data.train) + rows(data.val) + rows(data.test))
    pixels = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert everything == sorted(image.tobytes() for image in pixels)
    assert len(set(everything)) == 1797, "no two digits are the same, so the three splits are disjoint"


def test_splits_are_stratified() -> None:
    data = load("digits")
    whole = sum(part.labels.bincount() for part in (data.train, data.val, data.test))
    for part, share in ((data.train, 0.6), (data.val, 0.2), (data.test, 0.2)):
        assert (part.labels.bincount() - share * whole).abs().max() <= 1


def test_split_does_not_depend_on_global_seeds() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = load("digits")
    torch.manual_seed(2)
    np.random.seed(2)
    second = load("digits")
    assert first.digest == second.digest
    assert rows(first.val) == rows(second.val)


def test_digest_covers_image_size() -> None:
    resized = load("digits", image_size=16)
    assert resized.shape == (1, 16, 16)
    assert resized.digest != load("digits").digest
    assert resized.padding == 2


# --- Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 7, 7), (1, 8, 8), (3, 6, 9)])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("padding", [0, 2])
def test_training_batches_are_crops_and_mirrors(
    channels: int, height: int, width: int, flip: bool, padding: int
) -> None:
    """Every training image equals exactly one hand-made crop of its original, and every crop and mirror turns up."""
    data = indexed(noise(64, channels, height, width), padding, flip)
    mean, std = (np.array(values).reshape(-1, 1, 1) for values in (data.mean, data.std))
    seen: set[tuple[int, int, bool]] = set()
    generator = torch.Generator().manual_seed(3)
    for _ in range(12):
        for images, labels in data.batches("train", 16, generator):
            for image, label in zip(images.numpy(), labels.tolist(), strict=True):
                original = (data.train.images[label].numpy() / 255 - mean) / std
                matches = []
                for mirror in (False, True):
                    turned = original[:, :, ::-1] if mirror else original
                    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding))
                    padded[:, padding : padding + height, padding : padding + width] = turned
                    for top in range(2 * padding + 1):
                        for left in range(2 * padding + 1):
                            crop = padded[:, top : top + height, left : left + width]
                            if np.abs(crop - image).max() < 1e-5:
                                matches.append((top, left, mirror))
                assert len(matches) == 1
                seen.add(matches[0])
    assert len(seen) == (2 * padding + 1) ** 2 * (2 if flip else 1)


def test_crops_and_mirrors_are_uniform() -> None:
    """A lone bright pixel shows where each crop was cut; each of 9 places x 2 mirrors has its share (chi-squared)."""
    images = torch.zeros(18000, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 1] = 255
    data = indexed(images, padding=1, flip=True)
    ((batch, _),) = data.batches("train", 18000, torch.Generator().manual_seed(0))
    places = batch[:, 0].flatten(1).argmax(1)  # row 1..3; column 0..2, or 2..4 if mirrored: column 2 is shared
    counts = torch.bincount(places, minlength=25).view(5, 5)
    expected = torch.zeros(5, 5)
    expected[1:4] = torch.tensor([1000.0, 1000, 2000, 1000, 1000])
    assert counts[expected == 0].sum() == 0
    hit = expected > 0
    statistic = ((counts[hit] - expected[hit]) ** 2 / expected[hit]).sum()
    assert statistic < 36.1, "the 99.9th percentile of chi-squared with 14 degrees of freedom"


def test_training_pass_is_a_permutation_without_the_last_partial_batch() -> None:
    data = indexed(noise(50, 3, 4, 4), padding=1, flip=True)
    labels = [labels for _, labels in data.batches("train", 16, torch.Generator().manual_seed(0))]
    assert [len(batch) for batch in labels] == [16, 16, 16]
    drawn = torch.cat(labels)
    assert len(drawn.unique()) == 48
    assert not torch.equal(drawn, drawn.sort().values)


def test_batches_depend_on_the_generator_alone() -> None:
    data = load("digits")

    def one_pass(seed: int) -> torch.Tensor:
        torch.rand(seed)  # the global generator must not matter
        return torch.cat([images for images, _ in data.batches("train", 64, torch.Generator().manual_seed(seed))])

    assert torch.equal(one_pass(5), one_pass(5))
    assert not torch.equal(one_pass(5), one_pass(6))


def test_successive_passes_of_one_generator_differ() -> None:
    data, generator = load("digits"), torch.Generator().manual_seed(0)
    first, second = (next(data.batches("train", 64, generator))[1] for _ in range(2))
    assert not torch.equal(first, second)


def test_evaluation_batches_are_plain_complete_and_in_order() -> None:
    data = load("digits")
    batches = list(data.batches("val", 100))
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.val.labels)
    expected = (data.val.images.double() / 255 - data.mean[0]) / data.std[0]
    torch.testing.assert_close(torch.cat([images for images, _ in batches]).double(), expected, rtol=0, atol=1e-5)


def test_images_are_float32_channels_last_and_the_set_is_left_alone() -> None:
    images = noise(32, 3, 6, 6)
    data = indexed(images.clone(), padding=2, flip=True)
    for generator in (None, torch.Generator()):
        for batch, _ in data.batches("train", 8, generator):
            assert batch.dtype == torch.float32
            assert batch.is_contiguous(memory_format=torch.channels_last)
            batch.zero_()
    assert torch.equal(data.train.images, images)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalise_does_not_depend_on_memory_format(memory_format: torch.memory_format) -> None:
    images = noise(4, 3, 5, 7).contiguous(memory_format=memory_format)
    data = indexed(images, 0, False)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (data.mean, data.std))
    expected = (images.double() / 255 - mean) / std
    torch.testing.assert_close(data.normalise(images).double(), expected, rtol=0, atol=1e-5)


def test_normalised_training_split_has_mean_0_and_deviation_1() -> None:
    data = load("digits")
    normalised = data.normalise(data.train.images).double()
    assert abs(normalised.mean().item()) < 1e-5
    assert abs(normalised.std(correction=0).item() - 1) < 1e-5


def test_statistics_by_hand(cache: Path, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path)
    for path in (folder / "train").rglob("*.png"):  # red: half 0, half 200; green: all 51; blue: all 255
        pixels = np.empty((2, 2, 3), dtype=np.uint8)
        pixels[:] = (0, 51, 255)
        pixels[0, :, 0] = 200
        Image.fromarray(pixels).save(path)
    for path in (folder / "test").rglob("*.png"):
        Image.new("RGB", (2, 2)).save(path)
    data = load(str(folder))
    assert data.mean == pytest.approx((100 / 255, 0.2, 1.0), abs=1e-12)
    assert data.std == pytest.approx((100 / 255, 1 / 255, 1 / 255), abs=1e-12), "a blank channel divides by one level"


def test_data_moves_between_devices() -> None:
    data = load("digits")
    moved = data.to("meta")
    assert (moved.device.type, data.device.type) == ("meta", "cpu")
    assert {tensor.device.type for part in (moved.train, moved.val, moved.test) for tensor in part} == {"meta"}
    assert moved.example.device.type == "meta"
    assert data.example.shape == (1, 1, 8, 8)


def test_batches_on_a_gpu_are_those_on_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    data = indexed(noise(64, 3, 8, 8), padding=2, flip=True)
    for here, there in zip(
        data.batches("train", 16, torch.Generator().manual_seed(0)),
        data.to("cuda").batches("train", 16, torch.Generator().manual_seed(0)),
        strict=True,
    ):
        torch.testing.assert_close(here[0], there[0].cpu(), rtol=0, atol=1e-6)
        assert torch.equal(here[1], there[1].cpu())


# --- Image folders, archives and the cache ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_archives_equal_their_folder(cache: Path, tmp_path: Path, suffix: str) -> None:
    folder = picture_folder(tmp_path)
    from_folder, from_archive = load(str(folder)), load(str(pack(folder, suffix)))
    assert from_folder.digest == from_archive.digest
    assert from_folder.classes == ("ash", "birch")
    assert from_folder.shape == (3, 10, 12)
    assert [len(part.labels) for part in (from_folder.train, from_folder.val, from_folder.test)] == [10, 2, 6]
    assert from_archive.source == f"image archive tiny{suffix} (PNG)"
    assert from_folder.source == "image folder tiny (PNG)"


def test_pixels_and_labels_are_those_of_the_files(cache: Path, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path)
    data = load(str(folder))
    expected = [
        (np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes(), label)
        for label, name in enumerate(("ash", "birch"))
        for path in sorted((folder / "test" / name).iterdir())
    ]
    assert list(zip(rows(data.test), data.test.labels.tolist(), strict=True)) == expected


def test_no_training_image_is_in_validation_or_comes_from_another_folder(cache: Path, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path)
    data = load(str(folder))
    files = {np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in (folder / "train").rglob("*.png")}
    assert set(rows(data.train)) | set(rows(data.val)) == files
    assert not set(rows(data.train)) & set(rows(data.val))


def test_a_val_folder_is_the_test_split_or_the_validation_split(cache: Path, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path)
    digest = load(str(folder)).digest
    (folder / "test").rename(folder / "val")
    assert load(str(folder)).digest == digest
    shutil.copytree(folder / "val", folder / "test")
    data = load(str(folder))
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [12, 6, 6]


def test_second_load_equals_the_first_and_leaves_one_file(cache: Path, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path)
    first, second = load(str(folder)), load(str(folder))
    assert first.digest == second.digest
    for ours, theirs in zip((first.train, first.val, first.test), (second.train, second.val, second.test), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
    assert (first.mean, first.std, first.classes, first.source) == (
        second.mean,
        second.std,
        second.classes,
        second.source,
    )
    assert [path.suffix for path in (cache / "data").iterdir()] == [".safetensors"]


def test_a_changed_source_is_decoded_again(cache: Path, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path)
    first = load(str(folder))
    Image.new("RGB", (12, 10), "red").save(folder / "test" / "ash" / "0.png")
    assert load(str(folder)).digest != first.digest


@pytest.mark.parametrize("sizes", [((12, 10), (30, 20)), ((200, 100), (70, 90))])
def test_unequal_sizes_are_brought_to_one(cache: Path, tmp_path: Path, sizes: tuple[tuple[int, int], ...]) -> None:
    folder = picture_folder(tmp_path, sizes=sizes)
    assert load(str(folder)).shape == (3, UNEQUAL_SIZE, UNEQUAL_SIZE)
    assert load(str(folder)).digest == load(str(folder), image_size=UNEQUAL_SIZE).digest
    assert load(str(folder), image_size=16).shape == (3, 16, 16)


def test_resizing_takes_the_shorter_side_and_the_centre(cache: Path, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path)
    for path in folder.rglob("*.png"):  # 40 x 20: left and right quarter white, the middle square black
        picture = Image.new("RGB", (40, 20), "white")
        picture.paste("black", (10, 0, 30, 20))
        picture.save(path)
    images = load(str(folder), image_size=10).test.images
    assert images.shape == (6, 3, 10, 10)
    assert images[..., 1:-1].max() == 0, "only the outermost columns may blend with the white"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no metadata", "empty"])
def test_damaged_cache_is_named(cache: Path, tmp_path: Path, damage: str) -> None:
    folder = picture_folder(tmp_path)
    digest = load(str(folder)).digest
    (path,) = (cache / "data").iterdir()
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        content[-100] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(safetensors.torch.save(safetensors.torch.load(bytes(content))))
    with pytest.raises(ValueError, match=rf"cached file .*{path.name} is damaged .*delete it"):
        load(str(folder))
    path.unlink()
    assert load(str(folder)).digest == digest


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".zip"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
def test_truncated_archive_is_named_and_nothing_is_cached(
    cache: Path, tmp_path: Path, suffix: str, kept: float
) -> None:
    archive = pack(picture_folder(tmp_path, sizes=((60, 60),)), suffix)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"tiny\{suffix} is damaged"):
        load(str(archive))
    assert not (cache / "data").exists()


def test_plain_tar_cut_between_two_members_is_damaged(cache: Path, tmp_path: Path) -> None:
    archive = pack(picture_folder(tmp_path), ".tar")
    with tarfile.open(archive) as file:
        last = file.getmembers()[-1]
    archive.write_bytes(archive.read_bytes()[: last.offset])
    with pytest.raises(ValueError, match=r"tiny\.tar is damaged"):
        load(str(archive))


@pytest.mark.parametrize("content", [b"", b"no picture", "half"])
def test_broken_picture_is_named(cache: Path, tmp_path: Path, content: bytes | str) -> None:
    folder = picture_folder(tmp_path, sizes=((60, 60),))
    broken = folder / "test" / "birch" / "1.png"
    whole = broken.read_bytes()
    broken.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"tiny is damaged \(its picture test/birch/1\.png cannot be decoded\)"):
        load(str(folder))


@pytest.mark.parametrize("member", ["tiny/train/../../evil.png", "/train/ash/evil.png"])
@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_climbing_member_is_refused_by_name(cache: Path, tmp_path: Path, member: str, suffix: str) -> None:
    folder = picture_folder(tmp_path)
    archive = pack(folder, suffix)
    picture = folder / "train" / "ash" / "0.png"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "a") as file:
            file.write(picture, "placeholder")
            file.infolist()[-1].filename = member  # write() would make the name harmless
    else:
        with tarfile.open(archive, "a") as file:
            header = file.gettarinfo(picture)
            header.name = member
            with picture.open("rb") as content:
                file.addfile(header, content)
    with pytest.raises(ValueError, match=r"evil\.png' points outside"):
        load(str(archive))


def test_links_in_archives_are_ignored(cache: Path, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path)
    digest = load(str(folder)).digest
    archive = pack(folder, ".tar")
    with tarfile.open(archive, "a") as file:
        link = tarfile.TarInfo("tiny/train/ash/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    assert load(str(archive)).digest == digest


def test_layout_errors_name_the_folder(cache: Path, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path)
    (folder / "train" / "ash").rename(folder / "train" / "oak")
    with pytest.raises(ValueError, match="tiny has classes without training images: ash"):
        load(str(folder))
    shutil.rmtree(folder / "test")
    with pytest.raises(ValueError, match=r"tiny must hold pictures .* as <split>/<class>/<picture>, .* of train$"):
        load(str(folder))


# --- Data sets of torch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [None, PILToTensor(), ToTensor(), v2.PILToTensor()], ids=repr)
def test_a_torch_data_set_is_what_its_folder_is(cache: Path, tmp_path: Path, transform: Any) -> None:
    """As pictures, as uint8 and as floats: the same names, statistics and splits, so the same batches."""
    folder = picture_folder(tmp_path)
    train, test = (ImageFolder(folder / split, transform) for split in ("train", "test"))
    ours, theirs = from_datasets(train, test, name="tiny", classes=train.classes), load(str(folder))
    assert ours.digest == theirs.digest
    assert (ours.name, ours.source) == ("tiny", "torch data set ImageFolder")
    assert ours.train.images.is_contiguous(memory_format=torch.channels_last)
    for split in ("train", "val", "test"):
        for own, known in zip(ours.batches(split, 2), theirs.batches(split, 2), strict=True):
            assert torch.equal(own[0], known[0])
            assert torch.equal(own[1], known[1])
    first, second = (next(data.batches("train", 8, torch.Generator().manual_seed(0)))[0] for data in (ours, theirs))
    assert torch.equal(first, second), "augmented alike"


def test_a_validation_set_is_taken_as_it_is() -> None:
    images, labels = noise(9, 3, 4, 4), torch.arange(9) % 3
    parts = [TensorDataset(images[i : i + 3], labels[i : i + 3]) for i in (0, 3, 6)]
    data = from_datasets(parts[0], parts[1], val=parts[2], name="mine")
    for part, start in ((data.train, 0), (data.test, 3), (data.val, 6)):
        assert torch.equal(part.images, images[start : start + 3])
        assert torch.equal(part.labels, labels[start : start + 3])
    assert data.classes == ("0", "1", "2")


def test_all_256_levels_survive_as_floats() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(2, 1, 16, 8)
    for kind in (torch.float16, torch.float32, torch.float64):
        part = TensorDataset(levels.to(kind) / 255, torch.tensor([0, 1]))
        assert torch.equal(from_datasets(part, part, val=part, name="levels").train.images, levels)


def test_the_images_are_copies() -> None:
    images = noise(4, 1, 4, 4)
    part = TensorDataset(images, torch.tensor([0, 1, 0, 1]))
    data = from_datasets(part, part, name="mine")
    before = data.test.images.clone()
    images.zero_()
    assert torch.equal(data.test.images, before)


def test_transparent_and_grey_pictures_have_three_channels_and_one() -> None:
    class Pictures(Dataset[Any]):
        def __init__(self, mode: str) -> None:
            self.mode = mode

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new(self.mode, (5, 6)), index % 2

    for mode, channels in (("RGBA", 3), ("P", 3), ("RGB", 3), ("LA", 1), ("L", 1), ("1", 1)):
        assert from_datasets(Pictures(mode), Pictures(mode), name="mine").shape == (channels, 6, 5)
    for mode in ("I;16", "I", "F"):  # what does not fit into 8 bits is not cut off in silence
        with pytest.raises(ValueError, match=rf"train\[0\]: image is a picture of mode '{mode}'; .* 8 bits a channel"):
            from_datasets(Pictures(mode), Pictures(mode), name="mine")


def test_pictures_of_16_bits_are_refused_and_not_cut_off(tmp_path: Path) -> None:
    for split, label in itertools.product(("train", "test"), "ab"):
        folder = tmp_path / "deep" / split / label
        folder.mkdir(parents=True)
        Image.fromarray(np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)).save(folder / "ramp.png")
    with pytest.raises(ValueError, match=r"deep: t\w+/./ramp\.png has the mode 'I;16'; pictures must have 8 bits"):
        load(str(tmp_path / "deep"))


def test_own_tensors_are_trained_on_and_pruned() -> None:
    """From tensors to a cut network within its budget that has learned: digits, as if they were a user's own."""
    whole = load("digits")
    train, val, test = (TensorDataset(*part) for part in (whole.train, whole.val, whole.test))
    made = from_datasets(train, test, val=val, name="own digits", classes=whole.classes)
    assert made.digest == whole.digest
    own = dataclasses.replace(made, flip=False)
    assert (made.flip, own.padding) == (True, whole.padding)
    net, recipe = models.build("convnet-bn", shape=own.shape, width=0.5, seed=0), Recipe(3, lr=0.05, batch_size=32)
    fit(net, own, recipe, seed=0, progress=False)
    pruned = methods.build("l1")(net, Budget(0.5), Context(own, recipe, seed=0, progress=False))
    assert cost.macs(pruned.net, own.example) <= 0.5 * cost.macs(net, own.example)
    recalibrate(pruned.net, own)
    fit(pruned.net, own, recipe, seed=0, progress=False)
    assert evaluate(pruned.net, own, "test") > 80, "chance is 10"


GOOD = noise(4, 3, 6, 6), torch.tensor([0, 1, 0, 1])
BAD_LABELS = "they must be 0 to 1, and each must occur in train"


def pairs(images: Any, labels: Any = GOOD[1]) -> Dataset[Any]:
    """Return the pairs as a data set: a part of a list, as images may be of any kind."""
    return Subset(list(zip(images, labels, strict=True)), range(len(labels)))  # type: ignore[arg-type]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(*GOOD, strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": GOOD}, "(?s)train is .*; it must be a map-style torch Dataset that is not empty, such as"),
        ({"train": DataLoader(TensorDataset(*GOOD))}, "train is <.*DataLoader.*; it must be a map-style torch Dataset"),
        ({"test": Stream()}, "test is <.*Stream.*; it must be a map-style"),
        ({"val": TensorDataset(GOOD[0][:0])}, "val is <.*TensorDataset.*; it must be a map-style.* not empty"),
        ({"name": ""}, "name is ''; it must be a text that is not empty"),
        ({"classes": ["a", "a"]}, r"classes is \['a', 'a'\]; it must be a list of different names, at least two"),
        ({"train": TensorDataset(GOOD[0])}, r"(?s)train\[0\] is \(.*; it must be a pair \(image, label\)"),
        ({"train": pairs(GOOD[0], GOOD[1] + 0.5)}, r"train\[0\]: label is tensor\(0.5.*; it must be an integer >= 0"),
        ({"test": pairs(GOOD[0], GOOD[1] - 1)}, r"test\[0\]: label is tensor\(-1\); it must be an integer >= 0"),
        ({"test": pairs(GOOD[0], torch.eye(4).long())}, r"test\[0\]: label is tensor\(\[1, 0, 0, 0\]\)"),
        (
            {"train": pairs([*GOOD[0][:3], GOOD[0][0, :, 1:]])},
            r"train\[3\]: image is \[3, 5, 6\]; it must be \[3, 6, 6\] as train\[0\] is",
        ),
        (
            {"test": pairs(GOOD[0][:, :1])},
            r"test: images are \[1, 6, 6\]; they must be \[3, 6, 6\] as those of train are",
        ),
        ({"train": pairs(GOOD[0].float())}, r"train\[0\]: image is torch.float32 \[3, 6, 6\] from \d+ to \d+; "),
        ({"train": pairs(GOOD[0] / 255 - 0.5)}, r"train\[0\]: image is .* from -0\.\d+ to .* not normalised yet"),
        ({"val": pairs(GOOD[0] * torch.nan)}, r"val\[0\]: image is torch.float32 \[3, 6, 6\] from nan to nan"),
        ({"train": pairs(GOOD[0].int())}, r"train\[0\]: image is torch.int32 \[3, 6, 6\]; it must be"),
        ({"train": pairs(GOOD[0][:, 0])}, r"train\[0\]: image is torch.uint8 \[6, 6\]; it must be"),
        ({"train": pairs(GOOD[0][:, :, :0])}, r"train\[0\]: image is torch.uint8 \[3, 0, 6\]; it must be"),
        ({"train": pairs(GOOD[0].numpy())}, r"train\[0\]: image is of type ndarray; it must be a PIL picture"),
        ({"train": pairs(GOOD[0], GOOD[1] + 1)}, f"train: 2 different labels from 1 to 2; {BAD_LABELS}"),
        ({"test": pairs(GOOD[0], GOOD[1] + 1)}, f"test: 2 different labels from 1 to 2; {BAD_LABELS}"),
        ({"classes": ["a", "b", "c"]}, "train: 2 different labels from 0 to 1; they must be 0 to 2, and each must"),
        ({"classes": ["a"]}, r"classes is \['a'\]; it must be a list of different names, at least two, or None"),
        ({"train": pairs(GOOD[0], 0 * GOOD[1])}, f"train: 1 different labels from 0 to 0; {BAD_LABELS}"),
        ({"train": pairs(GOOD[0], 10**12 + GOOD[1])}, r"train\[0\]: label is .*; it must be an integer >= 0"),
        (
            {"train": pairs(GOOD[0], torch.tensor([0, 1, 1, 1]))},
            "torch data set Subset must hold at least 2 training images per class, not 1",
        ),
    ],
)  # fmt: skip
def test_a_data_set_that_is_none_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    good = {"train": TensorDataset(*GOOD), "test": TensorDataset(*GOOD), "name": "mine"}
    with pytest.raises(ValueError, match=message):
        from_datasets(**{**good, **change})


# --- Finding data sets ------------------------------------------------------------------------------------------------


def test_names_are_looked_up_in_the_data_folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = pack(picture_folder(tmp_path, "flowers17_10"), ".tar.xz")
    monkeypatch.setenv("PRUNELAB_DATA", str(archive.parent))
    data = load("flowers17")
    assert data.name == "flowers17"
    assert data.source == "image archive flowers17_10.tar.xz (PNG)"
    assert load("flowers17_10").digest == load("flowers17_10.tar.xz").digest == data.digest
    shutil.copy(archive, archive.parent / "flowers17_11.tar.xz")
    with pytest.raises(ValueError, match=r"ambiguous.*flowers17_10\.tar\.xz, flowers17_11\.tar\.xz"):
        load("flowers17")


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array in MNIST's own format, gzipped copy included, as a download would leave it."""
    content = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(content)
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(content)


def test_torchvision_layout_in_the_data_folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = {split: rng.integers(0, 256, (count, 28, 28), np.uint8) for split, count in (("train", 200), ("t10k", 30))}
    for split, images in pixels.items():
        write_idx(raw / f"{split}-images-idx3-ubyte", images)
        write_idx(raw / f"{split}-labels-idx1-ubyte", (np.arange(len(images)) % 10).astype(np.uint8))
    monkeypatch.setenv("PRUNELAB_DATA", str(tmp_path))
    data = load("mnist")
    assert (data.shape, data.padding, data.flip, data.source) == ((1, 28, 28), 2, False, "torchvision")
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [180, 20, 30]
    assert data.val.labels.bincount().tolist() == [2] * 10
    np.testing.assert_array_equal(data.test.images[:, 0].numpy(), pixels["t10k"])
    assert load("mnist", image_size=32).shape == (1, 32, 32)
    for path in raw.glob("t10k-images*"):
        path.unlink()
    with pytest.raises(ValueError, match="raw is damaged or incomplete"):
        load("mnist")


def test_no_data_and_no_network_is_one_clear_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", unreachable)
    with pytest.raises(FileNotFoundError, match=r"cifar10 is not at hand.*no route.*set PRUNELAB_DATA.*or connect"):
        load("cifar10")
    assert not (cache / "data").exists()


def test_flowers17_without_data_says_where_to_put_it(cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"flowers17 is not at hand: set PRUNELAB_DATA.*flowers17\.tar\.xz"):
        load("flowers17")


def test_data_folder_that_is_none_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELAB_DATA", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"PRUNELAB_DATA names .*absent"):
        load("cifar10")


def test_unknown_name_lists_the_legal_ones(cache: Path) -> None:
    with pytest.raises(ValueError, match="'cifar11'") as error:
        load("cifar11")
    assert all(name in str(error.value) for name in NAMES)


@pytest.mark.parametrize("size", [0, -3])
def test_image_size_below_1_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size is {size}; it must be an integer >= 1"):
        load("digits", image_size=size)


def test_bad_arguments_of_batches_are_refused_before_iteration() -> None:
    data = load("digits")
    with pytest.raises(ValueError, match="split is 'validation'; it must be one of 'train', 'val', 'test'"):
        data.batches("validation", 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size is 0; it must be an integer >= 1"):
        data.batches("train", 0)
    with pytest.raises(ValueError, match="batch_size must be at most 1077"):
        data.batches("train", 1078, torch.Generator())
    assert len(next(data.batches("val", 1024))[1]) == 360, "evaluation takes what there is"


@pytest.mark.parametrize("images", [torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_normalise_refuses_other_tensors(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="images must be uint8"):
        load("digits").normalise(images)


# --- The real thing ---------------------------------------------------------------------------------------------------


def test_cifar10_has_its_published_sizes_and_classes(cifar10: tuple[Data, Data]) -> None:
    data, _ = cifar10
    assert data.shape == (3, 32, 32)
    assert " ".join(data.classes) == "airplane automobile bird cat deer dog frog horse ship truck"
    for part, per_class in ((data.train, 4500), (data.val, 500), (data.test, 1000)):
        assert part.images.shape == (10 * per_class, 3, 32, 32)
        assert part.labels.bincount().tolist() == [per_class] * 10
    assert (data.padding, data.flip) == (4, True)


def test_cifar10_has_its_published_statistics(cifar10: tuple[Data, Data]) -> None:
    """The figures everyone uses, from the 50,000 original images; ours are 45,000 of them, perhaps as JPEG."""
    data, _ = cifar10
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-3)
    assert data.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=4e-3)


def test_cifar10_is_the_same_from_the_cache(cifar10: tuple[Data, Data]) -> None:
    first, second = cifar10
    assert first.digest == second.digest
    assert torch.equal(first.val.images, second.val.images)


def test_digits_in_two_halves() -> None:
    whole, low, high = load("digits"), load("digits-0-4"), load("digits-5-9")
    assert low.classes + high.classes == whole.classes
    sizes = [sum(len(part.labels) for part in (images.train, images.val, images.test)) for images in (low, high)]
    assert sizes == [901, 896]  # counts 178, 182, 177, 183, 181 and 182, 181, 179, 174, 180
    assert high.test.labels.unique().tolist() == [0, 1, 2, 3, 4]
