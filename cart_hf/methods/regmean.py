"""RegMean: the weights whose outputs are closest to every model's own, on the inputs that its layers see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cart_hf.methods.average import average
from cart_hf.methods.parameters import WEIGHT, Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch

_MOST = 1 - 1e-6  # share of the off-diagonal entries: what float32 sums leave uncertain is no more than a part of it
_LEAST = 1e-6  # eigenvalues, where the largest is at least 1, that say nothing


@method(
    "regmean",
    title="RegMean",
    parameters=(
        Parameter(
            "non_diagonal",
            0.9,
            "factor of the off-diagonal entries of the Gram matrices (the paper's α)",
            low=0,
            high=1,
            aliases=("alpha", "reduce_non_diagonal_ratio"),
            search=(0.1, 0.5, 0.9, 0.95, 1.0),
        ),
        WEIGHT,
    ),
    summary="least squares between the merged layer's outputs and each model's own, on inputs of its task",
    equation="merged = (sum_t w_t W_t G_t) (sum_t w_t G_t)^-1,  G_t = a C_t + (1 - a) diag(C_t), C_t = X_t^T X_t / n_t",
    citation="Jin et al., Dataless knowledge fusion by merging weights of language models (arXiv 2212.09849)",
    needs_base=False,
    matrices=True,
    calibration="gram",
)
def regmean(
    *, models: torch.Tensor, grams: Sequence[torch.Tensor], weight: Sequence[float], non_diagonal: float
) -> torch.Tensor:
    """Return the matrix W with the least ``sum_t w_t tr((W - W_t) G_t (W - W_t)^T)`` (the paper's rule, with weights).

    ``G_t`` is the Gram matrix of the layer's inputs in model t with its off-diagonal entries times ``non_diagonal``.
    It is computed as ``A + sum_t w_t (W_t - A) G_t (sum_t w_t G_t)^-1`` around the average A, which is the same and
    leaves at the average whatever no input reaches. ``non_diagonal`` above 1 - 1e-6 is taken as that, which is the
    ridge: the sums are float32.

    Time: O(T m n^2 + n^3) for T matrices (m, n), in float64. Memory: one Gram matrix at a time, their sum and its
    factor, and two matrices (m, n), all float64.

    :param models: shape (T, m, n), float32 or float64; overwritten.
    :param grams: T tensors of shape (n, n), ``X_t^T X_t / n_t``, each asked for once; none: the average.
    """
    import torch

    centre = average(models=models, weight=weight)
    if not grams:
        return centre
    place = torch.device("cpu") if models.device.type == "mps" else models.device  # which has no float64
    total = torch.zeros(models.shape[2], models.shape[2], dtype=torch.float64, device=place)
    pull = torch.zeros(models.shape[2], models.shape[1], dtype=torch.float64, device=place)
    for matrix, gram, w in zip(models.sub_(centre), grams, weight, strict=True):
        kept = gram.to(device=place, dtype=torch.float64, copy=True)
        diagonal = kept.diagonal().clone()
        kept.mul_(w * min(non_diagonal, _MOST)).diagonal().copy_(diagonal * w)
        total += kept
        pull += kept @ matrix.to(device=place, dtype=torch.float64).mT
    return centre.add_(_solve(total, pull).mT.to(centre))


def _solve(total: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
    """Return ``total^-1 pull``, 0 where ``total`` says nothing; both are overwritten.

    :param total: symmetric, positive semi-definite but for rounding, shape (n, n).
    """
    import torch

    scale = total.diagonal().abs().sqrt()
    silent = scale == 0  # inputs that are always 0
    inverse = torch.where(silent, 0.0, 1 / scale)
    total.mul_(inverse).mul_(inverse[:, None])  # ones on the diagonal: inputs differ in size by orders of magnitude
    total.diagonal()[silent] = 1
    pull.mul_(inverse[:, None])
    factor, failed = torch.linalg.cholesky_ex(total)
    if int(failed) == 0:
        return torch.cholesky_solve(pull, factor).mul_(inverse[:, None])
    values, vectors = torch.linalg.eigh(total)
    known = torch.where(values > _LEAST, 1 / values, 0.0)
    found: torch.Tensor = vectors @ (known[:, None] * (vectors.mT @ pull))
    return found.mul_(inverse[:, None])
