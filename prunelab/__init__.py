"""Structured pruning of convolutional networks: methods from the papers, and the tests of their claims."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunelab import methods
    from prunelab.structure import Budget, ChannelSpace, ColumnSpace, Plan

__all__ = ["Budget", "ChannelSpace", "ColumnSpace", "Plan", "__version__", "methods"]

__version__ = version("prunelab")


def __getattr__(name: str) -> Any:
    """Import what is re-exported when it is first used: PyTorch takes seconds."""
    if name == "methods":
        return import_module("prunelab.methods")
    if name in __all__:
        return getattr(import_module("prunelab.structure"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
