"""Settings that every test shares."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")  # figures without a screen

# The same examples on every machine, and no verdict from a slow one.
settings.register_profile("prunelab", deadline=None, derandomize=True)
settings.load_profile("prunelab")
