"""The same runs on a Dask cluster: this machine's cores, a scheduler's address, or SLURM.

Every dense network that the cache lacks is a task, every experiment is a task that waits for its network, and each
computes as `prunelab.experiments.compute` does, on one thread of a process: a row does not depend on where it was
computed. This process alone writes the store, each row as it comes, so a sweep that is broken off goes on where it was;
what a worker was computing when it died is computed by another.

Workers need prunelab, the data (`PRUNELAB_DATA`) and a cache folder (`PRUNELAB_CACHE`), best one that all share: a
worker that does not find an experiment's dense network there trains it itself. Where a worker declares the resource
GPU, experiments go to such workers alone, one at a time per GPU declared:

    dask scheduler
    CUDA_VISIBLE_DEVICES=0 dask worker ADDRESS --nthreads 1 --resources GPU=1
    dask worker ADDRESS --nthreads 1 --nworkers 8       # on a machine without a GPU

Dask pickles what it sends, so name only clusters that you trust.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from prunelab._checks import check, integer
from prunelab.experiments import (
    Experiment,
    Row,
    Store,
    base_network,
    check_all_ran,
    compute,
    missing,
    recorded,
    untrained,
)

try:
    import dask
    from dask.system import CPU_COUNT
    from dask_jobqueue.slurm import SLURMCluster
    from distributed import Client, LocalCluster, as_completed
    from distributed.comm.addressing import get_address_host_port
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: a cluster needs Dask: pip install -e '.[cluster]'") from error

ADDRESSES = "'local', 'slurm', 'slurm:JOBS', or a scheduler's as in 'host:8786' or 'tcp://host:8786'"
SECONDS_TO_ANSWER = 10
ANY_FREE_PORT = ":0"  # of the dashboard: the usual one may be another cluster's

_alone = threading.Lock()  # a process has one number of threads and one state of random numbers: one run at a time


def run(
    experiments: Iterable[Experiment],
    cluster: Client | str = "local",
    *,
    store: Store | None = None,
    retries: int = 2,
    progress: bool = True,
) -> pd.DataFrame:
    """Return what `prunelab.experiments.run` does, computed on a cluster; all that can be computed is, then errors are.

    Args:
        experiments: what to run; dense networks that several share are trained once.
        cluster: a client of Dask's, or an address as in `connect`, connected to if the store lacks a row.
        store: where rows are looked up and added as they come, by this process alone; default the repository's.
        retries: how often a run that ends in an error is tried again, >= 0. A run whose worker dies is moved to another
            worker without counting here.
        progress: show a bar while rows are computed.

    Raises:
        ValueError, FileNotFoundError: before any work, if a data set or network is not to be had, the address is none
            of a scheduler, or a worker has several threads and no GPU.
        RuntimeError: experiments failed; they are named. The rows of all others are in the store.
    """
    check("retries", retries, integer(0))
    wanted, store = list(dict.fromkeys(experiments)), store or Store()
    if lacking := missing(wanted, store):
        with ExitStack() as stack:
            client = cluster if isinstance(cluster, Client) else stack.enter_context(connect(cluster))
            _fill(store, lacking, client, retries, progress)
    return recorded(wanted, store)


@contextmanager
def connect(address: str = "local") -> Iterator[Client]:
    """Connect to a cluster, or start one, for as long as the block runs, and print where its dashboard is.

    Args:
        address: "local": one worker process per CPU core, or one with the GPU if there is a GPU; a script that uses it
            needs `if __name__ == "__main__":`, as with every pool of processes. "slurm" or "slurm:JOBS": so many jobs,
            of `slurm()`. Else the address of a scheduler.

    Raises:
        ValueError: no scheduler answers there, or SLURM's sbatch is not on this machine.
    """
    with ExitStack() as stack:
        if address == "local":
            client = Client(stack.enter_context(_local()), set_as_default=False)
        elif address.partition(":")[0] == "slurm":
            client = Client(stack.enter_context(_queued(address)), set_as_default=False)
        else:
            try:
                get_address_host_port(address)  # a client made with an illegal address is not closed
                client = Client(address, timeout=SECONDS_TO_ANSWER, set_as_default=False)
            except (OSError, ValueError, TypeError) as error:
                raise ValueError(
                    f"cluster {address!r}: no scheduler answers ({error}); legal are {ADDRESSES}"
                ) from error
        stack.enter_context(client)
        found = f"{len(_workers(client))} workers, dashboard {client.dashboard_link}"
        print(f"cluster {scheduler_of(client)}: {found}", file=sys.stderr)
        yield client


def scheduler_of(client: Client) -> str:
    """Return the address at which a client reaches its scheduler."""
    assert client.scheduler is not None  # only a closed client has none
    return str(client.scheduler.address)


def slurm(*, gpu: bool = False, **job: Any) -> SLURMCluster:
    """Return a SLURM cluster without jobs yet (`.scale(jobs=8)` queues 8); each holds one worker process per core.

    SLURM hands this process's environment to its jobs, `PRUNELAB_DATA` and `PRUNELAB_CACHE` with it.

    Args:
        gpu: each job asks for a GPU, and its one worker declares it.
        job: what `dask_jobqueue.SLURMCluster` takes, such as queue, account, walltime, cores, memory. What is not given
            comes from Dask's configuration (`jobqueue.slurm` in ~/.config/dask/jobqueue.yaml), else is 1 core and 4 GB.
    """
    configured = dask.config.get("jobqueue.slurm")
    settings: dict[str, Any] = {"cores": configured["cores"] or 1, "memory": configured["memory"] or "4GB"} | job
    settings["processes"] = 1 if gpu else settings["cores"]
    if gpu:
        asked = settings.get("job_extra_directives", configured["job-extra-directives"])
        said = settings.get("worker_extra_args", configured["worker-extra-args"])
        settings["job_extra_directives"] = [*asked, "--gres=gpu:1"]
        settings["worker_extra_args"] = [*said, "--resources", "GPU=1"]
    return SLURMCluster(scheduler_options={"dashboard_address": ANY_FREE_PORT}, **settings)


def _local() -> LocalCluster:
    gpu = torch.cuda.is_available()
    return LocalCluster(
        n_workers=1 if gpu else CPU_COUNT,
        threads_per_worker=1,
        resources={"GPU": 1} if gpu else None,
        memory_limit=None,  # Dask's limit is for the data that it holds, which is a few rows
        dashboard_address=ANY_FREE_PORT,
    )


@contextmanager
def _queued(address: str) -> Iterator[SLURMCluster]:
    """Queue the jobs of "slurm:JOBS"."""
    jobs = address.removeprefix("slurm").removeprefix(":") or "1"
    if not (jobs.isdecimal() and int(jobs)):
        raise ValueError(f"cluster {address!r}: JOBS in 'slurm:JOBS' is an integer >= 1")
    if shutil.which("sbatch") is None:
        raise ValueError(f"cluster {address!r}: there is no sbatch on this machine; legal are {ADDRESSES}")
    with slurm() as cluster:
        cluster.scale(jobs=int(jobs))
        yield cluster


def _fill(store: Store, lacking: Sequence[Experiment], client: Client, retries: int, progress: bool) -> None:
    """Compute experiments on a cluster and add their rows to a store as they come; raise for those that failed."""
    client.wait_for_workers(1)
    asked = {"retries": retries, "resources": _resources(client), "pure": False}
    trained = {base: client.submit(_train, base, **asked) for base in untrained(lacking)}
    futures = {client.submit(_compute, e, trained.get(e.base), **asked): e for e in lacking}
    everything = [*trained.values(), *futures]
    failed: dict[Experiment, Exception] = {}
    try:
        done = as_completed(everything, loop=client.loop)
        for future in tqdm(done, "experiments", len(everything), disable=not progress):
            if future not in futures:
                continue  # if training a network failed, so did all that wait for it
            try:
                row = future.result()
            except Exception as error:
                failed[futures[future]] = error
            else:
                store.add(row)
    finally:
        client.cancel(everything)
    check_all_ran(failed, lacking, store)


def _resources(client: Client) -> dict[str, int]:
    """Return what a run asks of its worker.

    Raises:
        ValueError: a worker would have to compute several runs at once in one process.
    """
    workers = _workers(client)
    if any("GPU" in worker["resources"] for worker in workers.values()):
        return {"GPU": 1}
    for address, worker in workers.items():
        if worker["nthreads"] > 1:
            raise ValueError(
                f"worker {address} has {worker['nthreads']} threads: start it with --nthreads 1 and with --nworkers as"
                " many as it shall run side by side"
            )
    return {}


def _workers(client: Client) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = client.scheduler_info(n_workers=-1)["workers"]
    return found


def _train(base: Experiment) -> None:
    with _alone:
        base_network(base)


def _compute(experiment: Experiment, _trained: None) -> Row:
    with _alone:
        return compute(experiment)
