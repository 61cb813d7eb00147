"""Faults: processes that are killed, full disks, read-only folders, cut files, pickles, Ctrl-C. See tests/README.md."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jupyter_client.manager import KernelManager
from PIL import Image

from prunelab import data, deploy, experiments, models
from prunelab._files import write_atomically
from prunelab.experiments import EFFORTS, Effort, Experiment, Store, run
from prunelab.structure import Budget, ChannelSpace, Plan

KILLS = 20
VOLATILE = {"seconds", "seconds_pruning", "date", "code"}  # of a row: what may differ between two runs of an experiment
TINY = Effort(replace(EFFORTS["smoke"].dense, epochs=0.25), replace(EFFORTS["smoke"].after, epochs=0.25))

# Children are forked from a server that has imported PyTorch once, and has no threads.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["prunelab.experiments", "pytest"])


def toy(method: str, macs: float = 0.5, seed: int = 0, **parameters: Any) -> Experiment:
    scope = "all" if method == "dense" else "conv"
    return Experiment("digits", "convnet-bn", method, tuple(parameters.items()), macs, scope, "smoke", seed)  # type: ignore[arg-type]


SWEEP = [toy("dense", 1.0), toy("l1"), toy("random"), toy("dense", 1.0, 1), toy("l1", 0.25, 1), toy("random", 0.25, 1)]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a test its own cache, and an effort of a few steps."""
    monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(EFFORTS, "smoke", TINY)


def record(folder: Path, sweep: Sequence[Experiment] = SWEEP, fatal: str | None = None) -> None:
    """Record a sweep in `folder`/rows, in a child; with `fatal`, die in the first call of that function of `os`."""
    os.environ["PRUNELAB_CACHE"] = str(folder / "cache")
    EFFORTS["smoke"] = TINY
    if fatal:
        setattr(os, fatal, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    run(sweep, store=Store(folder / "rows"), jobs=1, progress=False)


def started(function: Callable[..., None], *args: Any) -> Any:
    child = CHILDREN.Process(target=function, args=args)
    child.start()
    return child


def finished(child: Any) -> int:
    child.join(60)
    assert child.exitcode is not None, "the child hangs"
    return int(child.exitcode)


def lasting(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in VOLATILE}


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what lasts of the rows in `folder`/rows, once every line was found to be a row, and to be there once."""
    paths = (folder / "rows").glob("*.jsonl")
    keys = [json.loads(line)["key"] for path in paths for line in path.read_text().splitlines()]
    assert len(set(keys)) == len(keys)
    rows = Store(folder / "rows").rows()
    assert all(Experiment.of(row).key == key for key, row in rows.items())
    return {key: lasting(row) for key, row in rows.items()}


def lines(folder: Path) -> int:
    """Count the lines in `folder`/rows."""
    return sum(path.read_bytes().count(b"\n") for path in (folder / "rows").glob("*.jsonl"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], float]:
    """Return the rows of the sweep when nothing happens, and how many seconds that takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert finished(started(record, folder, SWEEP[:1])) == 0  # the server is up
    began = time.perf_counter()
    assert finished(started(record, folder)) == 0
    rows = recorded(folder)
    assert set(rows) == {experiment.key for experiment in SWEEP}
    return rows, time.perf_counter() - began


# --- Processes --------------------------------------------------------------------------------------------------------


def test_a_recording_run_may_be_killed_at_any_moment(
    tmp_path: Path, undisturbed: tuple[dict[str, dict[str, Any]], float]
) -> None:
    rows, seconds = undisturbed
    draw = random.Random(0)
    kills = stores = 0
    left: list[int] = []  # rows that were there after each kill
    while kills < KILLS:
        folder = tmp_path / str(stores)
        goal = lines(folder) + draw.randrange(3)  # what one child leaves, the next goes on with
        child = started(record, folder)
        while child.is_alive() and lines(folder) < goal:  # on a slow machine too, all are hit
            time.sleep(0.001)
        child.join(draw.uniform(0, seconds / len(SWEEP)))
        if child.is_alive():
            child.kill()
        killed = finished(child) == -signal.SIGKILL
        kills += killed
        found = recorded(folder)
        left.append(len(found))
        assert found.items() <= rows.items()
        assert killed or found == rows
        stores += not killed  # a finished sweep has nothing left to disturb
    assert finished(started(record, folder)) == 0
    assert recorded(folder) == rows
    assert len(set(left)) > 1, "the kills hit more than one moment"


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("what", ["weights", "row"])
def test_a_write_may_be_killed_at_every_step(
    tmp_path: Path, undisturbed: tuple[dict[str, dict[str, Any]], float], what: str, moment: str
) -> None:
    rows, _ = undisturbed
    first, second = SWEEP[:1], SWEEP[:2]  # with the network in the cache, the first write is that of a row
    if what == "row":
        assert finished(started(record, tmp_path, first)) == 0
    before = recorded(tmp_path)
    assert finished(started(record, tmp_path, second, moment)) == -signal.SIGKILL
    assert recorded(tmp_path) == before
    assert finished(started(record, tmp_path, second)) == 0
    assert recorded(tmp_path) == {experiment.key: rows[experiment.key] for experiment in second}


def test_two_processes_record_one_sweep(tmp_path: Path, undisturbed: tuple[dict[str, dict[str, Any]], float]) -> None:
    rows, _ = undisturbed
    children = [started(record, tmp_path), started(record, tmp_path)]
    assert [finished(child) for child in children] == [0, 0]
    assert recorded(tmp_path) == rows


def add_rows(folder: Path, numbers: Sequence[int]) -> None:
    for number in numbers:
        Store(folder).add({"key": f"{number:04d}", "dataset": "d", "model": "m", "text": "x" * number})


def test_four_processes_add_rows_at_once(tmp_path: Path) -> None:
    """Each adds 40 rows, 20 of which another one adds too: 100 in all."""
    children = [started(add_rows, tmp_path, range(20 * first, 20 * first + 40)) for first in range(4)]
    assert [finished(child) for child in children] == [0] * 4
    lines = [json.loads(line) for line in (tmp_path / "d-m.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == [f"{number:04d}" for number in range(100)]
    assert all(len(line["text"]) == int(line["key"]) for line in lines)


# --- Disks ------------------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file of this process grow beyond `room` bytes: writing more fails in the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def pictures(folder: Path) -> Path:
    """Return an image folder of two classes."""
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("test", 2)):
        for label in ("oak", "ash"):
            place = folder / split / label
            place.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (8, 8, 3), generator=draw, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(place / f"{number}.png")
    return folder


def network() -> tuple[torch.nn.Module, Plan]:
    net = models.build("convnet-bn", shape=(1, 8, 8), seed=0)
    space = ChannelSpace(net, torch.zeros(1, 1, 8, 8))
    plan = space.plan_for(space.scores("l1"), Budget(0.5))
    return space.shrink(plan), plan


def write_row(folder: Path) -> Path:
    (folder / "rows").mkdir(exist_ok=True)
    run(SWEEP[:1], store=Store(folder / "rows"), jobs=1, progress=False)
    return next((folder / "rows").glob("*.jsonl"))


def write_weights(folder: Path) -> Path:
    experiments.base_network(SWEEP[0])
    return next((folder / "cache" / "weights").glob("*.safetensors"))


def write_decoded(folder: Path) -> Path:
    data.load(str(folder / "trees" if (folder / "trees").exists() else pictures(folder / "trees")))
    return next((folder / "cache" / "data").glob("*.safetensors"))


def write_plan(folder: Path) -> Path:
    network()[1].save(folder / "plan.json")
    return folder / "plan.json"


def write_network(folder: Path) -> Path:
    deploy.save(folder / "net.safetensors", *network(), shape=(1, 8, 8), model="convnet-bn")
    return folder / "net.safetensors"


FILES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "row": (write_row, lambda path: Store(path.parent).rows()),
    "weights": (write_weights, lambda path: experiments.base_network(SWEEP[0])),
    "decoded data": (write_decoded, lambda path: data.load(str(path.parents[2] / "trees"))),
    "plan": (write_plan, Plan.load),
    "network": (write_network, deploy.load),
}
"""What prunelab writes: how, and how it is read."""


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize("what", FILES)
def test_a_full_disk_leaves_nothing_half_written(tiny: None, tmp_path: Path, what: str) -> None:
    write, read = FILES[what]
    if what == "row":
        write_weights(tmp_path)
    if what == "decoded data":
        pictures(tmp_path / "trees")
    before = files(tmp_path)
    with full_disk(100), pytest.raises(OSError, match=r"File too large.*: '.*'"):
        write(tmp_path)
    assert files(tmp_path) == before
    path = write(tmp_path)
    content = path.read_bytes()
    assert len(content) > 100
    read(path)
    if what in ("plan", "network"):  # these are written anew: what was there stays
        with full_disk(100), pytest.raises(OSError, match=f"File too large: '{path}'"):
            write(tmp_path)
        assert path.read_bytes() == content


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Take the right to write from a folder; root, who needs none, is another user for that long."""
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)


def test_a_read_only_cache_serves_what_it_has(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        cache = Path(name)
        monkeypatch.setenv("PRUNELAB_CACHE", name)
        first = experiments.compute(SWEEP[0])
        with read_only(cache):
            assert lasting(experiments.compute(SWEEP[0])) == lasting(first)
            with pytest.raises(PermissionError, match=f"name another folder in PRUNELAB_CACHE: '{name}/weights/.*'"):
                experiments.base_network(SWEEP[3])


@pytest.mark.parametrize("what", ["weights", "decoded data"])
def test_a_cache_that_cannot_be_is_named(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(NotADirectoryError, match=r"PRUNELAB_CACHE.*file/cache"):
        FILES[what][0](tmp_path)
    assert (tmp_path / "file").read_text() == ""


# --- Files that are not what they should be ---------------------------------------------------------------------------


@pytest.mark.parametrize("what", FILES)
def test_a_file_cut_anywhere_is_refused_by_name(
    tiny: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A row is cut inside its line: a store that ends behind a line is a whole one of fewer rows."""
    folder = tmp_path_factory.mktemp("cut")
    monkeypatch.setenv("PRUNELAB_CACHE", str(folder / "cache"))
    write, read = FILES[what]
    path = write(folder)
    whole = path.read_bytes().rstrip(b"\n")

    @settings(max_examples=25)
    @given(st.integers(1 if what == "row" else 0, len(whole) - 1))
    def cut(length: int) -> None:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=path.name):
            read(path)

    cut()
    path.write_bytes(whole)
    read(path)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("what", FILES)
def test_a_pickle_is_refused_and_not_opened(tiny: None, tmp_path: Path, what: str, how: str) -> None:
    write, read = FILES[what]
    path, trap = write(tmp_path), Trap(tmp_path / "sprung")
    if how == "pickle":
        path.write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap, path)
    with pytest.raises(ValueError, match=path.name):
        read(path)
    assert not trap.folder.exists()
    pickle.loads(pickle.dumps(trap))
    assert trap.folder.exists(), "the trap works"


# --- Training ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_nan_gives_no_row_and_takes_none(tiny: None, tmp_path: Path) -> None:
    good, bad = toy("l1"), toy("finetune", lr=1e30)
    reason = r"method='finetune'.*: FloatingPointError: the loss is (nan|inf) at step \d+ .* of Recipe.*lr=1e\+30"
    with pytest.raises(RuntimeError, match=rf"1 of 2 experiments failed, .*\n.*{reason}"):
        run([bad, good], store=Store(tmp_path / "rows"), jobs=1, progress=False)
    assert set(recorded(tmp_path)) == {good.key}


def test_a_dense_network_that_diverges_is_not_kept(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EFFORTS, "smoke", replace(TINY, dense=replace(TINY.dense, epochs=1, lr=1e30)))
    with pytest.raises(RuntimeError, match=r"3 of 3 experiments failed, .*\n.*FloatingPointError: the loss is"):
        run(SWEEP[:3], store=Store(tmp_path / "rows"), jobs=1, progress=False)
    assert not files(tmp_path)


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


NOTEBOOK = """
from prunelab.experiments import Experiment, Store, run
wanted = [Experiment("digits", "convnet-bn", "l1", (), macs, "conv", "smoke", 0) for macs in (0.5, 0.4, 0.3, 0.2)]
def sweep():
    return run(wanted, store=Store({folder!r}), jobs=2, progress=False)
"""


def test_ctrl_c_in_a_cell_leaves_the_kernel_usable(tmp_path: Path) -> None:
    manager = KernelManager(kernel_name="python3")
    environment = os.environ | {"PRUNELAB_CACHE": str(tmp_path / "cache"), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    manager.start_kernel(env=environment)
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)

        def cell(source: str) -> dict[str, Any]:
            content: dict[str, Any] = client.execute_interactive(source, timeout=120, output_hook=seen.append)[
                "content"
            ]
            return content

        seen: list[dict[str, Any]] = []
        assert cell(NOTEBOOK.format(folder=str(tmp_path / "rows")))["status"] == "ok"
        running = client.execute("sweep()", stop_on_error=False)  # else a cell that follows at once is aborted unrun
        while not list((tmp_path / "rows").glob("*.jsonl")):
            assert manager.is_alive()
            time.sleep(0.05)  # until the first row is there
        manager.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=120))["parent_header"].get("msg_id") != running:
            pass
        assert (reply["content"]["status"], reply["content"]["ename"]) == ("error", "KeyboardInterrupt")
        assert 1 <= len(recorded(tmp_path)) < 4

        seen.clear()
        assert cell("1 + 1")["status"] == "ok"
        assert "2" in [m["content"]["data"]["text/plain"] for m in seen if m["msg_type"] == "execute_result"]
        assert cell("found = sweep()\nassert found.key.tolist() == [e.key for e in wanted]")["status"] == "ok"
        assert len(recorded(tmp_path)) == 4
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_link_stays_a_link_and_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "link", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640


def test_a_row_is_added_to_a_file_whose_last_line_lost_its_end(tmp_path: Path) -> None:
    """As `Store.rows` advises to delete damaged lines, and editors may take the last line break along."""
    rows = [{"key": str(number), "dataset": "digits", "model": "convnet-bn"} for number in range(2)]
    store = Store(tmp_path)
    store.add(rows[0])
    path = tmp_path / "digits-convnet-bn.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    store.add(rows[1])
    assert list(store.rows().values()) == rows
