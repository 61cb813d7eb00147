"""Training on folders of pictures: digits written as PNG files, by one process and by two, killed and started again."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from prunelab import data, deploy, large
from prunelab.imagenet import MEAN, RECIPES, STD, open_split, training_batches, validation_batches
from prunelab.models import build
from prunelab.training import Recipe, learning_rate

CLASSES, SIZE, STEPS_PER_EPOCH = 6, 16, 3
RECIPE = Recipe(epochs=3, lr=0.02, schedule="step", batch_size=16, milestones=(0.4, 0.7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return six digits in ImageNet's layout: 50 training and 24 validation pictures, of unlike sizes."""
    root, digits = tmp_path_factory.mktemp("pictures"), data.load("digits").train
    places = {"train": count(), "val": count()}
    for image, label in zip(digits.images, digits.labels.tolist(), strict=True):
        for split, wanted in (("train", 9 if label < 2 else 8), ("val", 4)):
            of_class = root / split / f"digit{label}"
            if label < CLASSES and len(list(of_class.glob("*"))) < wanted:
                of_class.mkdir(parents=True, exist_ok=True)
                place = next(places[split])
                side = 18 + place % 5
                Image.fromarray(image[0].numpy()).resize((side, 40 - side)).save(of_class / f"{place}.png")
                break
    return root


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """Return a copy to spoil."""
    return shutil.copytree(folder, tmp_path / "pictures")


def small(seed: int = 0) -> nn.Sequential:
    """Return a network with everything that has a state: batch norm, dropout, momentum."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(8 * 49, CLASSES),
    )


def train(net: nn.Module, folder: Path, out: Path, recipe: Recipe = RECIPE, **settings) -> tuple[large.Epoch, ...]:
    return large.train(net, folder, recipe, out, size=SIZE, workers=0, progress=False, **settings)


def train_until_killed(folder: Path, out: Path) -> None:
    """Train, and die in the middle of the second epoch as a process dies that is killed from outside."""
    net, steps = small(), count(1)

    def kill(module: nn.Module, inputs: object) -> None:
        if module.training and next(steps) == STEPS_PER_EPOCH + 2:
            os.kill(os.getpid(), signal.SIGKILL)

    net.register_forward_pre_hook(kill)
    train(net, folder, out)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Pictures


@pytest.mark.parametrize("processes", [2, 4])
def test_the_parts_of_all_processes_are_the_pictures_of_one(folder: Path, processes: int) -> None:
    settings = {"seed": 3, "epoch": 1, "size": SIZE, "workers": 0}
    split = open_split(folder, "train")
    whole = list(training_batches(split, 16, **settings))
    assert len(whole) == STEPS_PER_EPOCH
    for rank in range(processes):
        part = list(training_batches(split, 16 // processes, rank=rank, processes=processes, **settings))
        assert len(part) == STEPS_PER_EPOCH
        for (images, labels), (all_images, all_labels) in zip(part, whole, strict=True):
            assert torch.equal(images, all_images[rank::processes])
            assert torch.equal(labels, all_labels[rank::processes])


def test_pictures_epochs_and_seeds_differ_in_their_augmentation(own_folder: Path) -> None:
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for path in own_folder.glob("train/*/*.png"):
        Image.fromarray(noise.numpy()).save(path)
    split = open_split(own_folder, "train")
    passes = [
        next(iter(training_batches(split, 48, seed=seed, epoch=epoch, size=SIZE, workers=0)))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(labels.tolist()) for _, labels in passes}) == 4  # orders
    assert len(torch.cat([images for images, _ in passes]).unique(dim=0)) == 4 * 48


def test_a_validation_picture_is_its_normalised_centre(own_folder: Path) -> None:
    picture = Image.new("RGB", (64, 32), "red")
    picture.paste("blue", (16, 0, 48, 32))  # the centre square
    picture.save(own_folder / "val" / "digit0" / "0.png")
    (images, labels), *_ = validation_batches(open_split(own_folder, "val"), 4, size=28, workers=0)
    blue = torch.tensor([(value - mean) / std for value, mean, std in zip((0, 0, 1), MEAN, STD, strict=True)])
    assert labels.tolist() == [0] * 4
    assert images.shape == (4, 3, 28, 28)
    inside = images[0, :, 2:-2, 2:-2]
    torch.testing.assert_close(inside, blue[:, None, None].expand_as(inside))


# Training


def test_a_run_is_plain_sgd_on_the_batches(folder: Path, tmp_path: Path) -> None:
    net, reference = small(), small()
    reference[3].p = net[3].p = 0.0
    curve = train(net, folder, tmp_path, seed=7)

    steps = 3 * STEPS_PER_EPOCH
    optimizer = torch.optim.SGD(reference.parameters(), lr=1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    losses = []
    reference.to(memory_format=torch.channels_last)
    for epoch in range(3):
        batches = training_batches(open_split(folder, "train"), 16, seed=7, epoch=epoch, size=SIZE, workers=0)
        for images, labels in batches:
            optimizer.param_groups[0]["lr"] = learning_rate(RECIPE, (len(losses) + 0.5) / steps)
            loss = F.cross_entropy(reference(images.to(memory_format=torch.channels_last)), labels)
            losses.append(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_equal(net.state_dict(), reference.state_dict())
    assert [point.loss for point in curve] == [float(mean) for mean in torch.stack(losses).view(3, -1).mean(1)]
    assert large.evaluate(net, folder, size=SIZE, batch_size=5, workers=0) == (curve[-1].top1, curve[-1].top5)
    assert not net.training


def test_a_run_may_end_within_an_epoch(folder: Path, tmp_path: Path) -> None:
    curve = train(small(), folder, tmp_path, replace(RECIPE, epochs=4 / 3))
    assert [point.epoch for point in curve] == [1, 2]
    assert load_file(tmp_path / large.CHECKPOINT)["net.1.num_batches_tracked"] == 4
    assert train(small(), folder, tmp_path / "none", replace(RECIPE, epochs=0)) == ()
    assert not (tmp_path / "none").exists()


def test_accuracies_are_those_of_the_five_highest_outputs(folder: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, CLASSES))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.copy_(torch.tensor([0, 2, 3, 4, 5, 1]))  # class 4 is always first, class 0 last
    assert large.evaluate(net, folder, size=SIZE, workers=0) == (100 / 6, 500 / 6)


def test_a_copy_with_synchronised_batch_norm_trains_the_nets_own_tensors() -> None:
    net = small()
    twin = large._with_synchronised_batch_norm(net)
    assert isinstance(twin[1], nn.SyncBatchNorm)
    assert type(net[1]) is nn.BatchNorm2d
    own, theirs = net.state_dict(keep_vars=True), twin.state_dict(keep_vars=True)
    assert own.keys() == theirs.keys()
    assert all(own[name] is theirs[name] for name in own)


PROCESSES = """
import sys
from pathlib import Path
from test_large import CLASSES, RECIPE, SIZE, large, plain

if __name__ == "__main__":
    for out in sys.argv[2:]:
        net = plain()
        curve = large.train(net, sys.argv[1], RECIPE, out, seed=5, size=SIZE, workers=1)
        accuracy = large.evaluate(net, sys.argv[1], size=SIZE, workers=0)
        assert accuracy == (curve[-1].top1, curve[-1].top5), (accuracy, curve)
"""


def plain() -> nn.Module:
    """Return a network without batch norm and dropout, which processes do not share."""
    return build("convnet", classes=CLASSES, shape=(3, SIZE, SIZE), seed=5)


def test_two_processes_draw_the_curve_of_one(folder: Path, tmp_path: Path) -> None:
    one, two, resumed, script = (tmp_path / name for name in ("one", "two", "resumed", "script.py"))
    curve = train(plain(), folder, one, seed=5)
    interrupted = plain()
    interrupted.register_forward_pre_hook(interrupt_after(STEPS_PER_EPOCH + 1))
    with pytest.raises(InterruptedError):  # two processes go on where one has stopped
        train(interrupted, folder, resumed, seed=5)

    script.write_text(PROCESSES)
    torchrun = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    done = subprocess.run(
        [*torchrun, str(script), str(folder), str(two), str(resumed)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    expected = load_file(one / large.CHECKPOINT)
    for out in (two, resumed):
        points = [large.Epoch(**json.loads(line)) for line in (out / large.CURVE).read_text().splitlines()]
        assert [asdict(point) for point in points] == [pytest.approx(asdict(point), rel=1e-5) for point in curve]
        tensors = load_file(out / large.CHECKPOINT)
        assert tensors.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(tensors[name], expected[name], rtol=1e-4, atol=1e-6)


def interrupt_after(steps: int):
    """Return a hook that lets so many training steps through."""
    places = count()

    def interrupt(module: nn.Module, inputs: object) -> None:
        if module.training and next(places) == steps:
            raise InterruptedError

    return interrupt


# Checkpoints


def test_a_killed_run_goes_on_as_if_nothing_had_happened(folder: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = multiprocessing.get_context("spawn").Process(target=train_until_killed, args=(folder, killed))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert len((killed / large.CURVE).read_text().splitlines()) == 1

    net, undisturbed = small(seed=9), small()  # other weights: those of the checkpoint replace them
    curve = train(undisturbed, folder, whole)
    assert train(net, folder, killed) == curve
    assert_equal(net.state_dict(), undisturbed.state_dict())
    assert_equal(load_file(killed / large.CHECKPOINT), load_file(whole / large.CHECKPOINT))
    assert (killed / large.CURVE).read_text() == (whole / large.CURVE).read_text()
    assert [path.name for path in killed.glob(".*")] == []


def test_a_finished_run_is_only_read(folder: Path, tmp_path: Path) -> None:
    net, other = small(), small(seed=9)
    curve = train(net, folder, tmp_path)
    written = (tmp_path / large.CHECKPOINT).stat().st_mtime_ns
    (tmp_path / large.CURVE).unlink()
    assert train(other, folder, tmp_path) == curve
    assert_equal(other.state_dict(), net.state_dict())
    assert (tmp_path / large.CHECKPOINT).stat().st_mtime_ns == written
    assert len((tmp_path / large.CURVE).read_text().splitlines()) == 3


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(small(), folder, out, replace(RECIPE, epochs=1))
    return out / large.CHECKPOINT


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        ({"lr": 0.1}, {}, "its lr is 0.02, this one's 0.1"),
        ({"milestones": (0.5,)}, {}, r"its milestones is \[0.4, 0.7\], this one's \[0.5\]"),
        ({}, {"seed": 1}, "its seed is 0, this one's 1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    folder: Path, checkpoint: Path, changes: dict[str, object], settings: dict[str, int], words: str
) -> None:
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=f"{checkpoint} is of another run: {words}"):
        train(small(), folder, checkpoint.parent, replace(RECIPE, epochs=1, **changes), **settings)
    assert checkpoint.read_bytes() == before


def test_a_checkpoint_of_another_network_or_folder_is_refused(own_folder: Path, checkpoint: Path) -> None:
    recipe, net = replace(RECIPE, epochs=1), small()
    wider = nn.Sequential(nn.Conv2d(3, 9, 3, stride=2), *small()[2:5], nn.Linear(9 * 49, CLASSES))
    with pytest.raises(ValueError, match=r"its net\.0\.weight is \[8, 3, 3, 3\], this one's \[9, 3, 3, 3\]"):
        train(wider, own_folder, checkpoint.parent, recipe)
    next((own_folder / "train" / "digit0").iterdir()).unlink()
    with pytest.raises(ValueError, match="its images is 50, this one's 49"):
        train(net, own_folder, checkpoint.parent, recipe)
    assert_equal(net.state_dict(), small().state_dict())


@pytest.mark.parametrize("spoil", [lambda whole: whole[:-100], lambda whole: b"", lambda whole: b"\x80\x04K\x01."])
def test_a_damaged_checkpoint_is_refused(folder: Path, checkpoint: Path, tmp_path: Path, spoil) -> None:
    damaged = tmp_path / large.CHECKPOINT
    damaged.write_bytes(spoil(checkpoint.read_bytes()))
    with pytest.raises(ValueError, match=f"{damaged} is damaged, or is no checkpoint of large.train"):
        train(small(), folder, tmp_path, replace(RECIPE, epochs=1))


# Bad input


def test_a_missing_split_is_named(own_folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(own_folder / "val")
    with pytest.raises(FileNotFoundError, match=r"has no folder val: ImageNet's layout is train/<class>/<picture>"):
        train(small(), own_folder, tmp_path / "out")


def test_classes_of_one_split_only_are_named(own_folder: Path, tmp_path: Path) -> None:
    (own_folder / "val" / "digit3").rename(own_folder / "val" / "three")
    with pytest.raises(ValueError, match="must have the same classes; in one only: digit3, three"):
        train(small(), own_folder, tmp_path / "out")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_picture_is_named(own_folder: Path, tmp_path: Path, split: str) -> None:
    broken = next((own_folder / split / "digit5").iterdir())
    broken.write_bytes(broken.read_bytes()[:-40])
    recipe = replace(RECIPE, batch_size=50)  # every picture is seen
    with pytest.raises(ValueError, match=f"the picture {broken} cannot be decoded"):
        train(small(), own_folder, tmp_path / "out", recipe)


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        ({"batch_size": 64}, {}, "batch_size is 64; .* has 50 pictures"),
        ({}, {"seed": -1}, "seed is -1; it must be an integer >= 0"),
        ({}, {"size": 0}, "size is 0; it must be an integer >= 1"),
    ],
)
def test_settings_out_of_range_are_named(
    folder: Path, tmp_path: Path, changes: dict[str, int], settings: dict[str, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        large.train(small(), folder, replace(RECIPE, **changes), tmp_path, **{"size": SIZE, **settings})


def test_a_batch_that_the_processes_cannot_share_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size is 16; for 3 processes it must be a multiple of 3"):
        train(small(), folder, tmp_path)


def test_a_net_for_other_classes_is_refused(folder: Path, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 10))
    with pytest.raises(ValueError, match=r"returns a tensor of shape \[1, 10\]; .*train needs \[1, 6\]"):
        train(net, folder, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="a loss is not finite"):
        train(small(), folder, tmp_path, replace(RECIPE, lr=1e30))
    assert not (tmp_path / large.CHECKPOINT).exists()


# The command line and the recipes


def test_the_command_line_trains_a_network_by_its_name_or_its_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_name, by_file, in_python, saved = (tmp_path / name for name in ("name", "file", "python", "net.safetensors"))
    recipe = replace(RECIPES["resnet50"].recipe, epochs=1, lr=0.02, batch_size=16)
    shape = (3, SIZE, SIZE)
    (last,) = train(plain(), folder, in_python, recipe, seed=5)
    deploy.save(saved, plain(), [], shape=shape, model="convnet", classes=CLASSES)
    for net, out in (("convnet", by_name), (str(saved), by_file)):
        settings = {"epochs": 1, "lr": 0.02, "batch_size": 16, "seed": 5, "size": SIZE, "workers": 0}
        large.main(net, folder, out, "resnet50", **settings)
        assert_equal(load_file(out / large.CHECKPOINT), load_file(in_python / large.CHECKPOINT))
    line = f"1 epochs: loss {last.loss:.4f}, top-1 {last.top1:.2f}%, top-5 {last.top5:.2f}%\n"
    assert capsys.readouterr().out == 2 * line
    with pytest.raises(ValueError, match="unknown recipe 'resnet': there are alexnet, vgg16, "):
        large.main("convnet", folder, by_name, "resnet")


def test_recipes_make_the_updates_of_their_sources() -> None:
    images = 1_281_167  # of ImageNet
    updates = {
        name: round(recipe.epochs * (images // recipe.batch_size)) for name, (recipe, _source) in RECIPES.items()
    }
    assert updates == {
        "alexnet": 220_000,
        "vgg16": 200_000,
        "vgg16-scratch": 90 * 5004,
        "resnet50": 90 * 5004,
        "mobilenet_v2": 250 * 625,
        "fine-tune": 20 * 5004,
    }
    falls = [round(milestone * updates["alexnet"]) for milestone in RECIPES["alexnet"].recipe.milestones]
    assert falls == [80_000, 160_000, 200_000]
    resnet = RECIPES["resnet50"].recipe
    rates = [learning_rate(resnet, (epoch + 0.5) / 90) for epoch in (29, 30, 59, 60)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])
