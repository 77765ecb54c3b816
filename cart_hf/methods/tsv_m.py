"""TSV-M: the top singular directions of all task vectors, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cart_hf.methods.cart import ENERGY, RANK, RANK_RATIO, SOLVER
from cart_hf.methods.parameters import Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch

    from cart_hf.linalg.gram import Solver
    from cart_hf.linalg.low_rank import Factors


def tsv_m_of_factors(
    *, centre: torch.Tensor, factors: Factors, ranks: Sequence[int] | None, scale: float
) -> torch.Tensor:
    """Return the same as :func:`tsv_m`, from the factors of the task vectors.

    :param centre: the base's matrix, shape (m, n).
    :param factors: of ``W_t - base``.
    :param ranks: how many directions of each model to keep; None: all.
    """
    from cart_hf.linalg.directions import rounding, side_by_side, whitened_sum

    merged = whitened_sum(side_by_side(factors, rounding(centre), ranks))
    return merged.mul_(scale).to(centre.dtype).add_(centre)


@method(
    "tsv_m",
    title="TSV-M",
    parameters=(
        replace(
            RANK_RATIO,
            default=None,
            help="rank kept of each task vector, as a fraction of the smaller dimension; default: 1 / models",
            search=(),  # the authors keep 1 / models
        ),
        RANK,
        ENERGY,
        Parameter(
            "scale",
            1.0,
            "factor of the merged task vector (alpha)",
            aliases=("alpha",),
            search=(0.6, 0.8, 1.0, 1.2, 1.5, 2.0),
        ),
        SOLVER,
    ),
    one_of=("rank_ratio", "rank", "energy"),
    summary="the base plus the task vectors' top singular directions, made orthogonal to each other",
    equation="merged = base + scale * whiten([U_1 ... U_T]) diag(sigma_1 ... sigma_T) whiten([V_1 ... V_T])^T,  "
    "U_t diag(sigma_t) V_t^T = lowrank_k(W_t - base)",
    citation="Gargiulo et al., Task singular vectors (arXiv 2412.00081)",
    low_rank=True,
    of_factors=tsv_m_of_factors,
    factors_centre="base",
    line=True,
)
def tsv_m(
    *,
    models: torch.Tensor,
    base: torch.Tensor,
    scale: float,
    rank: int | None = None,
    energy: float | None = None,
    solver: Solver = "fast",
) -> torch.Tensor:
    """Return ``base + scale * U' diag(σ) V'^T``, U' and V' the whitened singular vectors of all task vectors.

    The top ``rank`` directions of each task vector ``τ_t = W_t - base`` stand side by side in ``U = [U_1 ... U_T]``,
    σ and V; ``U'`` is the matrix with orthonormal columns nearest to U (Procrustes, as in the paper), ``V'`` likewise.
    By default ``rank = min(m, n) / T``, so that all of them just have room.

    Where they have not (T rank > min(m, n)) or where they are linearly dependent (identical models), U' is the polar
    factor of U within its span, :func:`cart_hf.linalg.directions.orthonormal`: T identical models give
    ``base + scale * lowrank(τ)``, the model itself at full rank. Directions without length (models that are the base,
    LoRA of a lower rank) are left out beforehand; the authors' code lets arbitrary null vectors take part.

    Only these matrices are scaled: every other tensor is the average of the models', which at scale 1 is what the
    authors have (at another scale they scale the mean of the other task vectors too).

    Time is that of T truncations by ``solver`` and O(min(m, n)^2 (m + n)) for the whitening, two eigenproblems in
    float64 of min(T rank, m) and min(T rank, n).

    :param models: shape (T, m, n), float; overwritten.
    :param base: shape (m, n).
    :param scale: α; the authors search 0.1 to 3 on validation data and publish 1.
    :param rank: k, 1 <= k <= min(m, n); None when ``energy`` decides.
    :param energy: share of each task vector's squared Frobenius norm to keep, in (0, 1].
    :param solver: how the singular directions are found, see :func:`cart_hf.linalg.low_rank.factorize`.
    :raises DecompositionError: when an eigenproblem fails.
    """
    from cart_hf.linalg.low_rank import factorize

    factors = factorize(models.sub_(base), rank=rank, energy=energy, solver=solver)
    return tsv_m_of_factors(centre=base, factors=factors, ranks=None, scale=scale)
