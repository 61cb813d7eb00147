"""What a Dask cluster gains and costs on this machine, measured in turns in one run.

python benchmarks/cluster.py [--runs 32] [--tasks 200] [--rounds 1]

The gain: seconds of a sweep of digits experiments, their dense network trained beforehand, on one worker and on two,
once the workers have PyTorch loaded. Two workers cannot gain more than the machine gives two processes, so the same
sweep is timed without Dask too. The cost: milliseconds per task that does nothing, submitted and collected as
`cluster.run` does.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from distributed import Client, LocalCluster, as_completed

from prunelab import cluster, experiments
from prunelab.experiments import Experiment, Store

DENSE = Experiment("digits", "convnet-bn", "dense")


def sweep(runs: int) -> list[Experiment]:
    """Return so many experiments on one dense network, at as many budgets."""
    return [Experiment("digits", "convnet-bn", "random", (), 0.25 + 0.5 * i / runs, "conv") for i in range(runs)]


@contextmanager
def workers(count: int) -> Iterator[Client]:
    """Start so many worker processes, and let each compute a row, so that none has anything left to load."""
    with (
        LocalCluster(n_workers=count, threads_per_worker=1, memory_limit=None, dashboard_address=":0") as local,
        Client(local, set_as_default=False) as client,
    ):
        client.run(experiments.compute, DENSE)
        yield client


def seconds(call: Callable[[], object]) -> float:
    """Time one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def on_cluster(client: Client, wanted: list[Experiment]) -> float:
    """Time a sweep into an empty store."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds(lambda: cluster.run(wanted, client, store=Store(folder), progress=False))


def without(jobs: int, wanted: list[Experiment]) -> float:
    """Time a sweep into an empty store by processes of joblib's that have PyTorch loaded."""
    with tempfile.TemporaryDirectory() as warm, tempfile.TemporaryDirectory() as folder:
        others = [Experiment("digits", "convnet-bn", "random", (), 0.9 + i / 100, "conv") for i in range(jobs)]
        experiments.run(others, store=Store(warm), jobs=jobs, progress=False)
        return seconds(lambda: experiments.run(wanted, store=Store(folder), jobs=jobs, progress=False))


def nothing(_: int) -> None:
    """Do nothing, at the other end."""


def overhead(client: Client, tasks: int) -> float:
    """Return milliseconds per task, submitted and collected as `cluster.run` does."""

    def all_tasks() -> None:
        futures = [client.submit(nothing, i, pure=False, retries=2) for i in range(tasks)]
        for future in as_completed(futures, loop=client.loop):
            future.result()

    return 1e3 * seconds(all_tasks) / tasks


def main(runs: int = 32, tasks: int = 200, rounds: int = 1) -> None:
    """Print seconds per sweep on one and two workers, with and without Dask, and milliseconds per task."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PRUNELAB_CACHE"] = folder
        experiments.base_network(DENSE)
        wanted = sweep(runs)
        found: dict[str, list[float]] = {}
        with workers(1) as one, workers(2) as two:
            for _ in range(rounds):
                found.setdefault("Dask, 1 worker", []).append(on_cluster(one, wanted))
                found.setdefault("Dask, 2 workers", []).append(on_cluster(two, wanted))
                found.setdefault("joblib, 1 process", []).append(without(1, wanted))
                found.setdefault("joblib, 2 processes", []).append(without(2, wanted))
            costs = [overhead(two, tasks) for _ in range(5)]
    print(f"{runs} runs, {os.cpu_count()} cores, median of {rounds} [least, most] seconds")
    for name, values in found.items():
        print(f"{name:20s} {statistics.median(values):7.1f} [{min(values):.1f}, {max(values):.1f}]")
    for name in ("Dask, {} worker{}", "joblib, {} process{}"):
        plural = "es" if name.startswith("joblib") else "s"
        gains = [a / b for a, b in zip(found[name.format(1, "")], found[name.format(2, plural)], strict=True)]
        print(f"{name.split(',')[0]}: {statistics.median(gains):.2f}x with two")
    low, middle, high = min(costs), statistics.median(costs), max(costs)
    print(f"overhead per run: {middle:.1f} ms [{low:.1f}, {high:.1f}], median of {len(costs)} times {tasks} tasks")


if __name__ == "__main__":
    typer.run(main)
