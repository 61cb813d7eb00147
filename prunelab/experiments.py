"""An experiment is a frozen description; running it gives one row; a row that is in the store is not computed again.

The path is the same for every method: a dense network trained by the recipe and the seed, pruned to the budget,
fine-tuned with what the method has left of the common effort, evaluated. On a CPU every experiment runs on one thread
of its own, so a row does not depend on how many run side by side.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import joblib
import pandas as pd
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from tqdm.auto import tqdm

import prunelab
from prunelab import cost, data, methods, models
from prunelab._checks import Legal, check, check_fields, instance, integer, one_of, optional
from prunelab._files import cache_folder, write_atomically, writing_cache
from prunelab.structure import Budget
from prunelab.structure.space import Scope
from prunelab.training import Context, Recipe, evaluate, fit, recalibrate

Row = dict[str, Any]
T = TypeVar("T")

SPLITS: tuple[Literal["val", "test"], ...] = "val", "test"
RECORDED = Path(__file__).resolve().parents[1] / "results"  # the rows that come with the repository
RECALIBRATION = 20, 256  # at most so many batches, of so many training images


@dataclass(frozen=True)
class Effort:
    """How the dense network is trained, and what every arm may spend after it.

    `pretraining` names the effort of the network that a transferred one comes from; "" is this effort itself.
    """

    dense: Recipe
    after: Recipe
    pretraining: str = ""

    def __str__(self) -> str:
        """Return how long it is."""
        return f"{self.dense.epochs:g} epochs for the dense network, {self.after.epochs:g} after it"


EFFORTS: dict[str, Effort] = {
    # seconds, for the embedded digits
    "smoke": Effort(Recipe(epochs=6, lr=0.05, batch_size=32), Recipe(epochs=3, lr=0.03, batch_size=32)),
    # what two CPU cores record in an hour or two
    "brief": Effort(Recipe(epochs=6, lr=0.1), Recipe(epochs=2, lr=0.03)),
    # for a thousand images, with a network that comes from a larger data set
    "transfer": Effort(
        Recipe(epochs=30, lr=0.05, batch_size=32), Recipe(epochs=12, lr=0.02, batch_size=32), pretraining="brief"
    ),
    # what two CPU cores record in a night
    "short": Effort(Recipe(epochs=12, lr=0.1), Recipe(epochs=8, lr=0.05)),
    # the schedule of Li et al. and Rethinking: for a GPU
    "full": Effort(
        Recipe(epochs=160, lr=0.1, schedule="step", batch_size=64, nesterov=False, weight_decay=1e-4),
        Recipe(epochs=40, lr=0.01, batch_size=64, nesterov=False, weight_decay=1e-4),
    ),
}


PLAIN = str, int, float, type(None)  # what a key and a row can be made of
PARAMETERS = Legal(
    "(name, value) pairs, or a mapping, with values that are numbers, texts, True, False or None",
    lambda pairs: all(isinstance(n, str) and isinstance(v, PLAIN) for n, v in dict(pairs).items()),
)


@dataclass(frozen=True)
class Experiment:
    """One run: which network, pruned how far by what, with which effort and seed.

    Attributes:
        dataset: a name that `prunelab.data.load` knows.
        model: a name that `prunelab.models.build` knows.
        method: a name in `prunelab.methods.METHODS`.
        parameters: the method's hyper-parameters where they are not the default, as (name, value) pairs, kept sorted; a
            mapping is accepted.
        macs: the fraction of the dense MACs to keep, in (0, 1].
        scope: which MACs are counted, "all" or "conv".
        effort: a name in `EFFORTS`.
        seed: of the dense network's weights and training, and of everything after it.
        pretrained: the data set that the dense network was trained on before this one, after which its last layer was
            drawn anew; None: there was none.

    Raises:
        ValueError: a value is not legal; the legal ones are named.
    """

    dataset: str
    model: str
    method: str
    parameters: tuple[tuple[str, Any], ...] = ()
    macs: float = 1.0
    scope: Scope = "all"
    effort: str = "smoke"
    seed: int = 0
    pretrained: str | None = None

    def __post_init__(self) -> None:
        name = instance(str, "a name")
        check_fields(self, "experiment", dataset=name, model=name, parameters=PARAMETERS, pretrained=optional(name))
        check_fields(self, "experiment", effort=one_of(EFFORTS), seed=integer(0))
        method = methods.build(self.method, **dict(self.parameters))
        floats = {field.name for field in fields(method) if str(field.type).startswith("float")}
        Budget(self.macs, self.scope)
        # 1 and 1.0 are one experiment, with one key.
        settled = {n: float(v) if n in floats and isinstance(v, int) else v for n, v in dict(self.parameters).items()}
        object.__setattr__(self, "parameters", tuple(sorted(settled.items())))
        object.__setattr__(self, "macs", float(self.macs))

    @classmethod
    def of(cls, row: Row) -> Experiment:
        """Return the experiment that a row is the result of.

        Raises:
            ValueError: a setting is missing or illegal, or they do not give the row's key.
        """
        if missing := [field.name for field in fields(cls) if field.name not in row and field.default is not None]:
            raise ValueError(f"row {row.get('key')}: {missing[0]!r} is missing")
        settings: dict[str, Any] = {field.name: row.get(field.name) for field in fields(cls)}
        found = cls(**settings)
        if found.key != row["key"]:
            raise ValueError(f"row {row['key']}: its settings have the key {found.key}: it was changed by hand")
        return found

    @property
    def key(self) -> str:
        """A digest of all settings, the row's identity in the store."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def settings(self) -> Row:
        """The fields that are set: only a transferred network was `pretrained`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def base(self) -> Experiment:
        """The experiment of the dense network that this one starts from."""
        return replace(self, method="dense", parameters=(), macs=1.0, scope="all")

    @property
    def source(self) -> Experiment | None:
        """The experiment of the network that the dense one is transferred from, if it is."""
        if self.pretrained is None:
            return None
        effort = EFFORTS[self.effort].pretraining or self.effort
        return replace(self.base, dataset=self.pretrained, effort=effort, pretrained=None)


class Store:
    """Rows as JSON lines, one file per data set and network, each written whole or not at all.

    Args:
        folder: default `PRUNELAB_RESULTS`, else `results/` of the repository that this file is in.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder or os.environ.get("PRUNELAB_RESULTS") or RECORDED)

    def rows(self) -> dict[str, Row]:
        """Read every row, by key.

        Raises:
            ValueError: a line is damaged; file and line are named.
        """
        found: dict[str, Row] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                try:
                    row = json.loads(line)
                    found[row["key"]] = row
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {number} is not a row ({error}): delete it, and the experiment runs again"
                    ) from error
        return found

    def add(self, row: Row) -> None:
        """Append a row to its file, unless its key is there already; other processes may do the same."""
        path = self.folder / f"{row['dataset']}-{row['model']}.jsonl".replace(os.sep, "_")
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            text = path.read_text() if path.exists() else ""
            if f'"key": "{row["key"]}"' not in text:
                text += "" if text.endswith("\n") or not text else "\n"  # which an editor may have taken off
                write_atomically(path, (text + json.dumps(row) + "\n").encode())


def run(
    experiments: Iterable[Experiment], *, store: Store | None = None, jobs: int | None = None, progress: bool = True
) -> pd.DataFrame:
    """Return the rows of all experiments, each once, in their order, computing only those that the store lacks.

    Args:
        experiments: what to run; dense networks that several share are trained once.
        store: where rows are looked up and added as they come; default the repository's.
        jobs: processes side by side; default one per CPU core, or one if there is a GPU.
        progress: show a bar while rows are computed.

    Raises:
        ValueError, FileNotFoundError: before any work, if a data set or network is not to be had.
        RuntimeError: at the end, if experiments failed; they are named. The rows of all others are in the store.
    """
    check("jobs", jobs, optional(integer(1)))
    check("experiments", experiments, Legal("a list of Experiments", lambda given: iter(given) is not None))
    wanted, store = list(dict.fromkeys(experiments)), store or Store()
    lacking = missing(wanted, store)
    bases = untrained(lacking)
    jobs = jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    failed: dict[Experiment, Exception] = {}
    with tqdm(total=len(bases) + len(lacking), desc="experiments", disable=not progress or not lacking) as bar:
        for base, error in _side_by_side(_into_cache, bases, jobs):
            failed |= {e: error for e in lacking if e.base == base} if isinstance(error, Exception) else {}
            bar.update()
        for experiment, row in _side_by_side(compute, [e for e in lacking if e not in failed], jobs):
            if isinstance(row, Exception):
                failed[experiment] = row
            else:
                store.add(row)
            bar.update()
    check_all_ran(failed, lacking, store)
    return recorded(wanted, store)


def check_all_ran(failed: Mapping[Experiment, Exception], lacking: Sequence[Experiment], store: Store) -> None:
    """Raise RuntimeError if experiments failed, naming each and the reason."""
    if failed:
        reasons = "\n".join(f"{experiment}: {type(error).__name__}: {error}" for experiment, error in failed.items())
        raise RuntimeError(
            f"{len(failed)} of {len(lacking)} experiments failed, the others' rows are in {store.folder}:\n{reasons}"
        ) from next(iter(failed.values()))


def missing(experiments: Iterable[Experiment], store: Store) -> list[Experiment]:
    """Return the experiments that the store lacks, each once, after a check that they can be run.

    Raises:
        ValueError, FileNotFoundError: a data set or network of theirs is not to be had, or one is no experiment.
    """
    wanted = dict.fromkeys(experiments)
    for experiment in wanted:
        check("experiments: one of them", experiment, instance(Experiment, "an Experiment"))
    known = store.rows()
    lacking = [experiment for experiment in wanted if experiment.key not in known]
    for base in dict.fromkeys(e.base for e in lacking):
        _check(base)
    return lacking


def untrained(experiments: Iterable[Experiment]) -> list[Experiment]:
    """Return the dense networks of some experiments, each once, that are not in the cache."""
    return [base for base in dict.fromkeys(e.base for e in experiments) if not _weights_path(base).exists()]


def recorded(experiments: Iterable[Experiment], store: Store) -> pd.DataFrame:
    """Return the rows of experiments that the store has, in their order."""
    known = store.rows()
    return pd.DataFrame([known[experiment.key] for experiment in experiments])


def _check(base: Experiment) -> None:
    """Raise unless the data sets of a dense network are to be had, and the network can be built and transferred."""
    nets = [_drawn(experiment, data.load(experiment.dataset)) for experiment in (base, base.source) if experiment]
    if base.source:
        models.transfer(*nets)


def _side_by_side(
    function: Callable[[Experiment], T], experiments: Sequence[Experiment], jobs: int
) -> Iterable[tuple[Experiment, T | Exception]]:
    """Call a function of each experiment, yielding results, or the errors that end a call, as they come."""
    if jobs == 1 or len(experiments) <= 1:
        return (_attempt(function, experiment) for experiment in experiments)
    parallel = joblib.Parallel(min(jobs, len(experiments)), return_as="generator_unordered", pre_dispatch="all")
    found: Iterable[tuple[Experiment, T | Exception]] = parallel(
        joblib.delayed(_attempt)(function, experiment) for experiment in experiments
    )
    return found


def _attempt(function: Callable[[Experiment], T], experiment: Experiment) -> tuple[Experiment, T | Exception]:
    try:
        return experiment, function(experiment)
    except Exception as error:
        return experiment, error


def _into_cache(base: Experiment) -> None:
    base_network(base)  # which would be sent from process to process, were it returned


def compute(experiment: Experiment) -> Row:
    """Run one experiment and return its row; the test split is read once, at the end."""
    row, _ = carry_out(experiment)
    return row


def carry_out(experiment: Experiment) -> tuple[Row, methods.Pruned]:
    """Run one experiment; return its row, and what the method returned with the network tuned."""
    began = time.process_time()  # unlike the clock on the wall, the same however busy the machine is
    row: Row = {"key": experiment.key, **experiment.settings, "parameters": dict(experiment.parameters)}
    with one_thread():
        dense, images = base_network(experiment), loaded(experiment.dataset)
        effort = EFFORTS[experiment.effort]
        context = Context(
            images,
            effort.after,
            experiment.seed,
            progress=False,
            initial=_untrained(experiment.base, images),
            dense=effort.dense,
        )
        method = methods.build(experiment.method, **dict(experiment.parameters))
        before = time.process_time()
        pruned = method(dense, Budget(experiment.macs, experiment.scope), context)
        row["seconds_pruning"] = round(time.process_time() - before, 1)
        stages = {"cut": copy.deepcopy(pruned.net)}
        _recalibrate(pruned.net, images, experiment.seed)
        stages["recalibrated"] = copy.deepcopy(pruned.net)
        left = pruned.recipe or replace(effort.after, epochs=max(0.0, effort.after.epochs - pruned.epochs))
        tuned = fit(pruned.net, images, left, seed=experiment.seed + 1, progress=False)
        stages["tuned"] = pruned.net
        for split in SPLITS:
            row |= {f"{split}_{stage}": round(evaluate(net, images, split), 4) for stage, net in stages.items()}
    for prefix, net in {"": pruned.net, "dense_": dense}.items():
        row[f"{prefix}macs_all"] = cost.macs(net, images.example)
        row[f"{prefix}macs_conv"] = cost.macs(net, images.example, scope="conv")
        row[f"{prefix}parameter_count"] = cost.parameters(net)
    row |= {"epochs_pruning": pruned.epochs, "epochs": pruned.epochs + tuned.epochs}
    row |= {"widths": pruned.plan.widths, "seconds": round(time.process_time() - began, 1)}
    return row | _provenance(images), pruned


def _recalibrate(net: nn.Module, images: data.Data, seed: int) -> None:
    """Re-estimate batch norm from one pass over the training images at most."""
    batches, batch_size = RECALIBRATION
    recalibrate(net, images, max(1, min(batches, len(images.train.labels) // batch_size)), batch_size, seed)


def base_network(experiment: Experiment) -> nn.Module:
    """Return the trained dense network of an experiment, from the cache or trained now.

    Raises:
        ValueError: the cached weights are damaged; the file is named.
    """
    base = experiment.base
    images = loaded(base.dataset)
    net = _untrained(base, images)
    path = _weights_path(base)
    if not path.exists():  # a file that is there is whole, and a cache that has it need not be writable
        with writing_cache():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                _train(net, images, base, path)
    try:
        net.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and the network is trained again") from error
    return net.to(images.device).eval()


def _train(net: nn.Module, images: data.Data, base: Experiment, path: Path) -> None:
    """Train a dense network and write its weights, unless another process did so while this one waited."""
    if not path.exists():
        with one_thread():
            fit(net, images, EFFORTS[base.effort].dense, seed=base.seed, progress=False)
        weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
        write_atomically(path, save(weights))


def _untrained(base: Experiment, images: data.Data) -> nn.Module:
    """Return the dense network before its training: drawn by the seed, and transferred if the experiment says so."""
    net = _drawn(base, images).to(images.device)
    return models.transfer(net, base_network(base.source)) if base.source else net


def _drawn(base: Experiment, images: data.Data) -> nn.Module:
    return models.build(base.model, classes=len(images.classes), shape=images.shape, seed=base.seed)


def _weights_path(base: Experiment) -> Path:
    """Name the file after the images too: under one data set's name there may be others, such as re-encoded ones."""
    images = "-".join(loaded(name).digest[:8] for name in (base.dataset, base.pretrained) if name)
    name = f"{base.dataset}-{images}-{base.model}-{base.effort}-{base.seed}-{base.key}.safetensors"
    return cache_folder() / "weights" / name.replace(os.sep, "_")


@cache
def loaded(name: str) -> data.Data:
    """Return a data set where experiments have it: on the GPU, if there is one."""
    return data.load(name).to("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def one_thread() -> Iterator[None]:
    """Give this process one CPU thread for as long as the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _provenance(images: data.Data) -> Row:
    device = torch.cuda.get_device_name(images.device) if images.device.type == "cuda" else "cpu"
    return {
        "code": _code_version(),
        "torch": torch.__version__,
        "device": device,
        "data_source": images.source,
        "data_digest": images.digest[:16],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def _code_version() -> str:
    """The package's version, with the commit where it runs from a repository, and whether it was changed since."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # a repository further up is another project's
        return prunelab.__version__
    git = "git", "-C", str(root)
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "prunelab"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return prunelab.__version__
    return f"{prunelab.__version__}+{commit.strip()}{'-dirty' if changed else ''}"  # rows that come in are no change
