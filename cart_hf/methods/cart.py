"""CART: centre the task vectors at the weight average and keep their top singular directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cart_hf.methods.average import average
from cart_hf.methods.linear import Linear
from cart_hf.methods.parameters import WEIGHT, Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch

    from cart_hf.linalg.gram import Solver
    from cart_hf.linalg.low_rank import Factors

RANK_RATIO = Parameter(
    "rank_ratio",
    0.08,
    "rank kept, as a fraction of the smaller dimension",
    above=0,
    high=1,
    planning=True,
    search=(0.04, 0.08, 0.12, 0.16, 0.32),  # of the settings that the authors of CART and AdaRank publish
)
RANK = Parameter("rank", None, "rank kept, in singular directions", kind="integer", low=1, planning=True)
ENERGY = Parameter(
    "energy",
    None,
    "rank kept: the least that holds this share of sum(sigma^2)",
    above=0,
    high=1,
    planning=True,
)
SOLVER = Parameter(
    "solver",
    "fast",
    "fast: the update within 1e-3 of the truth, checked; exact: within 1e-6",
    kind="choice",
    choices=("fast", "exact"),
)


def centred_factors(
    models: torch.Tensor,
    weight: Sequence[float],
    *,
    rank: int | None = None,
    energy: float | None = None,
    solver: Solver = "fast",
    centre: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Factors]:
    """Return the centre of the matrices, and the factors of what is left of each.

    :param models, weight, rank, energy, solver: see :func:`cart`.
    :param centre: shape (m, n); default: their weighted average.
    """
    from cart_hf.linalg.low_rank import factorize

    if centre is None:
        centre = average(models=models, weight=weight)
    return centre, factorize(models.sub_(centre), rank=rank, energy=energy, solver=solver)


def centred(*, models: torch.Tensor, weight: Sequence[float], **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the centre and the centred task vectors, of tensors that are not decomposed.

    With CART's own coefficients these cancel, and the centre is left; with learnt ones they do not.
    """
    centre = average(models=models, weight=weight)
    return centre, models.sub_(centre)


def coefficients(*, scale: float, weight: Sequence[float], **_: Any) -> list[float]:
    """Return ``scale * w_t``, the weights scaled to mean 1."""
    mean = sum(weight) / len(weight)
    return [scale * (w / mean) for w in weight]


def cart_of_factors(
    *, centre: torch.Tensor, factors: Factors, ranks: Sequence[int] | None, scale: float, weight: Sequence[float]
) -> torch.Tensor:
    """Return the same as :func:`cart`, from the factors of the centred matrices.

    :param centre: shape (m, n); overwritten.
    :param factors: of the centred matrices, in the models' order.
    :param ranks: how many directions of each model to keep; None: all.
    """
    from cart_hf.linalg.low_rank import weighted_sum

    if ranks is not None and min(ranks) >= min(centre.shape):
        return centre  # the centred task vectors sum to zero: spare the rounding
    mean = sum(weight) / len(weight)
    return centre.add_(weighted_sum(factors, [w / mean for w in weight], ranks), alpha=scale)


@method(
    "cart",
    title="CART",
    parameters=(
        RANK_RATIO,
        RANK,
        ENERGY,
        Parameter(
            "scale",
            1.0,
            "factor of the summed low-rank parts (λ; the paper code's prior)",
            aliases=("prior",),
            search=(1.0, 1.5, 2.0, 2.5, 3.0),
        ),
        WEIGHT,
        Parameter(
            "fuse_qkv",
            False,
            "decompose query, key and value stacked, as in the paper's open_clip layout",
            kind="boolean",
            planning=True,
        ),
        SOLVER,
    ),
    one_of=("rank_ratio", "rank", "energy"),
    summary="the average plus the scaled low-rank parts of the centred task vectors",
    equation="merged = A + scale * sum_t lowrank_k(W_t - A),  A = mean_t W_t",
    citation="Choi et al., Revisiting weight averaging for model merging (arXiv 2412.12153)",
    needs_base=False,
    low_rank=True,
    of_factors=cart_of_factors,
    linear=Linear(centred, coefficients),
)
def cart(
    *,
    models: torch.Tensor,
    scale: float,
    weight: Sequence[float],
    rank: int | None = None,
    energy: float | None = None,
    solver: Solver = "fast",
) -> torch.Tensor:
    """Return ``A + scale * sum_t w_t L_t`` for one matrix (the paper's rule, with weights).

    ``A = sum_t w_t W_t / sum_t w_t`` is the centre, ``L_t`` the best rank-``rank`` approximation of ``W_t - A``, and
    the weights are scaled to mean 1, so equal weights are the paper's CART and any weights give the centre at full
    rank. With two models the two terms cancel and the result is the centre for every rank and scale.

    :param models: shape (T, m, n), float32 or float64; overwritten.
    :param rank: k, 1 <= k <= min(m, n); None when ``energy`` decides.
    :param energy: share of each centred matrix's squared Frobenius norm to keep, in (0, 1].
    :param solver: how the singular directions are found, see :func:`cart_hf.linalg.low_rank.factorize`.
    :raises DecompositionError: when an eigenproblem does not converge or its result is not finite.
    """
    if rank is not None and rank >= min(models.shape[1:]):
        return average(models=models, weight=weight)  # the centred task vectors sum to zero: spare the rounding
    centre, factors = centred_factors(models, weight, rank=rank, energy=energy, solver=solver)
    return cart_of_factors(centre=centre, factors=factors, ranks=None, scale=scale, weight=weight)
