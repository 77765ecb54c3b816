"""Eigenpairs of a Gram matrix in float32, and how wrong the low-rank matrix may be that is made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SPACING = 1.2e-7  # of float32
_TINY = 1e-300


@dataclass(frozen=True)
class Eigenpairs:
    """The top eigenpairs of a matrix with eigenvalues in [0, 1], descending.

    :param rows: the k wanted eigenvectors, shape (k, n), float32.
    :param values: theirs, and those of the discarded ones that are known, at least one; float64, CPU.
    :param residuals: ``||G v - value v||`` of each where the method stopped too early; in one and the same subspace,
        orthogonal to all the vectors.
    :param rounding: ``||G v - value v||`` of the k by rounding in float32, and so in no direction of its own.
    """

    rows: torch.Tensor
    values: torch.Tensor
    residuals: torch.Tensor
    rounding: torch.Tensor | float = 0.0

    def error(self) -> float:
        """Estimate ``||L' - L||_F / ||L||_F``, L' the low-rank matrix of these pairs and L the best one.

        To first order, an eigenvector leans towards others by its residual over the gap between the eigenvalues
        (Davis & Kahan). Residuals point out of the subspace, to directions whose eigenvalues are at most the first
        that has not converged; over them, to discarded vectors that are known (second order). Rounding points
        everywhere: the nearest direction has its share of 1/sqrt(n). In practice this is two to five times the error.
        """
        k, n = self.rows.shape
        wanted, other = self.values[:k].clamp(min=0.0), self.values[k:].clamp(min=0.0)
        strayed, residuals = self.residuals[k:], self.residuals[:k]
        vague = (strayed > 0.1 * other).nonzero()
        known = int(vague[0]) if len(vague) else len(other) - 1
        outside = (wanted - other[known] - strayed[known]).clamp(min=_TINY)
        apart = (wanted[:, None] - other[None, :known]).clamp(min=_TINY)
        lean = residuals / outside * (1 + (strayed[:known] / apart).square().sum(dim=1).sqrt())
        spread = self.rounding + _SPACING * float(self.values[0])  # and what the Gram matrix itself has lost
        lean += spread * (1 / ((wanted - other[0]).clamp(min=_TINY) * n**0.5) + 1 / wanted.clamp(min=_TINY))
        square = ((wanted + other[0]) * lean.clamp(max=1.0).square()).sum() / wanted.sum().clamp(min=_TINY)
        return float(square.sqrt().nan_to_num(1.0))  # NaN: nothing is known
