"""Training on folders in ImageNet's layout, in one process or many, with a checkpoint after every epoch.

Under torchrun, one process per GPU; for one process, `python -m` does. NET is a name for `models.build`, or a file that
`deploy.save` wrote:

    torchrun --nproc-per-node 8 -m prunelab.large NET FOLDER OUT --recipe resnet50

The batch size of a recipe is that of all processes together, and a step trains on the same pictures, augmented in the
same way, however many processes share it. So the loss curve does not depend on their number, but for the order of float
sums, dropout, which each process draws, and batch norm on CPUs, which sees its own process's pictures only: on GPUs
`SyncBatchNorm` sees them all.

Pruning hooks take no part: a checkpoint would have to hold what they remember. Cut a network first, then train it here.
"""

from __future__ import annotations

import atexit
import copy
import gc
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets import ImageFolder
from tqdm.auto import tqdm

from prunelab import deploy, models
from prunelab._checks import check, integer
from prunelab._files import read_tensors, write_atomically
from prunelab._modes import evaluating
from prunelab.imagenet import NOISE, RECIPES, derived_seed, open_split, training_batches, validation_batches
from prunelab.training import GPU_CHECK_STEPS, Recipe, deterministic, learning_rate, mixed_precision

CHECKPOINT, CURVE = "checkpoint.safetensors", "curve.jsonl"


@dataclass(frozen=True)
class Epoch:
    """A point of the curve: passes made, mean training loss, and accuracies on `val` in percent.

    `top5` counts the pictures whose class is among the 5 of highest output, or among all if there are fewer.
    """

    epoch: int
    loss: float
    top1: float
    top5: float


def train(
    net: nn.Module,
    folder: str | os.PathLike[str],
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    size: int = 224,
    workers: int = 4,
    progress: bool = True,
) -> tuple[Epoch, ...]:
    """Train `net` in place, going on from the checkpoint in `out` if there is one; return the curve.

    Call it in each process that torchrun starts, or in one alone. On a GPU the forward pass runs in bfloat16 where
    autocast allows it. One process on a CPU that is killed and started again gives, bit for bit, what it would have
    given undisturbed; a finished run is only read.

    Args:
        net: takes float32 [N, 3, size, size] and gives one output per class; left in evaluation mode.
        folder: holds train/<class>/<picture> and val/<class>/<picture>.
        recipe: `batch_size` is that of all processes together.
        out: one folder for all processes; gets `checkpoint.safetensors`, from which nothing is unpickled, and
            `curve.jsonl`, one JSON object per epoch.
        seed: decides order, augmentation and dropout; >= 0.
        size: pixels of a picture's side, >= 1.
        workers: processes that decode pictures, for each process that trains; 0 decodes in that one.
        progress: show a bar, in the first process.

    Raises:
        FileNotFoundError: a split is missing, or a class has no picture.
        ValueError: a setting is out of range, the splits differ in their classes, the processes cannot share the batch,
            the net does not fit the classes, a picture cannot be decoded, or the checkpoint is damaged or of another
            run; it is named.
        FloatingPointError: a loss is not finite.
    """
    pictures, val = open_split(folder, "train"), open_split(folder, "val")
    group = _group()
    _check(pictures, val, recipe, group, {"seed": (seed, 0), "size": (size, 1), "workers": (workers, 0)})
    if recipe.epochs == 0:
        return ()
    _place(net, pictures, group, size)
    optimizer, tensors = _prepare(net, recipe)
    steps_per_epoch = len(pictures) // recipe.batch_size
    steps = max(1, round(recipe.epochs * steps_per_epoch))
    rates = [learning_rate(recipe, (step + 0.5) / steps) for step in range(steps)]
    path = Path(out) / CHECKPOINT
    run = asdict(recipe) | {"seed": seed, "size": size, "classes": len(pictures.classes), "images": len(pictures)}
    curve = _restore(path, tensors, run)
    shared = {"size": size, "workers": workers, "rank": group.rank, "processes": group.size}
    done = min(len(curve) * steps_per_epoch, steps)
    hidden = not progress or group.rank > 0
    _join(group)
    with tqdm(total=steps, initial=done, desc="train", leave=False, disable=hidden) as bar:
        parallel = _parallel(net, group)
        for epoch in range(len(curve), math.ceil(steps / steps_per_epoch)):
            batches = training_batches(pictures, recipe.batch_size // group.size, seed=seed, epoch=epoch, **shared)
            of_epoch = rates[epoch * steps_per_epoch :][:steps_per_epoch]
            with deterministic(derived_seed(seed, NOISE, epoch, group.rank), group.device):
                loss = _pass(parallel.train(), optimizer, of_epoch, batches, group, bar)
            for buffer in net.buffers() if group.size > 1 else ():
                dist.broadcast(buffer, 0)  # batch norm's statistics, so that all measure what the checkpoint holds
            top1, top5 = _accuracy(net, val, validation_batches(val, recipe.batch_size, **shared), group)
            curve.append(Epoch(epoch + 1, loss, top1, top5))
            if group.rank == 0:
                _save(path, tensors, run, curve)
        if group.size > 1:
            dist.barrier()  # nobody returns before the last checkpoint is there
    if group.rank == 0:  # once more: a kill may have come between the two files
        _write_curve(path, curve)
    optimizer.zero_grad()
    net.eval()
    return tuple(curve)


def evaluate(
    net: nn.Module, folder: str | os.PathLike[str], *, size: int = 224, batch_size: int = 256, workers: int = 4
) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy on `val` in percent, as `train` measures them.

    Arguments and errors are those of `train`, but each process takes batches of `batch_size`.
    """
    val, group = open_split(folder, "val"), _group()
    _place(net, val, group, size)
    shared = {"size": size, "workers": workers, "rank": group.rank, "processes": group.size}
    _join(group)
    return _accuracy(net, val, validation_batches(val, batch_size, **shared), group)


# --- processes --------------------------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """This process among those that torchrun started."""

    rank: int
    size: int
    device: torch.device


def _group() -> _Group:
    rank, size, local = (
        int(os.environ.get(*name)) for name in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    return _Group(rank, size, torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu"))


def _join(group: _Group) -> None:
    """Let the processes talk to each other until they end: a group that was left cannot be joined again."""
    if group.size == 1 or dist.is_initialized():
        return
    if group.device.type == "cuda":
        torch.cuda.set_device(group.device)
    dist.init_process_group("nccl" if group.device.type == "cuda" else "gloo")
    atexit.register(_leave)


def _leave() -> None:
    """Leave the group, after whatever refers to it in a cycle: in PyTorch 2.7 its threads could outlive Python."""
    gc.collect()
    dist.destroy_process_group()


def _parallel(net: nn.Module, group: _Group) -> nn.Module:
    """Return a module that trains the net's own tensors in all processes at once."""
    if group.size == 1:
        return net
    if group.device.type == "cpu":
        return DistributedDataParallel(net)
    return DistributedDataParallel(_with_synchronised_batch_norm(net), device_ids=[group.device])


def _with_synchronised_batch_norm(net: nn.Module) -> nn.Module:
    """Return a copy that shares every tensor with the net, whose own batch norms stay ordinary ones."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net, shared))


def _summed(values: Tensor, group: _Group) -> Tensor:
    """Return sums over all processes."""
    if group.size > 1:
        dist.all_reduce(values)
    return values


# --- the loop ---------------------------------------------------------------------------------------------------------


def _check(
    pictures: ImageFolder, val: ImageFolder, recipe: Recipe, group: _Group, counts: dict[str, tuple[int, int]]
) -> None:
    """Raise ValueError for data or settings that cannot work; `counts` has values with the least that is legal."""
    for name, (value, least) in counts.items():
        check(name, value, integer(least))
    if odd := sorted({*pictures.classes} ^ {*val.classes}):
        raise ValueError(f"{pictures.root} and {val.root} must have the same classes; in one only: {', '.join(odd)}")
    batch = f"recipe: batch_size is {recipe.batch_size}"
    if recipe.batch_size > len(pictures):
        raise ValueError(f"{batch}; {pictures.root} has {len(pictures)} pictures")
    if recipe.batch_size % group.size:
        raise ValueError(f"{batch}; for {group.size} processes it must be a multiple of {group.size}")


def _place(net: nn.Module, split: ImageFolder, group: _Group, size: int) -> None:
    """Move the net to this process's device, once it is known to tell the classes apart."""
    net.to(group.device).to(memory_format=torch.channels_last)
    with evaluating(net), torch.inference_mode():
        outputs = net(torch.zeros(1, 3, size, size, device=group.device))
    if outputs.shape != (1, len(split.classes)):
        wanted = [1, len(split.classes)]
        raise ValueError(f"the net returns a tensor of shape {list(outputs.shape)}; {split.root} needs {wanted}")


def _logits(net: nn.Module, images: Tensor, group: _Group) -> Tensor:
    """Run the net, in mixed precision on a GPU."""
    with mixed_precision(group.device):
        return net(images.to(group.device, memory_format=torch.channels_last, non_blocking=True))


def _pass(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    rates: list[float],
    batches: Iterable[tuple[Tensor, Tensor]],
    group: _Group,
    bar: tqdm[Any],
) -> float:
    """Make one update for each learning rate; return the mean loss."""
    losses = torch.zeros(len(rates), device=group.device)
    for step, (rate, (images, labels)) in enumerate(zip(rates, batches, strict=False), start=1):
        for settings in optimizer.param_groups:
            settings["lr"] = rate
        loss = F.cross_entropy(_logits(net, images, group), labels.to(group.device))
        losses[step - 1] = loss.detach()
        if (step % GPU_CHECK_STEPS == 0 or step == len(rates)) and not losses.isfinite().all():
            raise FloatingPointError(f"a loss is not finite within {step} steps of an epoch; the rate is {rate:g}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()
    return float(_summed(losses.mean(), group) / group.size)


def _accuracy(
    net: nn.Module, split: ImageFolder, batches: Iterable[tuple[Tensor, Tensor]], group: _Group
) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy in percent of the split, of which `batches` is this process's part."""
    right = torch.zeros(2, dtype=torch.int64, device=group.device)
    with evaluating(net), torch.inference_mode():
        for images, labels in batches:
            best = _logits(net, images, group).topk(min(5, len(split.classes))).indices
            hits = best == labels.to(group.device)[:, None]
            right += torch.stack([hits[:, 0].sum(), hits.sum()])
    top1, top5 = _summed(right, group).tolist()
    return 100 * top1 / len(split), 100 * top5 / len(split)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _prepare(net: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, dict[str, Tensor]]:
    """Return the optimiser, and by name every tensor that training changes."""
    optimizer = recipe.optimizer(net)
    tensors = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        momentum = torch.zeros_like(parameter)  # from zeros, the first step is the one that PyTorch makes from nothing
        optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"] = momentum
    return optimizer, tensors


def _save(path: Path, tensors: dict[str, Tensor], run: dict[str, Any], curve: list[Epoch]) -> None:
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    header = {"run": run, "curve": [asdict(epoch) for epoch in curve]}
    write_atomically(path, to_bytes(copies, {"prunelab": json.dumps(header)}))
    _write_curve(path, curve)


def _write_curve(checkpoint: Path, curve: list[Epoch]) -> None:
    lines = [json.dumps(asdict(epoch)) + "\n" for epoch in curve]
    write_atomically(checkpoint.with_name(CURVE), "".join(lines).encode())


def _restore(path: Path, tensors: dict[str, Tensor], run: dict[str, Any]) -> list[Epoch]:
    """Fill the tensors from a checkpoint of the same run and return its curve, an empty one if there is no file."""
    if not path.exists():
        return []
    try:
        header, saved = read_tensors(path, "prunelab")
        of_run, curve = dict(header["run"]), [Epoch(**epoch) for epoch in header["curve"]]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged, or is no checkpoint of large.train ({type(error).__name__}: {error}): delete it to "
            "start anew"
        ) from None
    asked = json.loads(json.dumps(run))
    shapes = [{name: list(tensor.shape) for name, tensor in each.items()} for each in (saved, tensors)]
    for found, wanted in ((of_run, asked), shapes):
        for name in (name for name in {**wanted, **found} if found.get(name) != wanted.get(name)):
            raise ValueError(
                f"{path} is of another run: its {name} is {found.get(name, 'absent')}, this one's "
                f"{wanted.get(name, 'absent')}; choose another folder, or delete it to start anew"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
    return curve


# --- the command line -------------------------------------------------------------------------------------------------


def main(
    net: Annotated[str, typer.Argument(help="A network's name, or a file that deploy.save wrote.")],
    folder: Annotated[Path, typer.Argument(help="Holds train/<class>/<picture> and val/<class>/<picture>.")],
    out: Annotated[Path, typer.Argument(help="Gets checkpoint and curve; a run that is found there goes on.")],
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")],
    epochs: Annotated[float | None, typer.Option(help="Instead of the recipe's.", show_default=False)] = None,
    lr: Annotated[float | None, typer.Option(help="Instead of the recipe's.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Instead of the recipe's.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order, augmentation and dropout.")] = 0,
    size: Annotated[int, typer.Option(help="Pixels of a picture's side.")] = 224,
    workers: Annotated[int, typer.Option(help="That decode pictures, for each process.")] = 4,
) -> None:
    """Train a network on a folder of pictures, under torchrun in several processes."""
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}: there are {', '.join(RECIPES)}")
    given: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch_size": batch_size}
    settings = replace(RECIPES[recipe].recipe, **{name: value for name, value in given.items() if value is not None})
    if Path(net).is_file():
        network = deploy.load(net)
    else:
        classes = len(open_split(folder, "train").classes)
        network = models.build(net, classes=classes, shape=(3, size, size), seed=seed)
    curve = train(network, folder, settings, out, seed=seed, size=size, workers=workers)
    if curve and _group().rank == 0:
        last = curve[-1]
        print(f"{last.epoch} epochs: loss {last.loss:.4f}, top-1 {last.top1:.2f}%, top-5 {last.top5:.2f}%")


if __name__ == "__main__":
    from prunelab.__main__ import command

    typer.run(command(main))
