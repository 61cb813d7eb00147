"""Experiments run live on the digits data: keys, the store, what is computed and what is not."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import prunelab
from prunelab import data, experiments, models
from prunelab.experiments import EFFORTS, Effort, Experiment, Store, compute, one_thread, run
from prunelab.methods import METHODS, Pruned
from prunelab.structure import Budget, ChannelSpace
from prunelab.training import Context, Recipe, fit

SPP = Experiment("digits", "convnet-bn", "spp", (("t", 1), ("margin", 0.1)), 0.5, "conv", "smoke", 0)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give every test its own cache, and an effort of a few steps."""
    monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path / "cache"))
    after = replace(EFFORTS["smoke"].after, epochs=1)
    monkeypatch.setitem(EFFORTS, "smoke", Effort(replace(EFFORTS["smoke"].dense, epochs=0.5), after))
    yield


def toy(method: str = "l1", macs: float = 0.5, seed: int = 0, **parameters: Any) -> Experiment:
    scope = "all" if method == "dense" else "conv"
    return Experiment("digits", "convnet-bn", method, tuple(parameters.items()), macs, scope, "smoke", seed)  # type: ignore[arg-type]


def row(key: str, seed: int = 0) -> dict[str, Any]:
    return {"key": key, "dataset": "digits", "model": "convnet-bn", "seed": seed}


def test_a_key_never_changes() -> None:
    # every recorded row is filed under such a key
    assert SPP.key == "1e4c9f90965d7fc9"
    assert SPP.base.key == "13fe92c24805c37c"


def test_an_effort_with_recorded_rows_never_changes() -> None:
    # a key holds the effort's name, so another schedule needs another name
    assert EFFORTS["brief"] == Effort(Recipe(epochs=6, lr=0.1), Recipe(epochs=2, lr=0.03))


def test_a_key_is_of_the_values_not_of_how_they_are_written() -> None:
    assert replace(SPP, parameters=(("margin", 0.1), ("t", 1))).key == SPP.key
    assert replace(SPP, parameters={"t": 1, "margin": 0.1}).key == SPP.key  # type: ignore[arg-type]
    assert toy("dense", 1).key == toy("dense", 1.0).key
    assert toy("slimming", penalty=1).key == toy("slimming", penalty=1.0).key
    assert toy("spp", t=1) == SPP.__class__.of({"key": toy("spp", t=1).key, **toy("spp", t=1).settings})


def test_every_field_changes_the_key() -> None:
    changes: dict[str, Any] = {"dataset": "mnist", "model": "convnet", "macs": 0.25, "scope": "all", "effort": "brief"}
    changes |= {"seed": 1, "parameters": ()}
    keys = {replace(SPP, **{field: value}).key for field, value in changes.items()}
    keys.add(Experiment("digits", "convnet-bn", "l1", (), 0.5, "conv", "smoke", 0).key)
    assert len(keys | {SPP.key}) == len(changes) + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic': legal names are"),
        ({"parameters": (("tt", 1),)}, "method 'spp' has no parameter tt: it has"),
        ({"parameters": (("t", 0),)}, "t is 0"),
        (
            {"effort": "huge"},
            "experiment: effort is 'huge'; it must be one of 'smoke', 'brief', 'transfer', 'short', 'full'",
        ),
        ({"seed": -1}, "experiment: seed is -1; it must be an integer >= 0"),
        ({"seed": 0.5}, "experiment: seed is 0.5"),
        ({"macs": 0.0}, "macs"),
        ({"macs": 1.5}, "macs"),
        ({"scope": "linear"}, "scope"),
    ],
)
def test_an_illegal_experiment_cannot_be_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SPP, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "no-such-data"}, "unknown data set 'no-such-data'"),
        ({"model": "no-net"}, "unknown network 'no-net'"),
    ],
)
def test_run_refuses_an_unknown_name_before_any_work(
    tiny: None, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run([toy(), replace(toy(), **change)], store=Store(tmp_path / "rows"), jobs=1, progress=False)  # type: ignore[arg-type]
    assert not (tmp_path / "rows").exists()
    assert not (tmp_path / "cache" / "weights").exists()


def test_the_store_keeps_rows_by_key_and_adds_none_twice(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.rows() == {}
    for key, seed in (("a", 0), ("b", 1), ("a", 2)):
        store.add(row(key, seed))
    assert store.rows() == {"a": row("a", 0), "b": row("b", 1)}
    assert (tmp_path / "digits-convnet-bn.jsonl").read_text().splitlines() == [
        json.dumps(row("a", 0)),
        json.dumps(row("b", 1)),
    ]


def test_an_interrupted_write_leaves_the_rows_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.add(row("a"))

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        store.add(row("b"))
    assert store.rows() == {"a": row("a")}
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]


@pytest.mark.parametrize("damage", ['{"key": "b", "da', "[]", "{}", "\x00\x00"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    store.add(row("a"))
    path = tmp_path / "digits-convnet-bn.jsonl"
    path.write_text(path.read_text() + damage + "\n")
    with pytest.raises(ValueError, match=r"digits-convnet-bn\.jsonl, line 2 is not a row"):
        store.rows()


def test_only_what_is_missing_is_computed(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "rows")
    wanted = [toy("dense", 1.0), toy(macs=0.5), toy(macs=0.25), toy(macs=0.5)]
    trained, computed = [], []
    fit, full = experiments.fit, experiments.compute

    def count_fit(net: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        trained.append(args[1])
        return fit(net, *args, **kwargs)

    def count(experiment: Experiment) -> Any:
        computed.append(experiment)
        return full(experiment)

    monkeypatch.setattr(experiments, "fit", count_fit)
    monkeypatch.setattr(experiments, "compute", count)
    first = run(wanted[:2], store=store, jobs=1, progress=False)
    assert trained.count(EFFORTS["smoke"].dense) == 1  # the network that both start from
    both = run(wanted, store=store, jobs=1, progress=False)
    assert computed == wanted[:3]
    assert trained.count(EFFORTS["smoke"].dense) == 1
    assert both.key.tolist() == [experiment.key for experiment in wanted[:3]]
    assert both.iloc[:2].to_dict("records") == first.to_dict("records")
    assert Store(tmp_path / "rows").rows().keys() == set(both.key)


def test_side_by_side_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [toy("dense", 1.0), toy(macs=0.25)]
    found = []
    for jobs in (1, 2):
        monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path / f"cache{jobs}"))
        found.append(run(wanted, store=Store(tmp_path / f"rows{jobs}"), jobs=jobs, progress=False))
    alone, together = (
        rows.drop(columns=["seconds", "seconds_pruning", "date", "code"]).to_dict("records") for rows in found
    )
    assert alone == together


@pytest.mark.parametrize(
    "experiment", [toy("dense", 1.0), toy(), toy("spp", t=1, margin=0.1), toy("taylor", updates=3)]
)
def test_every_method_spends_the_same_effort_and_meets_the_budget(tiny: None, experiment: Experiment) -> None:
    found = compute(experiment)
    images = data.load("digits")
    one_step = EFFORTS["smoke"].after.batch_size / len(images.train.labels)
    assert found["epochs"] == pytest.approx(EFFORTS["smoke"].after.epochs, abs=1.5 * one_step)
    assert 0 <= found["epochs_pruning"] <= found["epochs"]
    kept = found["macs_conv"] / found["dense_macs_conv"]
    space, budget = ChannelSpace(models.build("convnet-bn", shape=images.shape), images.example), Budget(0.5, "conv")
    filters = [1 - space.spent(budget)(space.widths({g.name: g.size - 1})) for g in space.groups]
    assert experiment.macs - max(filters) < kept <= experiment.macs  # which filters go last depends on the machine
    assert (found["parameter_count"] < found["dense_parameter_count"]) == (experiment.macs < 1)
    assert found["data_digest"] == images.digest[:16]
    assert Experiment.of(json.loads(json.dumps(found))) == experiment


def test_a_method_may_go_back_to_the_start_and_train_as_its_paper_says(
    tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Context] = []

    @dataclass(frozen=True)
    class FromScratch:
        name: ClassVar[str] = "toy-scratch"

        def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
            seen.append(context)
            assert context.initial is not None and context.dense is not None
            plan = ChannelSpace(net, context.data.example).plan({})
            return Pruned(copy.deepcopy(context.initial), plan, recipe=context.dense)

    monkeypatch.setitem(METHODS, FromScratch.name, FromScratch)
    found = compute(toy("toy-scratch"))
    (context,) = seen
    assert context.initial is not None and context.dense == EFFORTS["smoke"].dense
    assert found["epochs"] == pytest.approx(context.dense.epochs, abs=0.02)
    # the dense network's training from there gives the dense network
    with one_thread():
        fit(context.initial, context.data, context.dense, seed=0, progress=False)
    dense = experiments.base_network(toy()).state_dict()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in context.initial.state_dict().items())


def test_a_row_is_its_experiments_only_unchanged(tiny: None) -> None:
    found = compute(toy("dense", 1.0))
    with pytest.raises(ValueError, match="was changed by hand"):
        Experiment.of(found | {"seed": 1})
    with pytest.raises(ValueError, match="'effort' is missing"):
        Experiment.of({name: value for name, value in found.items() if name != "effort"})


def test_damaged_weights_are_named(tiny: None, tmp_path: Path) -> None:
    experiments.base_network(toy())
    (path,) = (tmp_path / "cache" / "weights").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged .* delete it"):
        experiments.base_network(toy())


def test_the_number_of_threads_is_given_back(tiny: None) -> None:
    before = torch.get_num_threads()
    compute(toy("dense", 1.0))
    assert torch.get_num_threads() == before


def test_a_transferred_network_keeps_all_but_its_last_layer(tiny: None) -> None:
    moved = replace(toy("dense", 1.0), dataset="digits-5-9", pretrained="digits-0-4")
    assert moved.source == replace(toy("dense", 1.0), dataset="digits-0-4")
    source = experiments.base_network(moved.source).state_dict()
    before = experiments._untrained(moved, data.load("digits-5-9")).state_dict()
    drawn = experiments._drawn(moved, data.load("digits-5-9")).state_dict()
    for name, tensor in before.items():
        assert torch.equal(tensor, drawn[name] if name.startswith("linear") else source[name])
    for name in ("digits-0-4", "digits-5-9"):  # either may change under its name
        assert data.load(name).digest[:8] in experiments._weights_path(moved).name
    found = compute(replace(toy(), dataset="digits-5-9", pretrained="digits-0-4"))
    assert found["pretrained"] == "digits-0-4"
    assert Experiment.of(json.loads(json.dumps(found))).pretrained == "digits-0-4"


def test_a_network_for_other_images_is_not_transferred(tiny: None, tmp_path: Path) -> None:
    moved = replace(toy(), pretrained="flowers17", dataset="digits")
    with pytest.raises(ValueError, match=r"conv1.weight is \[32, 1, 5, 5\], but is \[32, 3, 5, 5\] in the network"):
        models.transfer(models.build("convnet-bn", shape=(1, 8, 8)), models.build("convnet-bn"))
    with pytest.raises(ValueError, match="SqueezeNet cannot be transferred: it has no linear layer"):
        models.transfer(models.build("squeezenet1_0"), models.build("squeezenet1_0"))
    with pytest.raises((ValueError, FileNotFoundError)):
        run([moved], store=Store(tmp_path / "rows"), jobs=1, progress=False)
    assert not (tmp_path / "rows").exists()


def test_the_effort_of_the_first_data_set() -> None:
    assert EFFORTS["transfer"] == Effort(
        Recipe(epochs=30, lr=0.05, batch_size=32), Recipe(epochs=12, lr=0.02, batch_size=32), "brief"
    )
    moved = Experiment("flowers17", "convnet-bn", "l1", (), 0.25, "conv", "transfer", 1, "cifar10")
    assert moved.source == Experiment("cifar10", "convnet-bn", "dense", effort="brief", seed=1)
    assert replace(moved, pretrained=None).source is None
    assert replace(moved, pretrained=None).key != moved.key


def test_a_row_names_the_commit_of_prunelab_and_whether_its_code_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    code, row = tmp_path / "prunelab" / "experiments.py", tmp_path / "results" / "rows.jsonl"
    for file in (code, row):
        file.parent.mkdir()
        file.write_text("\n")
    monkeypatch.setattr(experiments, "__file__", str(code))
    version = experiments._code_version.__wrapped__
    assert version() == prunelab.__version__
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert version() == f"{prunelab.__version__}+{commit.strip()}"
    row.write_text("a row that came in\n")
    assert version() == f"{prunelab.__version__}+{commit.strip()}"
    code.write_text("changed\n")
    assert version() == f"{prunelab.__version__}+{commit.strip()}-dirty"


def test_installed_inside_another_project_it_names_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(experiments, "__file__", str(tmp_path / "lib" / "prunelab" / "experiments.py"))
    assert experiments._code_version.__wrapped__() == prunelab.__version__
