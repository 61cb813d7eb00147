"""How `pytest --nbval` compares these notebooks with their recorded outputs."""

from __future__ import annotations

import pytest


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave the error stream out of the comparison: progress bars go there, and they tell the time."""
    if collector.nodeid.endswith(".ipynb"):
        collector.skip_compare += ("stderr",)  # type: ignore[attr-defined]
