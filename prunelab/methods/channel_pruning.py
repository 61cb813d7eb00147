"""Channel Pruning for Accelerating Very Deep Neural Networks (He, Zhang, Sun, ICCV 2017, arXiv 1707.06168).

Layer by layer, from the image on: LASSO chooses which input channels a layer keeps, least squares gives it the weights
with which they come closest to what it computed before, and the filters that wrote the others go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from prunelab import scores as criteria
from prunelab._arrays import Ints
from prunelab._checks import FLAG, POSITIVE, check_fields, check_shares, integer, one_of
from prunelab.layerwise import LayerByLayer, readers_of, streams
from prunelab.methods.base import Pruned
from prunelab.reconstruction import Reconstruction, lasso
from prunelab.structure import Budget, ChannelSpace
from prunelab.training import Context

Selection = Literal["lasso", "first k", "max response"]


@dataclass(frozen=True)
class ChannelPruning:
    """Choose channels and reconstruct what their readers computed, group by group, without any training.

        min over β of 1/(2N)·||Y − Σ_i β_i·X_i·W_iᵀ||² + λ·||β||₁,  ||W_i|| = 1,  λ such that c' of the β_i are not 0
        min over W, b of ||Y − X_K·Wᵀ − b||²

    once each, as the released code does; the paper's alternation is no better. Where several layers read a group, their
    moments are added, and each is reconstructed. Both problems are solved from second moments of all N rows, so the
    count c' is exact; the released code solves LASSO on 400 of them and accepts up to 10% more channels than asked.

    The outputs of residual blocks stay whole. The first convolution of a branch gets a `ChannelSelection` of its own,
    the paper's sampler, and the last one aims at Y1 − Y1' + Y2: its own response and what the shortcut has lost, in
    units of the response before batch norm. Batch norms are kept as they are, an intercept goes into their mean.
    The inputs of hidden linear layers are cut, too. Not here: 3C, which also factorises kernels in space and channels.

    selection: "lasso"; or a rival: the "first k" channels, or those of "max response", the largest Σ|W_i|.
    reconstruct: whether least squares follows; without it the kept weights stay as they were.
    accumulated: whether X comes from the network that is pruned so far, so that a layer also repairs what was lost in
        front of it, or from the original one. Y always comes from the original one.
    images: of the training split, without augmentation, or all if there are fewer; >= 1.
    positions: of the output map per image, drawn anew for each image, without replacement: a smaller map gives all it
        has; >= 1. (The released code shares ten among ten images, and may repeat some.)
    ratios: {group: how much it keeps relative to others, > 0}: round(r·ratio·size) channels with the largest r that
        meets the budget, at least one; groups not named stay whole. `RATIOS` has published ones. None: the same share
        everywhere.

    Raises ValueError naming a field, its value and the legal ones. A call raises it for unknown groups, for a budget
    that cannot be met, and for a layer with fewer samples than unknowns, saying how many are needed.
    `Pruned.plan` is of the network that `with_samplers` returns. `Pruned.history` has "errors": {group: (of the
    selection alone, as it is left)}, the squared errors of the readers' responses over their variance.
    """

    name: ClassVar[str] = "channel-pruning"

    selection: Selection = "lasso"
    reconstruct: bool = True
    accumulated: bool = True
    images: int = 5000
    positions: int = 10
    ratios: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(
            self,
            self.name,
            selection=one_of(get_args(Selection)),
            reconstruct=FLAG,
            accumulated=FLAG,
            images=integer(1),
            positions=integer(1),
        )
        check_shares("channel-pruning: ratios", self.ratios, POSITIVE)

    def __call__(self, net: nn.Module, budget: Budget, context: Context) -> Pruned:
        """Prune a copy of the network."""
        data = context.data
        run = LayerByLayer(net, data, self.images, self.positions, accumulated=self.accumulated, seed=context.seed)
        sizes = {group.name: group.size for group in run.space.groups}
        cut = {name: width for name, width in self.widths(run.space, budget).items() if width < sizes[name]}
        run.prepare(cut, check=self.reconstruct)
        errors = {}
        for name, width in tqdm(cut.items(), desc=self.name, leave=False, disable=not context.progress):
            readers = run.readers(name)
            kept = self.select([*readers.values()], sizes[name], width)
            errors[name] = run.cut(name, kept, readers, reconstruct=self.reconstruct)
        read = 2 * sum(map(len, run.batches)) / len(data.train.labels)  # by the original network and by the pruned one
        return Pruned(run.shrunk(), run.plan, read, {"errors": errors})

    def widths(self, space: ChannelSpace, budget: Budget) -> dict[str, int]:
        """Return how many channels each group keeps: what shortcuts read all, the others as `ratios` says."""
        whole = {*streams(space), *(group.name for group in space.groups if not readers_of(space, group.name))}
        if self.ratios is None:
            return space.plan_for(criteria.alike(space, whole), budget).widths
        names = {group.name for group in space.groups} - whole
        if wrong := [name for name in self.ratios if name not in names]:
            legal = ", ".join(group.name for group in space.groups if group.name in names)
            raise ValueError(f"channel-pruning: ratios[{wrong[0]!r}]: the groups that can be cut are {legal}")
        return self._largest(space, budget)

    def _largest(self, space: ChannelSpace, budget: Budget) -> dict[str, int]:
        """Return the widths at the largest common factor r, found by bisection, that meets the budget."""
        names = [group.name for group in space.groups]
        ratios = np.array([(self.ratios or {}).get(name, np.inf) for name in names])  # not named: whole at any r
        spent = space.spent(budget)

        def widths(r: float) -> Ints:
            return np.clip(np.rint(np.minimum(r * ratios, 1) * space.sizes), 1, space.sizes).astype(np.int64)

        low, high = np.finfo(float).tiny, 1 / ratios.min()
        if (least := spent(widths(low))) > budget.fraction:
            raise ValueError(f"channel-pruning: ratios keep at least {least:.4f} of the {budget.what}; {budget}")
        while high - low > 1e-9 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if spent(widths(middle)) <= budget.fraction else (low, middle)
        best = high if spent(widths(high)) <= budget.fraction else low
        return dict(zip(names, widths(best).tolist(), strict=True))

    def select(self, readers: Sequence[Reconstruction], channels: int, count: int) -> list[int]:
        """Choose `count` of the channels that some layers read together."""
        if self.selection == "first k":
            return list(range(count))
        if self.selection == "max response":
            response = torch.stack([reader.norms(channels, 1) for reader in readers]).sum(0)
            return sorted(response.argsort(descending=True, stable=True)[:count].tolist())
        grams, qs = zip(*(reader.gram(channels) for reader in readers), strict=True)
        norms = torch.stack([reader.norms(channels, 2) for reader in readers]).sum(0).sqrt()
        return lasso(torch.stack(grams).sum(0), torch.stack(qs).sum(0), norms, count)


# -- published ratios -------------------------------------------------------------------------------------------------

_SENSITIVE = {(1, 0), (2, 0), (2, 3), (3, 0), (3, 5), (4, 0), (4, 1), (4, 2)}


def _resnet50() -> dict[str, float]:
    """Inputs of the three convolutions of a branch as 2 : 4 : 3; sensitive blocks keep 1.4 times as much.

    30% of an ordinary block's channels are 40%, 80% and 60%; released sensitive blocks have 56%, all and 85%.
    """
    ratios: dict[str, float] = {}
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            more = 1.4 if (stage, block) in _SENSITIVE else 1.0
            inside = f"layer{stage}.{block}"
            ratios |= {
                f"{inside}.conv1.select": 2 * more,
                f"{inside}.conv1.conv": 4 * more,
                f"{inside}.conv2": 3 * more,
            }
    return ratios


RATIOS: dict[str, dict[str, float]] = {
    "vgg16": {f"conv{i}": 1.0 if i <= 7 else 1.5 for i in range(1, 11)},
    "resnet50": _resnet50(),
}
"""Published rules for `ChannelPruning.ratios`: the paper's for our VGG-16 (conv5_x stays whole), and for torchvision's
ResNet-50 what fits the released network."""
