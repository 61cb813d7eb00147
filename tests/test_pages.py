"""What is generated of the README and the notebooks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prunelab import claims, pages, report
from prunelab.experiments import Store

ROOT = Path(__file__).parent.parent
BEGIN, END = pages.MARKERS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A README to be written, and this repository's notebooks."""
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\noutdated\n{END}\nafter\n")
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    return tmp_path


def test_the_readme_is_rewritten_between_its_markers_only(root: Path) -> None:
    path, store = root / "README.md", Store(root / "results")
    assert path in pages.outdated(root, store)
    pages.write(root, store)
    text = path.read_text()
    table = report.verdict_table(store)
    papers = claims.load_all()
    verdicts, claimed = len(table), sum(len(paper.claims) for paper in papers)
    assert text.startswith(f"before\n{BEGIN}\n{claimed} claims, {verdicts} verdicts, as some claims")
    assert f": **holds** 0, **holds in part** 0, **does not hold here** 0, **not tested here** {verdicts}." in text
    assert all(text.count(f"](notebooks/{name}.ipynb) |") == 1 + n for name, n in table.notebook.value_counts().items())
    assert text.endswith(f"{END}\nafter\n")
    assert "outdated" not in text
    assert pages.outdated(root, store) == []
    path.write_text(text.replace("not tested here", "holds", 1))
    assert pages.outdated(root, store) == [path]


def test_a_notebook_gets_its_verdict_and_nothing_else(root: Path) -> None:
    """Here with no rows at all; those of the repository have a line of their own."""
    path = root / "notebooks" / "02_filter_pruning.ipynb"
    before = json.loads(path.read_text(encoding="utf-8"))
    pages.write(root, Store(root / "results"))
    text = path.read_text(encoding="utf-8")
    after = json.loads(text)
    (line,) = {*after["cells"][0]["source"]} - {*before["cells"][0]["source"]}
    main = next(claim for claim in claims.load("02").claims if claim.headline)
    assert line.startswith(f"**Our verdict.** *{main.text}* **Not tested here**, in 0 seeds of convnet-bn on cifar10")
    (old,) = {*before["cells"][0]["source"]} - {*after["cells"][0]["source"]}
    assert text.count(json.dumps(line, ensure_ascii=False)) == 1
    restored = text.replace(json.dumps(line, ensure_ascii=False), json.dumps(old, ensure_ascii=False))
    assert restored == (ROOT / "notebooks" / path.name).read_text(encoding="utf-8")


def test_the_verdict_of_a_notebook_is_that_of_its_table() -> None:
    table = report.verdict_table(Store(ROOT / "results"))
    own = table[table.notebook == "12_showdown"]
    first = json.loads((ROOT / "notebooks" / "12_showdown.ipynb").read_text(encoding="utf-8"))["cells"][0]["source"]
    (line,) = [line for line in first if line.startswith(pages.OPENING)]
    assert own.iloc[0]["measured here"] in line
    assert f"**{own.iloc[0].verdict.capitalize()}**" in line
    assert f"All {len(own)} verdicts of this notebook: **holds** {(own.verdict == 'holds').sum()}," in line


@pytest.mark.parametrize("page", ["README.md", "notebooks/14_transfer.ipynb"])
def test_pages_without_a_place_for_it_are_refused_and_nothing_is_written(root: Path, page: str) -> None:
    text = (root / page).read_text(encoding="utf-8")
    (root / page).write_text(text.replace(END, "").replace(pages.OPENING, "Verdict:"), encoding="utf-8")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"README.md must have the lines|the first cell of .*14_transfer.ipynb must have"
    ):
        pages.write(root, Store(root / "results"))
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_the_pages_of_this_repository_are_current() -> None:
    assert pages.outdated(ROOT, Store(ROOT / "results")) == [], "run: prunelab report --write"
