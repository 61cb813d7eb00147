"""Sweeps on Dask clusters of this machine: the rows of an undisturbed run, whatever happens to the workers."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import nbformat
import pandas as pd
import pytest
from distributed import Client, LocalCluster, Scheduler, SpecCluster, Worker, get_worker
from distributed.utils import get_mp_context
from typer.testing import CliRunner

from prunelab import __main__ as cli
from prunelab import cluster, experiments
from prunelab.experiments import EFFORTS, Effort, Experiment, Row, Store

SWEEP = [
    Experiment("digits", "convnet-bn", method, (), macs, "conv", "smoke", seed)
    for seed in (0, 1)
    for method, macs in (("l1", 0.5), ("random", 0.5), ("random", 0.25))
]

# What every process here takes for "smoke"; a worker process is told as it starts, and again if it is replaced.
TINY = Effort(replace(EFFORTS["smoke"].dense, epochs=1), replace(EFFORTS["smoke"].after, epochs=1))
PRELOAD = f"from prunelab.experiments import EFFORTS, Effort, Recipe; EFFORTS['smoke'] = {TINY!r}"


def settled(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return all of the rows that does not depend on when and how fast they were computed."""
    return rows.drop(columns=["seconds", "seconds_pruning", "date", "code"]).to_dict("records")


def keys_in(store: Store) -> list[str]:
    return [json.loads(line)["key"] for path in store.folder.glob("*.jsonl") for line in path.read_text().splitlines()]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a test its own cache, and this process an effort of an epoch."""
    monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(EFFORTS, "smoke", TINY)


@pytest.fixture
def threads(tiny: None) -> Iterator[Client]:
    """Return a client of a worker that is a thread of this process, so that it computes what a test has replaced."""
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=":0"
        ) as local,
        Client(local, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the rows of the sweep, computed one after the other without a cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(EFFORTS, "smoke", TINY)
        store = Store(tmp_path_factory.mktemp("rows"))
        return settled(experiments.run(SWEEP, store=store, jobs=1, progress=False))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Return a client of two worker processes, forked from one that has PyTorch imported, with a cache of their own."""
    folder = str(tmp_path_factory.mktemp("cache"))
    with (
        pytest.MonkeyPatch.context() as patch,
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
    ):
        patch.setenv("PRUNELAB_CACHE", folder)
        get_mp_context().set_forkserver_preload(["distributed", "prunelab.cluster"])
        with (
            LocalCluster(
                n_workers=2,
                threads_per_worker=1,
                memory_limit=None,
                dashboard_address=":0",
                preload=PRELOAD,
                env={"PRUNELAB_CACHE": folder},
            ) as local,
            Client(local, set_as_default=False) as client,
        ):
            yield client


def test_a_sweep_that_loses_a_worker_half_way_ends_with_the_same_rows(
    processes: Client, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    killed = []

    class Deadly(Store):
        def add(self, row: Row) -> None:
            super().add(row)
            if not killed and len(keys_in(self)) == 2:
                working = processes.processing()
                busy = max(working, key=lambda worker: len(working[worker]))
                (pid,) = processes.run(os.getpid, workers=[busy]).values()
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    store = Deadly(tmp_path)
    rows = cluster.run(SWEEP, processes, store=store, progress=False)
    assert settled(rows) == undisturbed
    assert sorted(keys_in(store)) == sorted(experiment.key for experiment in SWEEP)
    processes.wait_for_workers(2)
    assert killed and killed[0] not in processes.run(os.getpid).values()


def test_a_schedulers_address_is_enough(
    processes: Client, undisturbed: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = cluster.scheduler_of(processes)
    rows = cluster.run(SWEEP[:2], address, store=Store(tmp_path), progress=False)
    assert settled(rows) == undisturbed[:2]
    assert capsys.readouterr().err == f"cluster {address}: 2 workers, dashboard {processes.dashboard_link}\n"


def test_only_what_is_missing_is_computed(threads: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def count(experiment: Experiment) -> Row:
        computed.append(experiment)
        return experiments.compute(experiment)

    monkeypatch.setattr(cluster, "compute", count)
    store = Store(tmp_path / "rows")
    first = cluster.run(SWEEP[:1], threads, store=store, progress=False)
    both = cluster.run([SWEEP[1], *SWEEP[:2]], threads, store=store, progress=False)
    assert computed == SWEEP[:2]
    assert both.key.tolist() == [SWEEP[1].key, SWEEP[0].key]
    assert both.iloc[1:].to_dict("records") == first.to_dict("records")
    cluster.run(SWEEP[:2], "no cluster is connected to", store=store, progress=False)


def test_a_dense_network_is_trained_once_before_all_that_start_from_it(
    threads: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Experiment] = []

    def note(experiment: Experiment) -> Any:
        calls.append(experiment)
        return experiments.base_network(experiment)

    monkeypatch.setattr(cluster, "base_network", note)
    monkeypatch.setattr(
        cluster, "compute", lambda experiment: [calls.append(experiment), experiments.compute(experiment)][1]
    )
    cluster.run(SWEEP, threads, store=Store(tmp_path / "rows"), progress=False)
    assert sorted(calls, key=repr) == sorted([SWEEP[0].base, SWEEP[3].base, *SWEEP], key=repr)
    assert all(calls.index(experiment.base) < calls.index(experiment) for experiment in SWEEP)


@pytest.mark.parametrize("where", ["pruning", "dense network"])
def test_a_failure_is_named_and_costs_no_other_row(
    threads: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    good, bad = SWEEP[0], SWEEP[3]
    if where == "pruning":
        experiments.base_network(bad)
        (weights,) = (tmp_path / "cache" / "weights").glob("*.safetensors")
        weights.write_bytes(b"damaged")
        reason = f"ValueError: {weights} is damaged"
    else:
        fit = experiments.fit

        def fail(*arguments: Any, seed: int, **others: Any) -> Any:
            if seed == bad.seed and arguments[2] == EFFORTS["smoke"].dense:
                raise OSError("disk full")
            return fit(*arguments, seed=seed, **others)

        monkeypatch.setattr(experiments, "fit", fail)
        reason = "OSError: disk full"
    store = Store(tmp_path / "rows")
    with pytest.raises(RuntimeError) as raised:
        cluster.run([bad, good], threads, store=store, progress=False)
    counted, named = str(raised.value).splitlines()
    assert counted == f"1 of 2 experiments failed, the others' rows are in {store.folder}:"
    assert named.startswith(f"{bad}: {reason}")
    assert keys_in(store) == [good.key]


def test_a_run_is_tried_again(threads: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fail_twice(experiment: Experiment) -> Row:
        tried.append(experiment)
        if len(tried) < 3:
            raise OSError("the folder has gone for a moment")
        return experiments.compute(experiment)

    monkeypatch.setattr(cluster, "compute", fail_twice)
    store = Store(tmp_path / "rows")
    with pytest.raises(RuntimeError, match="gone for a moment"):
        cluster.run(SWEEP[:1], threads, store=store, retries=1, progress=False)
    tried.clear()
    cluster.run(SWEEP[:1], threads, store=store, retries=2, progress=False)
    assert keys_in(store) == [SWEEP[0].key]


def test_runs_go_to_the_workers_with_a_gpu_one_at_a_time(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def note(experiment: Experiment) -> Row:
        seen.append((get_worker().name, get_worker().state.available_resources["GPU"]))
        return experiments.compute(experiment)

    monkeypatch.setattr(cluster, "compute", note)
    options = {"nthreads": 4, "dashboard": False}
    workers = {
        "plain": {"cls": Worker, "options": options},
        "with a GPU": {"cls": Worker, "options": options | {"resources": {"GPU": 1}}},
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "host": "127.0.0.1", "port": 0}}
    with SpecCluster(workers, scheduler) as local, Client(local, set_as_default=False) as client:
        client.wait_for_workers(2)
        cluster.run(SWEEP[:3], client, store=Store(tmp_path / "rows"), progress=False)
    assert seen == [("with a GPU", 0)] * 3


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost:1", "no scheduler answers (Timed out"),
        ("localhost", "no scheduler answers (missing port number"),
        ("http://localhost:8786", "no scheduler answers (unknown address scheme 'http'"),
        ("slurm:none", "JOBS in 'slurm:JOBS' is an integer >= 1"),
        ("slurm:0", "JOBS in 'slurm:JOBS' is an integer >= 1"),
        ("slurm", "there is no sbatch on this machine"),
    ],
)
def test_an_address_without_a_cluster_is_refused_before_any_work(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    monkeypatch.setattr(cluster, "SECONDS_TO_ANSWER", 0.2)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError) as raised:
        cluster.run(SWEEP, address, store=Store(tmp_path / "rows"), progress=False)
    assert str(raised.value).startswith(f"cluster {address!r}: {message}")
    assert not (tmp_path / "rows").exists()
    assert not (tmp_path / "cache" / "weights").exists()


def test_illegal_settings_are_refused_before_any_work(tiny: None, tmp_path: Path) -> None:
    store = Store(tmp_path / "rows")
    with pytest.raises(ValueError, match="retries is -1; it must be an integer >= 0"):
        cluster.run(SWEEP, retries=-1, store=store)
    with pytest.raises(ValueError, match="unknown network 'no-net'"):
        cluster.run([*SWEEP, replace(SWEEP[0], model="no-net")], "nowhere", store=store)
    two = LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0")
    with (
        two,
        Client(two, set_as_default=False) as client,
        pytest.raises(ValueError, match="has 2 threads: start it with --nthreads 1"),
    ):
        cluster.run(SWEEP, client, store=store, progress=False)
    assert not store.folder.exists()


def test_a_slurm_job_asks_for_what_was_asked_for() -> None:
    with cluster.slurm(
        cores=4, memory="8GiB", queue="long", account="pruning", walltime="08:00:00", interface="lo"
    ) as jobs:
        script = jobs.job_script()
    for line in ("-p long", "-A pruning", "--cpus-per-task=4", "--mem=8G", "-t 08:00:00"):
        assert f"\n#SBATCH {line}\n" in script
    assert " --nthreads 1 " in script and " --nworkers 4 " in script
    assert "GPU" not in script and "gpu" not in script


def test_a_slurm_job_with_a_gpu_declares_it() -> None:
    settings = {"jobqueue.slurm.job-extra-directives": ["--exclusive"], "jobqueue.slurm.cores": 8}
    with dask.config.set(settings), cluster.slurm(gpu=True, interface="lo") as jobs:
        script = jobs.job_script()
    assert "\n#SBATCH --exclusive\n#SBATCH --gres=gpu:1\n" in script
    assert "--resources GPU=1" in script
    assert "--nworkers" not in script


def test_the_jobs_that_slurm_is_given_compute_the_rows(
    undisturbed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of SLURM, a command that runs the job script here, and one that ends it."""
    commands = {
        "sbatch": f'cp "$1" {tmp_path}/job && setsid sh {tmp_path}/job >{tmp_path}/log 2>&1 &\necho "Submitted job $!"',
        "scancel": "kill -- -$1",
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        command = tmp_path / "bin" / name
        command.write_text(f"#!/bin/sh\n{text}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path / "cache"))
    settings = {
        "jobqueue.slurm.interface": "lo",
        "jobqueue.slurm.worker-extra-args": ["--preload", shlex.quote(PRELOAD)],
    }
    with dask.config.set(settings):
        rows = cluster.run(SWEEP[1:2], "slurm:1", store=Store(tmp_path / "rows"), progress=False)
    assert settled(rows) == undisturbed[1:2]


NOTEBOOK = """
from prunelab import claims, report
paper = claims.load("01_spp")
cells = paper.experiments(dataset="digits", model="convnet-bn", effort="smoke", macs=[0.5], seeds=1)
cells = {cell: experiment for cell, experiment in cells.items() if experiment.method == "random"}
print("rows:", *report.results(paper, cells).key)
"""


@pytest.fixture
def repository(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository with a notebook of one experiment, and an empty store."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(book, tmp_path / "notebooks" / "77_toy.ipynb")
    monkeypatch.setattr(cli, "REPOSITORY", tmp_path)
    monkeypatch.setenv("PRUNELAB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_rows_of_notebooks_are_computed_on_the_cluster(
    repository: Path, threads: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []

    def note(experiment: Experiment) -> Row:
        computed.append(experiment.key)
        return experiments.compute(experiment)

    monkeypatch.setattr(cluster, "compute", note)
    shown = CliRunner().invoke(cli.app, ["run", "77", "--cluster", cluster.scheduler_of(threads)])
    assert shown.exit_code == 0, shown.output
    assert len(computed) == 1
    assert f"rows: {computed[0]}" in (repository / "build" / "77_toy.html").read_text()
    assert keys_in(Store()) == computed


def test_notebooks_are_not_started_without_the_cluster(repository: Path) -> None:
    shown = CliRunner().invoke(cli.app, ["run", "77", "--cluster", "nowhere"])
    assert shown.exit_code == 2
    assert shown.stderr.startswith("error: cluster 'nowhere': no scheduler answers")
    assert not (repository / "build").exists()
