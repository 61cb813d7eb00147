"""The check of a notebook's parameters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from prunelab import data, models, notebook

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"

LEGAL: dict[str, Any] = {
    "DATASET": ("digits", "cifar10"),
    "SEEDS": range(1, 21),
    "BUDGETS": notebook.fractions,
    "LR": float,
}
GOOD: dict[str, Any] = {"DATASET": "digits", "SEEDS": 3, "BUDGETS": [0.5], "LR": 0.1}
IPYTHON = {"In": [""], "Out": {}, "_": "", "_ih": [""], "exit": object(), "quit": object(), "get_ipython": print}


def test_legal_values_pass_beside_what_a_notebook_has_anyway() -> None:
    notebook.parameters({**IPYTHON, "math": math, "fractions": notebook.fractions, "Path": type, **GOOD}, **LEGAL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"DATASET": "mnist"}, r"DATASET = 'mnist': legal values are 'digits', 'cifar10'"),
        ({"SEEDS": 0}, r"SEEDS = 0: it must be an integer from 1 to 20"),
        ({"SEEDS": "3"}, r"SEEDS = '3'"),
        ({"SEEDS": True}, r"SEEDS = True"),
        ({"SEEDS": 3.0}, r"SEEDS = 3\.0"),
        ({"BUDGETS": [2]}, r"BUDGETS = \[2\]: it must be a list of fractions in \(0, 1\]"),
        ({"BUDGETS": ["a"]}, r"BUDGETS = \['a'\]"),
        ({"BUDGETS": []}, r"BUDGETS = \[\]"),
        ({"BUDGETS": [0.5, 0]}, r"BUDGETS = \[0\.5, 0\]"),
        ({"BUDGETS": 0.5}, r"BUDGETS = 0\.5"),
        ({"LR": 1}, r"LR = 1: it must be of type float"),
        ({"SEED": 3}, r"unknown parameter SEED: this notebook has DATASET, SEEDS, BUDGETS, LR"),
        ({"seeds": 3}, r"unknown parameter seeds"),
    ],
)
def test_an_illegal_value_or_an_unknown_name_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        notebook.parameters({**GOOD, **change}, **LEGAL)


def test_what_the_library_takes_a_notebook_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELAB_DATA", str(tmp_path))
    Path(tmp_path, "leaves", "train").mkdir(parents=True)
    legal = {"DATASET": data.LEGAL, "MODEL": models.LEGAL}
    for dataset in (*data.NAMES, "leaves", str(tmp_path / "leaves")):
        notebook.parameters({"DATASET": dataset, "MODEL": "convnet"}, **legal)
    for model in (*models.NAMES, "resnet18", "torchvision/vgg16"):
        notebook.parameters({"DATASET": "digits", "MODEL": model}, **legal)
    for wrong in ("petals", "", 3, None, ["digits"]):
        with pytest.raises(ValueError, match=r"DATASET = .*: it must be one of 'digits', .*, or an image folder"):
            notebook.parameters({"DATASET": wrong, "MODEL": "convnet"}, **legal)
        with pytest.raises(ValueError, match=r"MODEL = .*: it must be one of 'convnet', .* network of torchvision"):
            notebook.parameters({"DATASET": "digits", "MODEL": wrong}, **legal)


@pytest.mark.parametrize("budgets", ["auto", [0.5], [1]])
def test_budgets_may_be_left_to_the_notebook(budgets: object) -> None:
    notebook.parameters({**GOOD, "BUDGETS": budgets}, **{**LEGAL, "BUDGETS": notebook.auto_or_fractions})


@pytest.mark.parametrize("budgets", ["all", "", [], [0], ["auto"], None, 0.5])
def test_budgets_that_are_neither_auto_nor_fractions_are_refused(budgets: object) -> None:
    with pytest.raises(ValueError, match='it must be either "auto" or a list of fractions in'):
        notebook.parameters({**GOOD, "BUDGETS": budgets}, **{**LEGAL, "BUDGETS": notebook.auto_or_fractions})


def test_a_missing_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="parameter LR is missing"):
        notebook.parameters({name: value for name, value in GOOD.items() if name != "LR"}, **LEGAL)


def test_the_setup_cell_can_be_run_again_when_there_are_variables() -> None:
    namespace = dict(GOOD)
    notebook.parameters(namespace, **LEGAL)
    namespace |= {"rows": [1, 2], "accuracy": 90.0}
    notebook.parameters(namespace, **LEGAL)
    with pytest.raises(ValueError, match="SEEDS = 99"):
        notebook.parameters({**namespace, "SEEDS": 99}, **LEGAL)
    with pytest.raises(ValueError, match="unknown parameter SEED"):
        notebook.parameters({**namespace, "SEED": 5}, **LEGAL)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_solutions_are_folded_and_tagged(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    starts = ["".join(cell["source"]).split(maxsplit=2)[:2] for cell in cells]
    exercises = starts.index(["##", "Exercises"])
    solutions = [cell for cell in cells[exercises:] if cell["cell_type"] == "code"]
    assert len(solutions) >= 3
    for cell in solutions:
        assert "solution" in cell["metadata"]["tags"]  # so that nbconvert can leave them out
        assert cell["metadata"]["jupyter"] == {"outputs_hidden": True, "source_hidden": True}
    assert not any("solution" in cell["metadata"].get("tags", ()) for cell in cells[: exercises + 1])
