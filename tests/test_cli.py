"""The command line, on a small repository of its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from prunelab import __main__ as cli
from prunelab.experiments import EFFORTS, Effort, Experiment, Store, compute

DENSE = Experiment("digits", "convnet-bn", "dense", effort="smoke")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository with two notebooks, an empty store and an empty cache."""
    for name, value in (("01_spp", "LOUD = 1"), ("77_toy", "TOY = 1")):
        setting = nbformat.v4.new_code_cell(value, metadata={"tags": ["parameters"]})
        check = nbformat.v4.new_code_cell(
            "from prunelab import notebook\nnotebook.parameters(globals(), TOY=range(1, 10))\nprint('TOY is', TOY)"
        )
        book = nbformat.v4.new_notebook(cells=[setting, check])
        book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        nbformat.write(book, tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(cli, "REPOSITORY", tmp_path)
    monkeypatch.setenv("PRUNELAB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    monkeypatch.delenv("PRUNELAB_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    tiny = Effort(replace(EFFORTS["smoke"].dense, epochs=2), replace(EFFORTS["smoke"].after, epochs=1))
    monkeypatch.setitem(EFFORTS, "smoke", tiny)
    return tmp_path


def call(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def test_list_shows_notebooks_claims_and_verdicts(repository: Path) -> None:
    shown = call("list")
    assert shown.exit_code == 0
    assert "77_toy" in shown.stdout
    assert "A pruning probability that can fall again" in shown.stdout
    assert "not tested here" in shown.stdout


def test_report_writes_the_pages_only_when_asked(repository: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "notebooks", repository / "notebooks", dirs_exist_ok=True)
    pages = repository / "README.md", repository / "notebooks" / "01_spp.ipynb"
    pages[0].write_text("<!-- verdicts:begin -->\n<!-- verdicts:end -->\n")
    assert call("report").exit_code == 0
    assert not any("not tested here** 5" in page.read_text() for page in pages)
    assert call("report", "--write").exit_code == 0
    assert "| **not tested here** |" in pages[0].read_text()
    assert "**not tested here** 5." in pages[1].read_text()


def test_doctor_finds_a_damaged_store_and_a_missing_folder(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("doctor").exit_code == 0
    (repository / "results").mkdir()
    (repository / "results" / "x.jsonl").write_text("{}\n")
    monkeypatch.setenv("PRUNELAB_DATA", str(repository / "nowhere"))
    monkeypatch.setattr("prunelab.__main__.console", Console(width=500))  # so that no message is broken into lines
    shown = call("doctor")
    assert shown.exit_code == 1
    assert "x.jsonl, line 1 is not a row" in shown.stdout
    assert "nowhere is not a folder" in shown.stdout


def test_what_stands_in_brackets_is_shown_as_it_is(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "data" / "a[" / "b]").mkdir(parents=True)
    monkeypatch.setenv("PRUNELAB_DATA", str(repository / "data"))
    (repository / "data" / "a[").rename(repository / "data" / "[x] [")
    monkeypatch.setattr("prunelab.__main__.find_spec", lambda name: None)
    monkeypatch.setattr("prunelab.__main__.console", Console(width=500))
    shown = call("doctor").stdout
    assert "[x] [" in shown
    assert "pip install -e '.[notebooks]'" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["99"], "unknown notebook '99': there are 01_spp, 77_toy"),
        (["77", "-p", "SEED", "3"], "unknown parameter SEED: 77_toy has TOY"),
        (["77", "01", "-p", "SEED", "3"], "unknown parameter SEED: 01_spp has LOUD; 77_toy has TOY"),
        (["77", "-p", "TOY"], "-p needs a name and a value"),
        (["--frehs", "77"], "unknown notebook '--frehs'"),
        (["-p", "TOY", "3"], "name a notebook, or all"),
        (["77", "--fresh", "--out", "."], "--fresh would delete the recorded rows"),
        (["77", "--out", "notebooks"], "--out is notebooks, where the notebooks are"),
    ],
)
def test_run_refuses_before_anything_runs(repository: Path, words: list[str], message: str) -> None:
    (repository / "results").mkdir()
    (repository / "results" / "digits.jsonl").write_text("")
    shown = call("run", *words)
    assert shown.exit_code == 2
    assert shown.stderr.startswith("error: ")
    assert message in shown.stderr
    assert not list(repository.glob("**/77_toy.html"))
    assert (repository / "results" / "digits.jsonl").exists()


def test_run_executes_a_notebook_with_the_parameters_and_a_fresh_store(repository: Path) -> None:
    old = repository / "build" / "results" / "old.jsonl"
    old.parent.mkdir(parents=True)
    old.write_text("left over")
    shown = call("run", "77", "-p", "TOY", "7", "--fresh")
    assert shown.exit_code == 0, shown.output
    assert "TOY is 7" in (repository / "build" / "77_toy.html").read_text()
    assert not old.exists()


def test_run_ends_with_the_notebooks_own_error(repository: Path) -> None:
    shown = call("run", "77", "-p", "TOY", "70")
    assert shown.exit_code == 1
    assert "ValueError: TOY = 70: it must be an integer from 1 to 9" in shown.stderr


def test_verify_passes_a_true_row_and_fails_a_false_one(repository: Path) -> None:
    store = Store()
    true = compute(DENSE)
    store.add(true)
    assert "nothing to verify among 0 recorded rows" in call("verify", "--dataset", "cifar10").stderr
    shown = call("verify", "--dataset", "digits", "--all")
    assert shown.exit_code == 0
    assert "1 identical, 0 close, 0 differs: 1 of 1 recorded rows" in shown.stdout
    (path,) = store.folder.glob("*.jsonl")
    path.write_text(json.dumps(true | {"test_tuned": true["test_tuned"] - 1}) + "\n")
    shown = call("verify")
    assert shown.exit_code == 1
    assert "differs" in shown.stdout


def test_verify_allows_what_two_seeds_differ_by(repository: Path) -> None:
    true = compute(DENSE)
    wrong = true["test_tuned"] - 1
    drawn = {s: cli.random.Random(s).sample(sorted(replace(DENSE, seed=n).key for n in range(4)), 1) for s in range(99)}
    chosen = next(s for s, keys in drawn.items() if keys == [DENSE.key])
    for gap, code in ((0.4, 0), (0.2, 1)):  # t(3 degrees of freedom) = 3.182: 3.182·√2·gap·√(2/3) = 1.47 and 0.73
        found = {0: wrong, 1: wrong - gap, 2: wrong, 3: wrong + gap}
        rows = [true | {"key": replace(DENSE, seed=n).key, "seed": n, "test_tuned": found[n]} for n in found]
        Store().folder.mkdir(exist_ok=True)
        (Store().folder / "digits-convnet-bn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert call("verify", "--sample", "1", "--seed", str(chosen)).exit_code == code


def test_the_spread_over_seeds_is_pooled_over_what_is_alike() -> None:
    arm = replace(DENSE, method="l1", macs=0.5, scope="conv")
    other = replace(arm, method="random")
    alike = {replace(arm, seed=n): 70.0 + n for n in range(3)} | {replace(other, seed=n): 80.0 for n in range(3)}
    tighter = {replace(arm, macs=0.25, seed=n): 50.0 + 9 * n for n in range(3)}
    longer = {replace(arm, effort="brief", seed=n): 50.0 + 9 * n for n in range(3)}
    # s² = (2 + 0) / 4 with t(4 degrees of freedom) = 2.776: 2.776·√(2·½)
    assert cli._between_seeds(arm, alike | tighter | longer) == pytest.approx(2.776, abs=5e-4)
    assert cli._between_seeds(replace(other, seed=7), alike) == cli._between_seeds(arm, alike)
    assert cli._between_seeds(arm, {arm: 70.0, other: 80.0}) == 0


def test_verify_names_what_cannot_be_verified(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing to verify among 0 recorded rows" in call("verify").stderr
    absent = replace(DENSE, dataset="flowers17")
    row = {"key": absent.key, "parameters": {}, "test_tuned": 50.0}
    row |= {"dataset": "flowers17", "model": "convnet-bn", "method": "dense", "macs": 1.0, "scope": "all"}
    row |= {"effort": "smoke", "seed": 0, "data_digest": "8ef740931490dd80"}
    Store().add(row)
    moved = replace(DENSE, pretrained="flowers17")
    Store().add(row | {"key": moved.key, "dataset": "digits", "pretrained": "flowers17"})
    others = row | {"key": DENSE.key, "dataset": "digits", "data_digest": "0123456789abcdef", "data_source": "a copy"}
    Store().add(others)
    shown = call("verify", "--all")
    assert shown.exit_code == 2
    assert shown.stdout.count("flowers17 is not at hand") == 2
    assert "recorded on other images (a copy) than those at hand (scikit-learn" in shown.stdout
    assert "unknown notebook" not in shown.stderr
    assert "no claims for notebook '99'" in call("verify", "99").stderr


def test_notebooks_are_given_paths_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    words = ["00", "-p", "DATASET", "./pictures", "-p", "MODEL", "torchvision/vgg16", "-p", "SEED", "3"]
    given = {"DATASET": str((tmp_path / "pictures").resolve()), "MODEL": "torchvision/vgg16", "SEED": 3}
    assert cli._parse(words) == (["00"], given)
