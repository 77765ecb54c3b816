"""TIES-merging: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cart_hf.methods.parameters import WEIGHT, Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch


@method(
    "ties",
    title="TIES",
    parameters=(
        Parameter("scale", 1.0, "factor of the merged task vector (lambda)", aliases=("lambda",)),
        Parameter(
            "density",
            0.2,
            "fraction of the entries of each task vector that is kept",
            above=0,
            high=1,
            per_model=True,
            weighted_default=1.0,  # mergekit's default, for a recipe that weighs its models as mergekit's files do
            planning=True,
        ),
        WEIGHT,
        Parameter("normalize", True, "disjoint mean of the agreeing entries; false: their sum", kind="boolean"),
        Parameter(
            "per_tensor",
            False,
            "trim each tensor by itself, as mergekit does, not the whole model",
            kind="boolean",
            planning=True,
        ),
    ),
    summary="trimmed task vectors, merged where their signs agree",
    equation="merged = base + scale * disjoint_mean(trim(W_t - base))",
    citation="Yadav et al., TIES-Merging (arXiv 2306.01708)",
    survey="magnitude",
)
def ties(
    *,
    models: torch.Tensor,
    base: torch.Tensor,
    thresholds: Sequence[float],
    scale: float,
    weight: Sequence[float],
    normalize: bool = True,
) -> torch.Tensor:
    """Trim each task vector, elect a sign for each entry, and merge the entries of that sign.

    1. trim: ``τ_t`` keeps its entries with ``|τ_t| >= thresholds[t]`` (ties at the threshold are kept);
    2. elect: ``s = sign(sum_t w_t τ_t)``; a sum of exactly zero counts as + (as in mergekit; the authors' code takes
       the majority sign of the whole model there, which differs only where trimmed entries cancel exactly);
    3. merge: weighted mean (``normalize``) or sum of the entries of sign ``s``.

    :param models: shape (T, ...), float.
    :param base: shape (...).
    :param thresholds: T magnitudes; over the whole model (the paper) or this tensor (``per_tensor``).
    """
    elected = base.new_zeros(base.shape)
    trimmed = models
    for task_vector, threshold, w in zip(trimmed, thresholds, weight, strict=True):
        task_vector.sub_(base)
        task_vector.masked_fill_(task_vector.abs() < threshold, 0.0)
        elected.add_(task_vector, alpha=w)
    positive = elected >= 0
    total, mass = elected.zero_(), base.new_zeros(base.shape)
    for task_vector, w in zip(trimmed, weight, strict=True):
        agrees = ((task_vector > 0) & positive) | ((task_vector < 0) & ~positive)
        total.add_(task_vector * agrees, alpha=w)
        mass.add_(agrees, alpha=w)
    if normalize:
        total.div_(mass.masked_fill_(mass == 0, 1.0))
    return total.mul_(scale).add_(base)
