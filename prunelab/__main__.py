"""The command line: list, run, report, verify, zoo, doctor."""

from __future__ import annotations

import ast
import functools
import os
import platform
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prunelab import __version__
from prunelab._files import cache_folder

if TYPE_CHECKING:  # what needs PyTorch is imported by the commands that use it: `--help` and `doctor` do not
    import pandas as pd

    from prunelab.experiments import Experiment, Row

REPOSITORY = Path(__file__).resolve().parents[1]
COLOURS = {"holds": "green", "holds in part": "yellow", "does not hold here": "red", "not tested here": "bright_black"}
TOLERANCE = 0.5  # points of accuracy that a recomputed row may differ by, if its seeds do not differ by more

app = typer.Typer(help="Structured pruning: the papers' claims, tested.", no_args_is_help=True, add_completion=False)
console = Console()
errors = Console(stderr=True)

P = ParamSpec("P")


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Show a user's error as one red line, and exit with 2."""

    @functools.wraps(function)
    def shown(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error

    return shown


@app.command("list")
@command
def list_() -> None:
    """Show the notebooks with their claims and verdicts, and what can be named in their parameters."""
    from prunelab import data, experiments, methods, models, report

    verdicts = report.verdict_table().drop_duplicates(["notebook", "claim"])  # on the main setting; `report` has all
    table = Table("notebook", "claim", "verdict")
    for path in _notebooks():
        own = verdicts[verdicts.notebook == path.stem]
        for place, (claim, word) in enumerate(zip(own.claim, own.verdict, strict=True)):
            table.add_row("" if place else path.stem, escape(claim), _coloured(word))
        if own.empty:
            table.add_row(path.stem, "", "")
    console.print(table)
    for what, names in (
        ("data sets", data.NAMES),
        ("networks", (*models.NAMES, "any classification network of torchvision")),
        ("methods", methods.METHODS),
        ("efforts", experiments.EFFORTS),
    ):
        console.print(f"[bold]{what}[/]: {', '.join(names)}", highlight=False, soft_wrap=True)


@app.command(context_settings={"ignore_unknown_options": True})
@command
def run(
    words: Annotated[list[str], typer.Argument(metavar="NN|all [-p NAME VALUE]...", show_default=False)],
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute every row anew, in OUT/results.")] = False,
    out: Annotated[Path, typer.Option(help="Where executed notebooks, pages and figures go.")] = Path("build"),
    cluster: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Compute rows on a Dask cluster: local, slurm[:JOBS], or HOST:PORT."),
    ] = None,
) -> None:
    """Run notebooks with other parameters: NN is the start of a notebook's name, `-p NAME VALUE` sets a parameter.

    With several notebooks, each is given the parameters that it has. They run here, one after the other; with
    --cluster, the rows that they lack are computed there.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    names, given = _parse(words)
    chosen = _choose(names)
    known = {path: papermill.inspect_notebook(str(path)) for path in chosen}
    for name in given:
        if not any(name in parameters for parameters in known.values()):
            has = "; ".join(f"{path.stem} has {', '.join(found) or 'none'}" for path, found in known.items())
            raise ValueError(f"unknown parameter {name}: {has}")
    if any(path.parent.resolve() == out.resolve() for path in chosen):
        raise ValueError(f"--out is {out}, where the notebooks are: they would be overwritten; name another folder")
    with ExitStack() as stack:
        scheduler = stack.enter_context(_connected(cluster)) if cluster is not None else None
        figures, rows = (out / "figures").resolve(), _emptied(out / "results").resolve() if fresh else None
        figures.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_environment(PRUNELAB_FIGURES=figures, PRUNELAB_RESULTS=rows, PRUNELAB_CLUSTER=scheduler))
        for path, parameters in known.items():
            console.print(f"[bold]{path.stem}[/]")
            executed = out / path.name
            own = {name: value for name, value in given.items() if name in parameters}
            try:
                papermill.execute_notebook(str(path), str(executed), own, cwd=str(path.parent))
            except PapermillExecutionError as error:
                errors.print(f"{path.stem}: {error.ename}: {error.evalue} ({executed})", style="red", markup=False)
                raise typer.Exit(1) from error
            _write_page(executed)
        from prunelab import report

        table = report.verdict_table(recorded=False)
    _show(table[table.notebook.isin([path.stem for path in chosen])])


@app.command("report")
@command
def report_(
    write: Annotated[bool, typer.Option("--write", help="Write them into README.md and the notebooks too.")] = False,
) -> None:
    """Show the verdicts of the recorded rows."""
    from prunelab import pages, report

    if write:
        pages.write(REPOSITORY)
    _show(report.verdict_table())


@app.command()
@command
def verify(
    notebook: Annotated[str | None, typer.Argument(metavar="[NN]", help="Only rows of this notebook.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="How many rows to recompute.")] = 3,
    seed: Annotated[int, typer.Option(help="Which rows are drawn.")] = 0,
    dataset: Annotated[str | None, typer.Option(help="Only rows of this data set.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Recompute every row, whatever the sample.")] = False,
) -> None:
    """Recompute some of the recorded rows, or all, and compare.

    On the kind of machine that recorded them, rows come out the same to the last digit. Another processor rounds
    otherwise, and training makes that grow: there a new test accuracy may differ from the recorded one by as much as
    two seeds of one experiment do, in 95 of 100 pairs, and by half a point at least.
    """
    from prunelab import claims, report
    from prunelab.experiments import Experiment, Store, run

    known = Store().rows()
    keys = {key for key, row in known.items() if dataset in (None, row["dataset"])}
    if notebook is not None:
        found = report.found(claims.load(notebook), known.values())
        keys &= {experiment.key for cells in found for experiment in cells.values()}
    chosen = sorted(keys) if every else random.Random(seed).sample(sorted(keys), min(sample, len(keys)))
    wanted = _at_hand([known[key] for key in chosen])
    if not wanted:
        raise ValueError(f"nothing to verify among {len(keys)} recorded rows")
    accuracies = {Experiment.of(row): row["test_tuned"] for row in known.values()}
    with tempfile.TemporaryDirectory() as folder:
        anew = run(wanted, store=Store(folder))
    table = Table("method", "setting", "seed", "recorded", "new", "allowed", "")
    words = []
    for experiment, new in zip(wanted, anew.test_tuned, strict=True):
        recorded, allowed = accuracies[experiment], max(TOLERANCE, _between_seeds(experiment, accuracies))
        words.append("identical" if new == recorded else "close" if abs(new - recorded) <= allowed else "differs")
        setting = f"{experiment.model} on {experiment.dataset}, {experiment.effort}, {experiment.macs:g} of the MACs"
        numbers = f"{recorded:.2f}", f"{new:.2f}", f"±{allowed:.2f}"
        word = f"[{'red' if words[-1] == 'differs' else 'green'}]{words[-1]}[/]"
        table.add_row(experiment.method, escape(setting), str(experiment.seed), *numbers, word)
    console.print(table)
    console.print(", ".join(f"{words.count(word)} {word}" for word in ("identical", "close", "differs")), end="")
    console.print(f": {len(wanted)} of {len(keys)} recorded rows")
    if "differs" in words:
        raise typer.Exit(1)


@app.command("zoo")
@command
def zoo_() -> None:
    """Write the networks that zoo/ lacks, each by running its recorded experiment again; hours for all of them."""
    from tqdm import tqdm

    from prunelab import zoo
    from prunelab.experiments import Store

    known = Store().rows()
    lacking = [known[e.key] for e in zoo.entries() if e.key in known and not zoo.path(e).exists()]
    for experiment in tqdm(_at_hand(lacking), desc="zoo", unit="network", leave=False):
        zoo.keep(experiment)
    found = [path for experiment in zoo.entries() if (path := zoo.path(experiment)).exists()]
    size = sum(path.stat().st_size for path in found)
    console.print(f"{len(found)} of {len(zoo.entries())} networks, {size / 1e6:.1f} MB, in {zoo.FOLDER}")


@app.command()
@command
def doctor() -> None:
    """Show what this machine has, and what is missing."""
    table = Table("what", "found", "")
    healthy = True
    for what, found, well in _findings():
        healthy &= well
        table.add_row(what, escape(found), "[green]ok[/]" if well else "[red]problem[/]")
    console.print(table)
    if not healthy:
        raise typer.Exit(1)


# --- run --------------------------------------------------------------------------------------------------------------


def _notebooks() -> list[Path]:
    folder = REPOSITORY / "notebooks"
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise FileNotFoundError(f"there are no notebooks in {folder}: prunelab was installed without its repository")
    return found


def _parse(words: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """Split `NN... -p NAME VALUE ...` into notebooks and parameters; a value is a Python literal, else text.

    A path such as ./pictures is made absolute if it leads somewhere: notebooks run in their own folder.
    """
    names, parameters = [], {}
    rest = iter(words)
    for word in rest:
        if word != "-p":
            names.append(word)
            continue
        name, value = next(rest, None), next(rest, None)
        if name is None or value is None:
            raise ValueError("-p needs a name and a value, as in: -p DATASET digits")
        try:
            parameters[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            leads_somewhere = os.sep in value and Path(value).exists()
            parameters[name] = str(Path(value).resolve()) if leads_somewhere else value
    return names, parameters


def _choose(names: Iterable[str]) -> list[Path]:
    """Return the notebooks whose names start with one of the given; all of them for "all"."""
    known = _notebooks()
    chosen = set()
    for name in names:
        found = [path for path in known if name == "all" or path.stem.startswith(name)]
        if not found:
            raise ValueError(f"unknown notebook {name!r}: there are {', '.join(path.stem for path in known)}")
        chosen.update(found)
    if not chosen:
        raise ValueError(f"name a notebook, or all: there are {', '.join(path.stem for path in known)}")
    return sorted(chosen)


def _emptied(folder: Path) -> Path:
    """Return a folder of results without rows."""
    if folder.resolve() == REPOSITORY / "results":
        raise ValueError(f"--fresh would delete the recorded rows in {folder}: choose another --out")
    for path in folder.glob("*.jsonl"):
        path.unlink()
    return folder


@contextmanager
def _connected(cluster: str) -> Iterator[str]:
    """Yield a scheduler's address: the notebooks' kernels compute there what `report.results` lacks.

    The notebooks themselves stay here. It is their rows that take hours, each is a task, and each is in the store once
    it is there; a notebook as a task would lose them all with its worker, and would need the store on every machine.
    """
    from prunelab.cluster import connect, scheduler_of

    with connect(cluster) as client:
        yield scheduler_of(client)


@contextmanager
def _environment(**variables: Path | str | None) -> Iterator[None]:
    """Set environment variables, those that are not None, for as long as the block runs."""
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in variables.items() if value is not None})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _write_page(executed: Path) -> None:
    from nbconvert import HTMLExporter

    from prunelab._files import write_atomically

    page, _ = HTMLExporter().from_filename(str(executed))
    write_atomically(executed.with_suffix(".html"), page.encode())


def _show(verdicts: pd.DataFrame) -> None:
    """Print what fits on a screen; the README has every column."""
    shown = verdicts[["notebook", "claim", "measured here", "verdict", "setting"]]
    table = Table(*shown.columns)
    for *text, word, setting in shown.to_numpy():
        table.add_row(*map(escape, text), _coloured(word), escape(setting))
    console.print(table)


def _coloured(word: str) -> str:
    return f"[{COLOURS[word]}]{word}[/]"


# --- verify -----------------------------------------------------------------------------------------------------------


def _at_hand(rows: Iterable[Row]) -> list[Experiment]:
    """Return the experiments of the rows whose images are at hand; name the others."""
    from prunelab.experiments import Experiment

    found = []
    for row in rows:
        experiment = Experiment.of(row)
        if reason := _not_at_hand(experiment, row):
            console.print(f"skipped {experiment}: {reason}", markup=False, highlight=False, soft_wrap=True)
        else:
            found.append(experiment)
    return found


def _not_at_hand(experiment: Experiment, row: Row) -> str:
    """Return why the images of a row cannot be had; empty if they can."""
    from prunelab.experiments import loaded

    try:
        images, *_ = [loaded(name) for name in (experiment.dataset, experiment.pretrained) if name]
    except FileNotFoundError as error:
        return str(error)
    if images.digest.startswith(row["data_digest"]):
        return ""
    return f"recorded on other images ({row['data_source']}) than those at hand ({images.source})"


def _between_seeds(experiment: Experiment, accuracies: Mapping[Experiment, float]) -> float:
    """Return by how much two seeds of an experiment differ in 95 of 100 pairs: t(0.975, n)·√2·s; 0 if none has two.

    Three seeds say little of a spread, so s is pooled over all experiments at the same budget of the same network and
    effort on the same images, with n degrees of freedom in all.
    """
    import numpy as np
    from scipy import stats

    seeds: dict[Experiment, list[float]] = {}
    for other, accuracy in accuracies.items():
        if (replace(other.base, seed=experiment.seed), other.macs) == (experiment.base, experiment.macs):
            seeds.setdefault(replace(other, seed=experiment.seed), []).append(accuracy)
    freedom = sum(len(found) - 1 for found in seeds.values())
    squares = sum(len(found) * float(np.var(found)) for found in seeds.values())
    return float(stats.t.ppf(0.975, freedom)) * (2 * squares / freedom) ** 0.5 if freedom else 0.0


# --- doctor -----------------------------------------------------------------------------------------------------------


def _findings() -> Iterator[tuple[str, str, bool]]:
    """Yield what was looked at, what was found, and whether it is well."""
    yield "prunelab", __version__, True
    yield "Python", f"{platform.python_version()}, {sys.executable}", sys.version_info >= (3, 11)
    yield from _pytorch()
    yield _data_folder()
    folder = cache_folder()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    yield "cache (PRUNELAB_CACHE)", f"{folder}, {size / 1e6:.0f} MB", True
    yield _store()
    missing = [name for name in ("papermill", "nbconvert", "jupyterlab", "ipykernel") if find_spec(name) is None]
    advice = f"missing: {', '.join(missing)}; pip install -e '.[notebooks]'"
    yield "notebook tools", advice if missing else "all there", not missing


def _pytorch() -> Iterator[tuple[str, str, bool]]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield "torch", f"cannot be imported: {error}", False
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    yield "torch", torch.__version__, True
    yield "device", f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {gpu}", True
    try:
        import torchvision

        yield "torchvision", torchvision.__version__, True
    except (ImportError, OSError, RuntimeError) as error:
        reason = f"{error}"
        if "torchvision::nms" in reason:
            reason += ": torch and torchvision are not of one build (one for CPU, one for CUDA, or versions that do not"
            reason += " belong together); reinstall both with one command from one index"
        yield "torchvision", reason, False


def _data_folder() -> tuple[str, str, bool]:
    what, folder = "data (PRUNELAB_DATA)", os.environ.get("PRUNELAB_DATA")
    if not folder:
        return what, "not set: digits is embedded, others are downloaded", True
    if not Path(folder).is_dir():
        return what, f"{folder} is not a folder", False
    return what, f"{folder}: {', '.join(sorted(path.name for path in Path(folder).iterdir())) or 'empty'}", True


def _store() -> tuple[str, str, bool]:
    what = "results (PRUNELAB_RESULTS)"
    try:
        from prunelab.experiments import Experiment, Store

        store = Store()
        rows = store.rows()
        for row in rows.values():
            Experiment.of(row)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return what, str(error), False
    return what, f"{store.folder}: {len(rows)} rows", True


if __name__ == "__main__":
    app()
