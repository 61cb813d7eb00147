"""How `pytest --nbval` runs these notebooks and compares them with their recorded outputs."""

from __future__ import annotations

import os
import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Let the notebooks save their figures elsewhere: a test changes no file of the repository."""
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    os.environ["PRUNELAB_FIGURES"] = folder.name


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave the error stream out of the comparison: progress bars go there, and they tell the time."""
    if collector.nodeid.endswith(".ipynb"):
        collector.skip_compare += ("stderr",)  # type: ignore[attr-defined]
