"""Model Breadcrumbs: neither the smallest nor the very largest entries of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cart_hf.methods.linear import Linear, combine
from cart_hf.methods.parameters import WEIGHT, Parameter
from cart_hf.methods.registry import method
from cart_hf.methods.task_arithmetic import NORMALIZE, SCALE
from cart_hf.methods.ties import agreed, coefficients

if TYPE_CHECKING:
    import torch

ELECT_SIGNS = "keep only the entries of the sign that TIES elects"


def kept_ranks(elements: int, density: float, gamma: float) -> tuple[int, int]:
    """Return the ranks of the first and the last entry that are kept, by magnitude, the smallest being 1.

    Of n entries, ``int(density n)`` are kept: the largest but for the ``int(gamma n)`` largest of all, of which fewer
    are dropped where too few would be left. At least one is kept, where mergekit may keep none.
    """
    kept = min(max(int(density * elements), 1), elements)
    top = min(int(gamma * elements), elements - kept)
    return elements - top - kept + 1, elements - top


def mixed(
    task_vectors: torch.Tensor, base: torch.Tensor, weight: Sequence[float], *, normalize: bool, elect_signs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the base and the terms of a (weighted) sum, or of TIES' after its election of signs.

    :param task_vectors: thinned already, shape (T, ...); overwritten.
    :param normalize: divide by the weights' sum: all of them, or those of the models that agree on an entry.
    """
    if elect_signs:
        return base, agreed(task_vectors, weight, normalize=normalize)
    total = sum(weight) if normalize else 1.0
    for task_vector, w in zip(task_vectors, weight, strict=True):
        task_vector.mul_(w / total)
    return base, task_vectors


def terms(
    *,
    models: torch.Tensor,
    base: torch.Tensor,
    thresholds: Sequence[tuple[float, float]],
    weight: Sequence[float],
    normalize: bool = False,
    elect_signs: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the base and what is left of the task vectors, see :class:`cart_hf.methods.linear.Linear`."""
    size, within = (base.new_empty(base.shape) for _ in range(2))
    for task_vector, (low, high) in zip(models.sub_(base), thresholds, strict=True):
        size.copy_(task_vector).abs_()
        task_vector.mul_(within.copy_(size).clamp_(low, high).eq_(size))  # a mask of 0.0 and 1.0
    return mixed(models, base, weight, normalize=normalize, elect_signs=elect_signs)


@method(
    "breadcrumbs",
    title="Breadcrumbs",
    presets={"breadcrumbs_ties": {"elect_signs": True}},
    parameters=(
        SCALE,
        Parameter(
            "density",
            0.15,
            "fraction of the entries of each task vector's tensor that is kept",
            above=0,
            high=1,
            per_model=True,
            search=(0.1, 0.15, 0.2),
            weighted_default=1.0,  # mergekit's defaults, for a recipe that weighs its models as mergekit's files do
            planning=True,
        ),
        Parameter(
            "gamma",
            0.006,
            "fraction of the entries, the largest, that is dropped first",
            low=0,
            high=1,
            per_model=True,
            weighted_default=0.01,
            planning=True,
        ),
        WEIGHT,
        NORMALIZE,
        Parameter("elect_signs", False, f"{ELECT_SIGNS} (mergekit's breadcrumbs_ties)", kind="boolean"),
    ),
    summary="task arithmetic without the smallest and the very largest entries",
    equation="merged = base + scale * sum_t w_t [low_t <= |W_t - base| <= high_t] (W_t - base)",
    citation="Davari and Belilovsky, Model Breadcrumbs (arXiv 2312.06795)",
    survey="outliers",
    linear=Linear(terms, coefficients),
)
def breadcrumbs(
    *,
    models: torch.Tensor,
    base: torch.Tensor,
    thresholds: Sequence[tuple[float, float]],
    scale: float,
    weight: Sequence[float],
    normalize: bool = False,
    elect_signs: bool = False,
) -> torch.Tensor:
    """Keep the entries of ``τ_t`` with ``low_t <= |τ_t| <= high_t``, then do task arithmetic, or TIES' mean or sum.

    The thresholds are order statistics of a whole tensor, as in the paper and in mergekit; the authors' code takes
    them of each row. Entries that tie at a threshold are all kept. mergekit with ``int(gamma n) = 0`` keeps nothing of
    a tensor, and drops what ties in the order of its sort: its numbers differ there. O(T n) for n elements, after two
    passes over the models.

    :param models: shape (T, ...), float; overwritten.
    :param base: shape (...).
    :param thresholds: T pairs of magnitudes, of the whole tensor.
    """
    found = terms(
        models=models, base=base, thresholds=thresholds, weight=weight, normalize=normalize, elect_signs=elect_signs
    )
    return combine(*found, coefficients(scale=scale, weight=weight))
