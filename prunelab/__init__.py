"""Structured pruning of convolutional networks: methods from the papers, and the tests of their claims."""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("prunelab")
