"""The places that name the project's dependencies and its version agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import prunelab

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    requirement
    for line in [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    if (requirement := Requirement(line)).name != "prunelab"
]
LOCK = {
    canonicalize_name(requirement.name): requirement
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
    for requirement in [Requirement(line)]
}
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
CONDA_LINES = re.findall(r"^  - ([\w-]+>=[\d.]+) +# \S", (ROOT / "environment.yml").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_a_dependency_is_locked_at_a_version_that_is_allowed(requirement: Requirement) -> None:
    (pin,) = LOCK[canonicalize_name(requirement.name)].specifier
    assert pin.operator == "=="
    assert pin.version in requirement.specifier


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_the_conda_environment_asks_for_the_same_and_says_why(requirement: Requirement) -> None:
    assert f"{CONDA_NAMES.get(requirement.name, requirement.name)}{requirement.specifier}" in CONDA_LINES


def test_every_line_of_the_lock_is_one_exact_version() -> None:
    for requirement in LOCK.values():
        assert requirement.url is None
        assert [pin.operator for pin in requirement.specifier] == ["=="]


def test_one_version_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.M) == [PROJECT["version"]] == [prunelab.__version__]
