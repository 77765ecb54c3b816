"""TIES-merging: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cart_hf.methods.linear import Linear
from cart_hf.methods.parameters import WEIGHT, Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch

# Masks are numbers, 0.0 and 1.0: on a CPU torch computes with them several times faster than with booleans.


def agreeing(
    *,
    models: torch.Tensor,
    base: torch.Tensor,
    thresholds: Sequence[float],
    weight: Sequence[float],
    normalize: bool = True,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the base and the trimmed task vectors where they agree (AdaMerging++'s), see :func:`ties`.

    With ``normalize`` each entry is divided by the weight of all that agree, so that their sum is the disjoint mean.
    """
    return base, agreed(trimmed(models.sub_(base), thresholds), weight, normalize=normalize)


def agreed(task_vectors: torch.Tensor, weight: Sequence[float], *, normalize: bool) -> torch.Tensor:
    """Return task vectors times their weights where they agree with the sign that is elected for the entry.

    :param task_vectors: trimmed, shape (T, ...); overwritten.
    :param normalize: divide each entry by the weight of all that agree.
    """
    sign = _elected_sign(task_vectors, weight)
    mass = sign.new_zeros(sign.shape)
    for task_vector, w in zip(task_vectors, weight, strict=True):
        mass.add_(task_vector.mul_(sign).clamp_(min=0.0).sign(), alpha=w)
        task_vector.mul_(w)
    if normalize:
        task_vectors.div_(mass.add_(mass.clone().eq_(0.0)))
    return task_vectors.mul_(sign)


def coefficients(*, scale: float, weight: Sequence[float], **_: Any) -> list[float]:
    """Return ``scale`` for each task."""
    return [scale] * len(weight)


def trimmed(task_vectors: torch.Tensor, thresholds: Sequence[float]) -> torch.Tensor:
    """Return task vectors, which are overwritten, without the entries that are smaller than their thresholds."""
    mask = task_vectors.new_zeros(task_vectors.shape[1:])
    for task_vector, threshold in zip(task_vectors, thresholds, strict=True):
        task_vector.mul_(mask.copy_(task_vector).abs_().ge_(threshold))
    return task_vectors


def _elected_sign(task_vectors: torch.Tensor, weight: Sequence[float]) -> torch.Tensor:
    """Return the sign that is elected for each entry."""
    elected = task_vectors.new_zeros(task_vectors.shape[1:])
    for task_vector, w in zip(task_vectors, weight, strict=True):
        elected.add_(task_vector, alpha=w)
    return elected.ge_(0.0).mul_(2.0).sub_(1.0)


_SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5)


@method(
    "ties",
    title="TIES",
    parameters=(
        Parameter("scale", 1.0, "factor of the merged task vector (lambda)", aliases=("lambda",), search=_SCALES),
        Parameter(
            "density",
            0.2,
            "fraction of the entries of each task vector that is kept",
            above=0,
            high=1,
            per_model=True,
            search=(0.1, 0.2, 0.4),
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
    linear=Linear(agreeing, coefficients),
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

    :param models: shape (T, ...), float; overwritten.
    :param base: shape (...).
    :param thresholds: T magnitudes; over the whole model (the paper) or this tensor (``per_tensor``).
    """
    sign = _elected_sign(trimmed(models.sub_(base), thresholds), weight)
    total, mass = base.new_zeros(base.shape), base.new_zeros(base.shape)
    for task_vector, w in zip(models, weight, strict=True):
        agreeing = task_vector.mul_(sign).clamp_(min=0.0)  # the magnitude where the sign is the elected one
        total.add_(agreeing, alpha=w)
        mass.add_(agreeing.sign_(), alpha=w)
    if normalize:
        total.div_(mass.add_(mass.clone().eq_(0.0)))
    return total.mul_(sign).mul_(scale).add_(base)
