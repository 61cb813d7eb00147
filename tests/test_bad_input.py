"""Bad input: every public function and every notebook parameter names the input and what is legal. See README.md."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from prunelab import claims, cost, data, deploy, experiments, models, scores, training
from prunelab.experiments import Experiment
from prunelab.methods import METHODS, build
from prunelab.structure import Budget, ChannelSpace, ColumnSpace, Plan
from prunelab.training import Recipe

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9][0-9]_*.ipynb"))

# What no setting of prunelab may be, whatever its kind.
NEVER = st.one_of(
    st.sampled_from([math.nan, -math.inf, -1, -0.5, 2.5j, "", "no such name", b"1", [], [1], (), {1: 2}, {"a": "b"}]),
    st.sampled_from([object(), print, int, torch.ones(2), torch.tensor(math.nan), -(10**400), Fraction(-1, 3)]),
    st.floats(max_value=-1e-9, allow_nan=False),
    st.integers(max_value=-1),
    st.text().filter(lambda text: text not in LEGAL_TEXTS),
    st.binary(),
)


def _texts(hint: object) -> set[str]:
    """Return the texts that a type names: those of its `Literal`s."""
    return {hint} if isinstance(hint, str) else set().union(*map(_texts, get_args(hint)))


# Hypothesis draws texts from the source too, so what is legal somewhere must be left out by name.
LEGAL_TEXTS = {*METHODS, *experiments.EFFORTS}.union(
    *(
        _texts(hint)
        for kind in (Recipe, Budget, Experiment, *METHODS.values())
        for hint in get_type_hints(kind).values()
    )
)


def refused(call: Callable[[], object], *names: str) -> str:
    """Return the message of the ValueError that a call ends with, which has one of the names in it."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert any(name in message for name in names), message
    return message


# --- Settings ---------------------------------------------------------------------------------------------------------


MAKERS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "Recipe": (Recipe, {"epochs": 1.0, "lr": 0.1}),
    "Budget": (Budget, {"macs": 0.5}),
    "Plan": (Plan, {"space": "channels", "sizes": {"a": 2}, "keep": {"a": (0,)}}),
    "Experiment": (Experiment, {"dataset": "digits", "model": "convnet-bn", "method": "dense"}),
} | {name: (method, {}) for name, method in METHODS.items()}

ANYTHING_GOES = {  # (class, field): the bad values that are legal there
    ("dmcp", "alpha"): lambda value: math.isfinite(float(value)) and not isinstance(value, str | bytes | torch.Tensor),
    ("Plan", "space"): lambda value: isinstance(value, str),  # the space that is given the plan refuses it
    ("Experiment", "dataset"): lambda value: isinstance(value, str),  # `run` looks for it
    ("Experiment", "model"): lambda value: isinstance(value, str),  # `run` builds it
    ("Experiment", "pretrained"): lambda value: isinstance(value, str),
    ("Experiment", "parameters"): lambda value: len(value) == 0,  # none
    ("Recipe", "milestones"): lambda value: value in ((), []),  # none
}


def legal_anyway(name: str, field: str, value: object) -> bool:
    """Whether a value that is bad elsewhere is none here."""
    if value == {} and field in ("ratios", "rates", "multipliers"):
        return True
    try:
        return bool(ANYTHING_GOES.get((name, field), lambda _: False)(value))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field.name) for name, (maker, _) in MAKERS.items() for field in dataclasses.fields(maker)],  # type: ignore[arg-type]
)
def test_a_field_refuses_what_it_cannot_be(name: str, field: str) -> None:
    maker, legal = MAKERS[name]

    @settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
    @given(NEVER.filter(lambda value: not legal_anyway(name, field, value)))
    def attempt(value: object) -> None:
        refused(lambda: maker(**{**legal, field: value}), field.removesuffix("s"), *CALLED.get(field, ()))

    attempt()


WRONG = {  # by the type of a field: values of which Python itself would take some for legal
    "int": [True, 1.5, "1", None],
    "float": [True, "1", None],
    "bool": [0, 1, "yes", None],
    "int | None": [True, 1.5, "1"],
    "float | None": [True, "1"],
}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        (name, field.name, value)
        for name, (maker, _) in MAKERS.items()
        for field in dataclasses.fields(maker)  # type: ignore[arg-type]
        for value in WRONG.get(str(field.type), ())
    ],
)
def test_numbers_are_numbers(name: str, field: str, value: object) -> None:
    """True is not 1, "1" is not 1, and a count is not 1.5."""
    maker, legal = MAKERS[name]
    refused(lambda: maker(**{**legal, field: value}), field)


def test_the_name_of_a_parameter_is_no_surprise(tmp_path: Path) -> None:
    """Not even that of an argument of the function that takes it."""
    with pytest.raises(ValueError, match="method 'l1' has no parameter name"):
        Experiment("digits", "convnet-bn", "l1", {"name": 1})  # type: ignore[arg-type]
    net = models.build("convnet-bn", shape=(1, 8, 8))
    plan = ChannelSpace(net, torch.zeros(1, 1, 8, 8)).plan({})
    with pytest.raises(ValueError, match=r"unknown argument seed: models\.build is given classes and width"):
        deploy.save(tmp_path / "net.safetensors", net, plan, shape=(1, 8, 8), model="convnet-bn", seed=3)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_no_other_field(name: str) -> None:
    assert "no_such_field" in refused(lambda: build(name, no_such_field=1), name)


# --- Functions --------------------------------------------------------------------------------------------------------


SHAPE = (1, 8, 8)
EXAMPLE = torch.zeros(1, *SHAPE)
digits = cache(lambda: data.load("digits"))
net = cache(lambda: models.build("convnet-bn", shape=SHAPE, seed=0))
space = cache(lambda: ChannelSpace(net(), EXAMPLE))
RECIPE = Recipe(epochs=0, lr=0.1)

FUNCTIONS: dict[str, tuple[Callable[..., object], Callable[[], dict[str, Any]], set[str]]] = {
    "ChannelSpace": (ChannelSpace, lambda: {"net": net(), "example": EXAMPLE}, {"net", "example"}),
    "ColumnSpace": (ColumnSpace, lambda: {"net": net(), "example": EXAMPLE}, {"net", "example"}),
    "Budget.at": (Budget(0.5).at, lambda: {"fraction": 0.5}, {"fraction"}),
    "Space.macs": (lambda **k: space().macs(**k), dict, {"scope"}),
    "Space.plan": (lambda **k: space().plan(**k), lambda: {"keep": {}}, {"keep"}),
    "Space.plan_for": (
        lambda **k: space().plan_for(**k),
        lambda: {"scores": space().scores("l1"), "target": Budget(0.5)},
        {"scores", "target", "ranking"},
    ),
    "Space.shrink": (lambda **k: space().shrink(**k), dict, {"plan"}),
    "Space.mask": (lambda **k: space().mask(**k), dict, {"plan"}),
    "methods.build": (lambda name: build(name), lambda: {"name": "l1"}, {"name"}),
    "data.load": (data.load, lambda: {"name": "digits"}, {"name", "image_size"}),
    "data.from_datasets": (
        data.from_datasets,
        lambda: {"train": TensorDataset(*digits().val), "test": TensorDataset(*digits().val), "name": "own"},
        {"train", "test", "val", "classes"},
    ),
    "Data.batches": (
        lambda **k: digits().batches(**k),
        lambda: {"split": "train", "batch_size": 8},
        {"split", "batch_size", "generator"},
    ),
    "Data.normalise": (lambda **k: digits().normalise(**k), dict, {"images"}),
    "models.build": (models.build, lambda: {"name": "convnet"}, {"name", "classes", "shape", "seed", "width"}),
    "cost.macs": (cost.macs, lambda: {"net": net(), "example": EXAMPLE}, {"net", "example", "scope"}),
    "cost.breakdown": (cost.breakdown, lambda: {"net": net(), "example": EXAMPLE}, {"net", "example"}),
    "cost.latency": (
        cost.latency,
        lambda: {"net": net(), "example": EXAMPLE, "repeats": 1, "warmup": 0},
        {"net", "example", "repeats", "warmup", "threads"},
    ),
    "training.fit": (
        training.fit,
        lambda: {"net": net(), "data": digits(), "recipe": RECIPE, "seed": 0},
        {"net", "data", "recipe", "seed"},
    ),
    "training.evaluate": (
        training.evaluate,
        lambda: {"net": net(), "data": digits()},
        {"net", "data", "split", "batch_size"},
    ),
    "training.recalibrate": (
        training.recalibrate,
        lambda: {"net": net(), "data": digits()},
        {"net", "data", "batches", "batch_size", "seed"},
    ),
    "training.learning_rate": (
        training.learning_rate,
        lambda: {"recipe": RECIPE, "progress": 0.5},
        {"recipe", "progress"},
    ),
    "scores.named": (scores.named, dict, {"name"}),
    "deploy.report": (
        deploy.report,
        lambda: {"nets": {"a": net()}, "example": EXAMPLE, "runtimes": ("torch",), "progress": False},
        {"nets", "example", "batches", "runtimes", "repeats", "warmup", "threads"},
    ),
    "deploy.save": (
        deploy.save,
        lambda: {"path": "never-written", "net": net(), "plans": space().plan({}), "shape": SHAPE},
        {"net", "plans", "shape"},
    ),
    "experiments.run": (experiments.run, lambda: {"experiments": []}, {"experiments", "jobs"}),
    "claims.load": (claims.load, dict, {"name"}),
    "Paper.experiments": (claims.load("01").experiments, dict, {"effort", "seeds", "macs"}),
}
EMPTY_IS_LEGAL = {"experiments", "macs", "batches", "runtimes", "keep", "plans"}
CALLED = {
    "name": ("network", "notebook"),
    "target": ("shares", "groups"),
    "keep": ("groups", "kept indices"),
}  # in messages


def allowed(parameter: str, value: object) -> bool:
    """Whether a value is legal after all: none of several, or a whole number, however large."""
    empty = isinstance(value, str | bytes | tuple | list | dict) and len(value) == 0
    return (
        (empty and parameter in EMPTY_IS_LEGAL)
        or (isinstance(value, int) and value > 0)
        or (parameter in ("batches", "macs") and isinstance(value, list | dict | bytes))  # [1], in other clothes
        or (parameter == "example" and isinstance(value, torch.Tensor))  # the network says which shapes it takes
    )


@pytest.mark.parametrize(
    ("function", "parameter"), [(name, p) for name, (_, _, checked) in FUNCTIONS.items() for p in sorted(checked)]
)
def test_a_function_refuses_what_an_argument_cannot_be(function: str, parameter: str) -> None:
    call, legal, _ = FUNCTIONS[function]

    @settings(max_examples=30)
    @given(NEVER.filter(lambda value: not allowed(parameter, value)))
    def attempt(value: object) -> None:
        refused(lambda: call(**{**legal(), parameter: value}), parameter.removesuffix("s"), *CALLED.get(parameter, ()))

    attempt()


# --- Notebooks --------------------------------------------------------------------------------------------------------


@cache
def cells(path: Path) -> tuple[dict[str, Any], str]:
    """Return a notebook's parameters, and its set-up cell up to and with the check of them."""
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    place = next(i for i, cell in enumerate(code) if "parameters" in cell["metadata"].get("tags", ()))
    parameters: dict[str, Any] = {}
    exec("".join(code[place]["source"]), parameters)
    setup = ast.parse("".join(code[place + 1]["source"]))
    last = next(i for i, node in enumerate(setup.body) if "notebook.parameters" in ast.unparse(node))
    parameters.pop("__builtins__")
    return parameters, ast.unparse(ast.Module(setup.body[: last + 1], []))


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 13


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_takes_the_parameters_that_it_has(path: Path) -> None:
    parameters, setup = cells(path)
    exec(setup, dict(parameters))


@pytest.mark.parametrize(
    ("path", "parameter"),
    [pytest.param(path, name, id=f"{path.stem}-{name}") for path in NOTEBOOKS for name in cells(path)[0]],
)
def test_a_notebook_refuses_what_a_parameter_cannot_be(path: Path, parameter: str) -> None:
    parameters, setup = cells(path)
    values = st.one_of(NEVER, st.sampled_from([None, True, 1.5, "1", ["1"], [0.0], [None], 10**6, [[0.5]]]))

    @settings(max_examples=25)
    @given(values.filter(lambda value: not (parameter == "BUDGETS" and isinstance(value, list) and value == [1])))
    def attempt(value: object) -> None:
        call = {**parameters, parameter: value}
        refused(
            lambda: exec(setup, call), f"{parameter} = ", f"unknown parameter {parameter}", f"parameter {parameter} "
        )

    attempt()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_other_parameter(path: Path) -> None:
    parameters, setup = cells(path)
    message = refused(lambda: exec(setup, {**parameters, "SEEDZ": 1}), "unknown parameter SEEDZ")
    assert all(name in message for name in parameters)
