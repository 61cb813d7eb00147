"""Importance criteria: functions of a space that score every unit, {group: float [size]}, high is important.

Scores are made to be compared inside a group, where all units have the same fan-in; a criterion that may be compared
across groups says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunelab._checks import one_of
from prunelab.structure.maps import mean_over_maps

if TYPE_CHECKING:
    from prunelab.structure.space import Space

Criterion = Callable[["Space"], Mapping[str, Tensor]]

IMAGES_AT_A_TIME = 100  # a few hundred MB of feature maps at most


def l1(space: Space) -> dict[str, Tensor]:
    """Sum of absolute weights of each unit: s_j = sum |W_j| (Li et al. 2017 for filters, SPP for columns)."""
    return {group.name: space.unit_weights(group.name).abs().sum(1) for group in space.groups}


def l2(space: Space) -> dict[str, Tensor]:
    """Euclidean norm of the weights of each unit."""
    return {group.name: space.unit_weights(group.name).norm(dim=1) for group in space.groups}


def bn_scale(space: Space) -> dict[str, Tensor]:
    """Sum of |γ| of the batch norms behind the layers that write each unit; comparable across groups (Liu et al. 2017).

    Raises:
        ValueError: the space is not one of channels, or a layer is not followed by a batch norm with a scale alone.
    """
    coupling = getattr(space, "coupling", None)
    if coupling is None:
        raise ValueError(f"bn_scale scores channels; this space has {space.kind}, which no batch norm scales")
    scales = {axis.module: axis.units for axis in coupling.axes if axis.role == "channel" and axis.tensor == "weight"}
    writers = dict.fromkeys(axis.module for axis in coupling.axes if axis.role == "out" and (axis.units >= 0).any())
    bare = sorted(writer for writer in writers if coupling.norms.get(writer) not in scales)
    if bare:
        raise ValueError(
            f"bn_scale needs a batch norm with a scale right behind every layer; none follows {', '.join(bare)}"
        )
    total = torch.zeros(int(space.sizes.sum()) + 1)  # the last place gathers what is never removed
    for norm in (coupling.norms[writer] for writer in writers):
        gamma = space.net.get_submodule(norm).get_parameter("weight").detach()
        total.index_add_(0, torch.from_numpy(scales[norm]) % len(total), gamma.abs().cpu())
    return space.by_group(total[:-1])


def feature_rank(images: Tensor) -> Criterion:
    """Return a criterion that scores channels by the average rank of their feature maps (Lin et al. 2020).

    r_j = 1/g · Σ_t Rank(o_j(I_t)) over g images, in [0, min(H, W)]: how many singular values of the map exceed
    max(H, W)·ε·σ₁, with the ε of float32. `prunelab.structure.maps` says where the maps are seen. A map of one pixel
    has rank 0 or 1, and a constant map too: ranks tell nothing there.

    Args:
        images: normalised, float [g, C, H, W], g >= 1, on the network's device.

    Raises:
        ValueError: there is no image, or the space is not one of channels.
    """

    def score(space: Space) -> dict[str, Tensor]:
        return mean_over_maps(space, map_rank, images.split(IMAGES_AT_A_TIME))

    return score


def map_rank(maps: Tensor) -> Tensor:
    """Return the rank of each map, [..., H, W] -> int64 [...]: see `feature_rank`."""
    return torch.linalg.matrix_rank(maps.float())


def random(seed: int = 0) -> Criterion:
    """Return a criterion that scores every unit uniformly in [0, 1), a control: the same for the same seed."""

    def score(space: Space) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {group.name: torch.rand(group.size, generator=generator) for group in space.groups}

    return score


def alike(space: Space, whole: Collection[str] = ()) -> dict[str, Tensor]:
    """Score all units alike, and those of groups that are to stay whole +inf: all others lose the same share.

    Args:
        space: of the units.
        whole: names of groups.
    """
    return {group.name: torch.full((group.size,), torch.inf if group.name in whole else 0.0) for group in space.groups}


def proportional(proportions: Mapping[str, float], order: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scores whose global ranking leaves, at any budget, widths in given proportions to the groups' sizes.

    The k-th best unit of a group of C units with proportion p scores p·C/k, so units go from all groups at the same
    width over p·C.

    Args:
        proportions: {group: p > 0}; only their ratios matter. Groups not named stay whole.
        order: scores that say which units of a group stay, {group: [size]}.
    """
    found = {}
    for group, score in order.items():
        rank = torch.empty(len(score), dtype=torch.float64)
        rank[score.argsort(descending=True, stable=True)] = torch.arange(1, len(score) + 1, dtype=torch.float64)
        found[group] = proportions.get(group, math.inf) * len(score) / rank
    return found


CRITERIA: dict[str, Criterion] = {"l1": l1, "l2": l2, "bn_scale": bn_scale, "random": random()}


def named(name: str) -> Criterion:
    """Return the criterion of that name.

    Raises:
        ValueError: there is none; the legal names are listed.
    """
    if not one_of(CRITERIA).accepts(name):
        raise ValueError(f"unknown criterion {name!r}: legal names are {', '.join(map(repr, CRITERIA))}")
    return CRITERIA[name]
