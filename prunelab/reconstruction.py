"""Reconstructing what a layer computed from fewer of its inputs: second moments, LASSO, least squares.

A layer with weights W [outputs, columns] sees rows X [N, columns] of samples and should respond with Y [N, outputs].
All that is asked of the samples here are the moments of X and of what is still missing, E = Y − (X·Wᵀ + b), so they
are read once and never stored. For a convolution, a row is the patch under one output position.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import lars_path_gram
from torch import Tensor

BLOCKS = 8  # of columns, of which only those on and above the diagonal of XᵀX are multiplied
RIDGE = 1e-6  # of the norm of the covariance: products of float32 cannot tell less from zero


class Moments:
    """The first and second moments of rows x [N, columns] and y [N, outputs], added up batch by batch in float64.

    Products are taken in the rows' own precision: float64 rows give moments exact to float64. The mean of the first
    batch is taken off before, so that a mean far from zero costs no digits.
    """

    def __init__(self, columns: int, outputs: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.rows = 0
        self._origin = torch.zeros(columns, device=device)
        edges = [columns * i // BLOCKS for i in range(BLOCKS + 1)]
        self._blocks = list(itertools.pairwise(edges))
        self._x, self._y = zeros(columns), zeros(outputs)
        self._xx, self._xy, self._yy = zeros(columns, columns), zeros(columns, outputs), zeros(outputs)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add some rows."""
        if self.rows == 0:
            self._origin = x.mean(0)
        x = x - self._origin
        self.rows += len(x)
        self._x += x.sum(0, dtype=torch.float64)
        self._y += y.sum(0, dtype=torch.float64)
        self._yy += y.square().sum(0, dtype=torch.float64)
        self._xy += x.T @ y
        for start, end in self._blocks:
            self._xx[:end, start:end] += x[:, :end].T @ x[:, start:end]

    @property
    def mean_x(self) -> Tensor:
        """Mean row x, [columns]."""
        return self._origin + self._x / self.rows

    @property
    def mean_y(self) -> Tensor:
        """Mean row y, [outputs]."""
        return self._y / self.rows

    @property
    def xx(self) -> Tensor:
        """Covariance of x, [columns, columns]."""
        mean, full = self._x / self.rows, self._xx / self.rows
        for start, end in self._blocks:
            full[start:end, :start] = full[:start, start:end].T
        return full.addr_(mean, mean, alpha=-1)

    @property
    def xy(self) -> Tensor:
        """Covariance of x and y, [columns, outputs]."""
        return self._xy / self.rows - (self._x / self.rows).outer(self.mean_y)

    @property
    def yy(self) -> float:
        """Variance of y, summed over outputs."""
        return float((self._yy / self.rows - self.mean_y.square()).sum())


@dataclass(frozen=True)
class Change:
    """How a layer loses channels.

    Attributes:
        weight: what is added to W, [outputs, columns].
        bias: what is added to b, [outputs].
        error: ||Y − X·(W + ΔW)ᵀ − (b + Δb)||²/N, summed over outputs.
    """

    weight: Tensor
    bias: Tensor
    error: float


class Reconstruction:
    """One layer that is about to lose input channels.

    Args:
        weight: W, [outputs, columns].
        channel: int64 [columns], the channel in [0, channels) that a column belongs to; -1 if it cannot go.
        moments: of the rows X and of what is missing from the response, E = Y − (X·Wᵀ + b).
    """

    def __init__(self, weight: Tensor, channel: Tensor, moments: Moments) -> None:
        self.weight, self.channel, self.rows = weight, channel, moments.rows
        self.mean_x, self.mean_e = moments.mean_x, moments.mean_y
        self.xx, self.xe, self.ee = moments.xx, moments.xy, moments.yy

    def gram(self, channels: int) -> tuple[Tensor, Tensor]:
        """Return what LASSO needs to know: G_ij = ⟨Z_i, Z_j⟩/N and q_i = ⟨Z_i, Y⟩/N of Z_i = X_i·W_iᵀ, centred.

        Y is what the channels are to contribute: the target less what columns that cannot go contribute.
        """
        products = self._by_channel(self.xx * (self.weight.T @ self.weight), channels)
        gram = self._by_channel(products.T.contiguous(), channels)
        return gram, gram.sum(1) + self._by_channel((self.xe * self.weight.T).sum(1), channels)

    def norms(self, channels: int, power: int) -> Tensor:
        """Return Σ|w|^power over the weights of each channel, [channels]."""
        return self._by_channel(self.weight.double().abs().pow(power).sum(0), channels)

    def cut(self, channels: Sequence[int]) -> Change:
        """Keep these channels, and their weights as they are."""
        kept, lost, pull = self._without(channels)
        gap = self.mean_e + self.mean_x[~kept] @ lost
        change = torch.where(kept, 0, -self.weight.double())
        return Change(change, torch.zeros_like(gap), self._spread(kept, lost, pull) + float(gap.square().sum()))

    def solve(self, channels: Sequence[int]) -> Change:
        """Keep these channels, with the weights and bias that come closest to the target.

            min over ΔW, Δb of ||Y − X_K·(W_K + ΔW)ᵀ − b − Δb||²/N + ridge·||ΔW||²

        The ridge, 1e-6 of the norm of X_K's covariance, decides where the samples do not. It holds the weights where
        they were and not at zero: so a whole layer gets its own weights back, and the error is never above that of
        `cut`.

        Raises:
            ValueError: there are fewer rows than unknowns.
        """
        kept, lost, pull = self._without(channels)
        check_rows(self.rows, int((self.xx.diagonal()[kept] > 0).sum()))
        covariance, wanted = self.xx[kept][:, kept], self.xe[kept] + pull[kept]
        ridge = RIDGE * covariance.norm().clamp_min(torch.finfo(torch.float64).tiny)
        covariance.diagonal().add_(ridge)
        step = torch.cholesky_solve(wanted, torch.linalg.cholesky(covariance))
        gain = (step * wanted).sum() + ridge * step.square().sum()  # as covariance @ step = wanted − ridge·step
        change = -self.weight.double()
        change[:, kept] = step.T
        return Change(change, self.mean_e - change @ self.mean_x, self._spread(kept, lost, pull) - float(gain))

    def _without(self, channels: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return which columns stay, the others' weights, and the covariance of X with what those contribute."""
        stays = torch.tensor(sorted(channels), dtype=torch.int64, device=self.channel.device)
        kept = torch.isin(self.channel, stays) | (self.channel < 0)
        lost = self.weight[:, ~kept].T.double()
        return kept, lost, self.xx[:, ~kept] @ lost

    def _spread(self, kept: Tensor, lost: Tensor, pull: Tensor) -> float:
        """Return the variance of what is missing without the others, summed over outputs."""
        return self.ee + float((lost * (2 * self.xe[~kept] + pull[~kept])).sum())

    def _by_channel(self, values: Tensor, channels: int) -> Tensor:
        """Sum rows that belong to the same channel, [columns, ...] -> [channels, ...]."""
        sums = values.new_zeros(channels + 1, *values.shape[1:])
        return sums.index_add_(0, self.channel % (channels + 1), values)[:-1]


def check_rows(rows: int, columns: int, where: str = "") -> None:
    """Raise ValueError if there are fewer rows than the unknowns of an output: a weight per column, and a bias."""
    if rows < columns + 1:
        raise ValueError(
            f"{where or 'least squares'}: {rows} samples for {columns + 1} unknowns per output; at least "
            f"{columns + 1} are needed, and several times as many are better: take more images or positions"
        )


@dataclass(frozen=True)
class Path:
    """LASSO as the penalty falls: at `penalties` [knots] the coefficients are `betas` [channels, knots]."""

    penalties: NDArray[np.float64]
    betas: NDArray[np.float64]


def lasso_path(gram: Tensor, q: Tensor, count: int | None = None) -> Path:
    """Solve min over β of ½·βᵀGβ − qᵀβ + λ·||β||₁ for every λ >= 0, or down to where `count` coefficients are not 0.

    Between two knots the coefficients change linearly, and one of them leaves zero or returns to it, so every count of
    them occurs. Channels with G_ii = 0 stay out.
    """
    size = len(q)
    varying = np.flatnonzero((gram.diagonal() > 0).cpu().numpy())
    inner, wanted = gram.cpu().numpy()[np.ix_(varying, varying)], q.cpu().numpy()[varying]
    for steps in (8 * size,) if count is None else (count + 8, 8 * size):  # all of the path only where LARS goes back
        penalties, _, found = lars_path_gram(
            Xy=wanted.copy(), Gram=inner.copy(), n_samples=1, method="lasso", max_iter=steps
        )
        if count is not None and ((found != 0).sum(0) >= count).any():
            break
    betas = np.zeros((size, found.shape[1]))
    betas[varying] = found
    return Path(penalties, betas)


def lasso(gram: Tensor, q: Tensor, norms: Tensor, count: int) -> list[int]:
    """Return exactly `count` channels that LASSO keeps, sorted.

        min over β of 1/(2N)·||Y − Σ_i β_i·Z_i/||W_i|| ||² + λ·||β||₁

    λ falls until `count` of the β_i are not zero; where several enter at once, those with the largest contribution
    |β_i|·||Z_i|| stay. Channels that do not vary come last.

    Args:
        gram: G_ij = ⟨Z_i, Z_j⟩/N, [channels, channels].
        q: ⟨Z_i, Y⟩/N, [channels].
        norms: ||W_i||, [channels]: with them β does not depend on how large a channel's weights happen to be.
        count: in [1, channels].

    Raises:
        ValueError: the count is out of range, or no channel varies.
    """
    if not 1 <= count <= len(q):
        raise ValueError(f"count is {count}: of {len(q)} channels between 1 and {len(q)} can stay")
    if not (gram.diagonal() > 0).any():
        raise ValueError(f"none of the {len(q)} channels varies over the samples: there is nothing to reconstruct from")
    norms = norms.clamp_min(torch.finfo(norms.dtype).tiny)
    scaled = gram / norms.outer(norms)
    path = lasso_path(scaled, q / norms, count)
    enough = np.flatnonzero((path.betas != 0).sum(0) >= count)
    betas = torch.from_numpy(path.betas[:, enough[0] if len(enough) else -1])
    strength = betas.abs() * scaled.diagonal().cpu().sqrt()
    return sorted(strength.argsort(descending=True, stable=True)[:count].tolist())
