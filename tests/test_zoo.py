"""The zoo: what is kept measures what its row says, here on the digits, and in the repository's own folder."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prunelab import cost, data, deploy, zoo
from prunelab.experiments import EFFORTS, Effort, Experiment, Store, compute, loaded, one_thread
from prunelab.training import evaluate

MEGABYTES = 25
TOY = Experiment("digits", "convnet-bn", "l1", (), 0.25, "conv", "smoke", 0)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A cache of its own, an effort of a few steps, and the rows of two experiments."""
    monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path / "cache"))
    smoke = EFFORTS["smoke"]
    monkeypatch.setitem(EFFORTS, "smoke", Effort(replace(smoke.dense, epochs=0.5), replace(smoke.after, epochs=0.5)))
    store = Store(tmp_path / "rows")
    for experiment in (TOY, TOY.base):
        store.add(compute(experiment))
    return store


@pytest.mark.parametrize("experiment", [TOY, TOY.base], ids=["pruned", "dense"])
def test_a_kept_network_measures_what_its_row_says(experiment: Experiment, store: Store, tmp_path: Path) -> None:
    written = zoo.keep(experiment, tmp_path / "zoo", store)
    assert written == zoo.path(experiment, tmp_path / "zoo")
    row, images = store.rows()[experiment.key], loaded("digits")
    net = zoo.load(experiment, tmp_path / "zoo")
    with one_thread():
        assert round(evaluate(net, images, "test"), 4) == zoo.recorded_accuracy(row)
    assert cost.parameters(net) == row["parameter_count"]
    assert cost.macs(net, images.example) == row["macs_all"]


def test_what_does_not_measure_what_its_row_says_is_not_kept(store: Store, tmp_path: Path) -> None:
    (path,) = store.folder.glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"test_tuned": line["test_tuned"] + 1}) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"its row has .* it is not kept"):
        zoo.keep(TOY, tmp_path / "zoo", store)
    with pytest.raises(ValueError, match="there is no row of Experiment"):
        zoo.keep(replace(TOY, seed=1), tmp_path / "zoo", store)
    assert not (tmp_path / "zoo").exists()
    with pytest.raises(FileNotFoundError):
        zoo.load(TOY, tmp_path / "zoo")


def test_the_zoo_has_a_dense_network_per_seed_and_one_of_every_method() -> None:
    found = zoo.entries()
    assert [e.seed for e in found if e.method == "dense"] == [0, 1, 2, 3, 4]
    pruned = [e for e in found if e.method != "dense"]
    assert {(e.seed, e.macs, e.scope) for e in pruned} == {(0, 0.25, "conv")}
    assert len({e.method for e in pruned}) == len(pruned) >= 14


HERE = [e for e in zoo.entries() if zoo.path(e).exists()]


def test_the_repositorys_zoo_is_small_and_has_nothing_else() -> None:
    files = [path for path in zoo.FOLDER.rglob("*") if path.is_file()]
    assert {*files} == {zoo.path(e) for e in HERE}
    assert sum(path.stat().st_size for path in files) < MEGABYTES * 1e6


@pytest.mark.parametrize("experiment", HERE, ids=lambda e: f"{e.method}-{e.seed}")
def test_a_network_of_the_repositorys_zoo_is_its_rows(experiment: Experiment) -> None:
    row, net = Store().rows()[experiment.key], zoo.load(experiment)
    example = torch.zeros(1, 3, 32, 32)
    dense = experiment.method == "dense"
    assert cost.parameters(net) == row["dense_parameter_count" if dense else "parameter_count"]
    assert cost.macs(net, example) == row["dense_macs_all" if dense else "macs_all"]
    if not os.environ.get("PRUNELAB_DATA"):
        pytest.skip(f"PRUNELAB_DATA names no folder with {experiment.dataset}")
    images = data.load(experiment.dataset)
    if images.digest[:16] != row["data_digest"]:
        pytest.skip(f"these are other images of {experiment.dataset} than the row's")
    with one_thread():
        assert round(evaluate(net, images, "test"), 4) == zoo.recorded_accuracy(row)


def test_a_file_of_the_zoo_says_how_it_was_cut(store: Store, tmp_path: Path) -> None:
    """No dense network is needed to load it, and what is saved again is the same file."""
    written = zoo.keep(TOY, tmp_path / "zoo", store)
    before, net = written.read_bytes(), deploy.load(written)
    assert zoo.keep(TOY, tmp_path / "zoo", store).read_bytes() == before
    assert sum(p.numel() for p in net.parameters()) == store.rows()[TOY.key]["parameter_count"]
