"""What is generated of the pages that readers open: the README's verdict table, and each notebook's verdict on top."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd

from prunelab import claims
from prunelab._files import write_atomically
from prunelab.experiments import Store
from prunelab.report import UNDECIDED, WORDS, headlines, markdown, verdict_table

MARKERS = "<!-- verdicts:begin -->", "<!-- verdicts:end -->"
OPENING = "**Our verdict.**"


def write(root: str | os.PathLike[str], store: Store | None = None) -> None:
    """Write the verdict table into README.md, between its markers, and each paper's verdict into its notebook.

    The latter is the line of the notebook's first cell that begins with `OPENING`.

    Args:
        root: the folder that holds README.md and notebooks/.
        store: as in `prunelab.report.verdict_table`.

    Raises:
        FileNotFoundError: a page is missing.
        ValueError: a page lacks the place for it. In both cases nothing is written.
    """
    for path, text in _generated(Path(root), store).items():
        write_atomically(path, text.encode())


def outdated(root: str | os.PathLike[str], store: Store | None = None) -> list[Path]:
    """Return the pages that `write` would change."""
    generated = _generated(Path(root), store)
    return [path for path, text in generated.items() if path.read_text(encoding="utf-8") != text]


def _generated(root: Path, store: Store | None) -> dict[Path, str]:
    table = verdict_table(store)
    notebooks = [(root / "notebooks" / f"{name}.ipynb", own) for name, own in table.groupby("notebook")]
    readme = root / "README.md"
    return {readme: _with_table(readme, table)} | {path: _with_verdict(path, own) for path, own in notebooks}


def _with_table(path: Path, table: pd.DataFrame) -> str:
    text = path.read_text(encoding="utf-8")
    begin, end = MARKERS
    if begin not in text or end not in text.split(begin, 1)[1]:
        raise ValueError(f"{path} must have the lines {begin} and {end}, in this order")
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    return f"{before}{begin}\n{_verdicts(table)}\n{end}{after}"


def _verdicts(table: pd.DataFrame) -> str:
    """Return what the README says of the claims: how many came out how, the headline of each notebook, then all."""
    papers = claims.load_all()
    undecided = table["measured here"].str.endswith(UNDECIDED).sum()
    linked = table.assign(notebook=[f"[{name}](notebooks/{name}.ipynb)" for name in table.notebook])
    return "\n".join(
        [
            f"{sum(len(paper.claims) for paper in papers)} claims, {len(table)} verdicts, as some claims are put to "
            f"the test in several settings: {_counted(table)}. Of those that do not hold here, {undecided} are "
            "undecided: no interval lies wholly on either side of its bound. The main claim of each notebook:\n",
            markdown(linked.loc[headlines(table).index].drop(columns="setting")),
            f"\n<details><summary>All {len(table)} verdicts, with their settings</summary>\n",
            markdown(linked),
            "\n</details>",
        ]
    )


def _counted(table: pd.DataFrame) -> str:
    counts = table.verdict.value_counts()
    return ", ".join(f"**{word}** {counts.get(word, 0)}" for word in WORDS)


def _with_verdict(path: Path, table: pd.DataFrame) -> str:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    lines = notebook["cells"][0]["source"]
    places = [place for place, line in enumerate(lines) if line.startswith(OPENING)]
    if len(places) != 1:
        raise ValueError(f"the first cell of {path} must have one line that begins with {OPENING}")
    lines[places[0]] = f"{OPENING} {_verdict(table)}\n"
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"  # as Jupyter writes it


def _verdict(table: pd.DataFrame) -> str:
    """Return what a notebook says on top: how its main claim came out, and how many of all its verdicts how."""
    main = headlines(table).iloc[0]
    measured = f" ({main['measured here']})" if main["measured here"] else ""
    return (
        f"*{main.claim}* **{main.verdict.capitalize()}**{measured}, in {main.seeds} seeds of {main.setting}. All "
        f"{len(table)} verdicts of this notebook: {_counted(table)}. A rule in code decides; the outputs below print "
        "them."
    )
