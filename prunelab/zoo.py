"""Trained networks of recorded rows, one file each: to load, time, fine-tune or prune further without any training.

The zoo has the dense networks that recorded experiments start from, and one pruned network per method: of the showdown,
seed 0, at a quarter of the convolution MACs. A file is written only if its network measures what its row says.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from prunelab import claims, deploy
from prunelab.experiments import Experiment, Row, Store, base_network, carry_out, loaded, one_thread
from prunelab.structure import ChannelSpace
from prunelab.training import evaluate

FOLDER = Path(__file__).resolve().parents[1] / "zoo"
MACS = 0.25


def entries() -> list[Experiment]:
    """Return the experiments whose networks the zoo is to hold; a dense one means the network before its tuning."""
    showdown = claims.load("12")
    dense = [e for (arm, _, _), e in showdown.experiments().items() if showdown.arms[arm].method == "dense"]
    first: dict[str, Experiment] = {}  # of the arms of each method
    for experiment in showdown.experiments(seeds=1, macs=[MACS]).values():
        first.setdefault(experiment.method, experiment)
    return dense + [experiment for method, experiment in first.items() if method != "dense"]


def path(experiment: Experiment, folder: str | os.PathLike[str] = FOLDER) -> Path:
    """Return where the network of an experiment is, or would be."""
    name = f"{experiment.dataset}-{experiment.model}-{experiment.method}-{experiment.seed}-{experiment.key}.safetensors"
    return Path(folder) / name.replace(os.sep, "_")


def load(experiment: Experiment, folder: str | os.PathLike[str] = FOLDER) -> nn.Module:
    """Return the network of an experiment, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError: the zoo does not have it.
        ValueError: its file is damaged.
    """
    return deploy.load(path(experiment, folder))


def recorded_accuracy(row: Row) -> float:
    """Return the test accuracy in percent that a row has for the network that the zoo keeps of it."""
    return float(row["test_cut" if row["method"] == "dense" else "test_tuned"])


def keep(experiment: Experiment, folder: str | os.PathLike[str] = FOLDER, store: Store | None = None) -> Path:
    """Run a recorded experiment again and write its network to the zoo.

    Raises:
        ValueError: there is no row of the experiment, or the network does not measure what the row says: on another
            machine, or with another version of PyTorch, it need not.
    """
    row = (store or Store()).rows().get(experiment.key)
    if row is None:
        raise ValueError(f"there is no row of {experiment}: run it first")
    images = loaded(experiment.dataset)
    if experiment.method == "dense":
        net = base_network(experiment)
        plan = ChannelSpace(net, images.example).plan({})
    else:
        _, pruned = carry_out(experiment)
        net, plan = pruned.net, pruned.plan
    with one_thread():
        measured = round(evaluate(net, images, "test"), 4)
    if measured != recorded_accuracy(row):
        raise ValueError(f"{experiment} measures {measured}%, its row has {recorded_accuracy(row)}%: it is not kept")
    target = path(experiment, folder)
    deploy.save(target, net.cpu(), plan, shape=images.shape, model=experiment.model, classes=len(images.classes))
    return target
