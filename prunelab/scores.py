"""Importance criteria: functions of a space that score every unit, {group: float [size]}, high is important.

Scores are made to be compared inside a group, where all units have the same fan-in; a criterion that may be compared across
groups says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from prunelab.structure.space import Space

Criterion = Callable[["Space"], Mapping[str, Tensor]]


def l1(space: Space) -> dict[str, Tensor]:
    """Sum of absolute weights of each unit: s_j = sum |W_j| (Li et al. 2017 for filters, SPP for columns)."""
    return {group.name: space.unit_weights(group.name).abs().sum(1) for group in space.groups}


def l2(space: Space) -> dict[str, Tensor]:
    """Euclidean norm of the weights of each unit."""
    return {group.name: space.unit_weights(group.name).norm(dim=1) for group in space.groups}


def random(seed: int = 0) -> Criterion:
    """Return a criterion that scores every unit uniformly in [0, 1), a control: the same for the same seed."""

    def score(space: Space) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {group.name: torch.rand(group.size, generator=generator) for group in space.groups}

    return score


CRITERIA: dict[str, Criterion] = {"l1": l1, "l2": l2, "random": random()}


def named(name: str) -> Criterion:
    """Return the criterion of that name.

    Raises:
        ValueError: there is none; the legal names are listed.
    """
    if name not in CRITERIA:
        raise ValueError(f"unknown criterion {name!r}: legal names are {', '.join(map(repr, CRITERIA))}")
    return CRITERIA[name]
