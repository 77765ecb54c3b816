"""DELLA: drop entries of the task vectors at random, small ones more likely than large ones, and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cart_hf.methods.breadcrumbs import ELECT_SIGNS, mixed
from cart_hf.methods.linear import Linear, combine
from cart_hf.methods.parameters import WEIGHT, Parameter
from cart_hf.methods.registry import method
from cart_hf.methods.ties import coefficients

if TYPE_CHECKING:
    import torch


def keep_probabilities(task_vector: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """Return the probability that each entry is kept, which grows with the rank of its magnitude in its row.

    The smallest has ``density - ε`` and the largest ``density + ε``, at equal steps, where ε is ``epsilon`` or what
    keeps them between 0 and 1; their mean is the density. Of equal entries the later ones rank higher.

    :param task_vector: shape (rows, columns).
    """
    import torch

    columns = task_vector.shape[1]
    half = min(epsilon, density, 1 - density) if columns > 1 else 0.0
    of_rank = torch.linspace(density - half, density + half, columns, dtype=task_vector.dtype)
    of_rank = of_rank.to(task_vector.device).expand_as(task_vector)
    return torch.empty_like(task_vector).scatter_(1, _order(task_vector.abs()), of_rank)


def _order(magnitudes: torch.Tensor) -> torch.Tensor:
    """Return the places of each row's entries from the smallest on; of equal ones the first comes first."""
    import torch

    if magnitudes.device.type != "cpu" or magnitudes.dtype != torch.float32:
        return magnitudes.argsort(dim=1, stable=True)
    # The bits of magnitudes order as integers do: NumPy sorts them, with their places below, five times faster.
    keys = magnitudes.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(torch.arange(magnitudes.shape[1]))
    keys.numpy().sort(axis=1)
    return keys.bitwise_and_(0xFFFFFFFF)


def terms(
    *,
    models: torch.Tensor,
    base: torch.Tensor,
    generators: Sequence[torch.Generator],
    density: Sequence[float],
    epsilon: Sequence[float],
    weight: Sequence[float],
    normalize: bool = True,
    rescale: bool = True,
    elect_signs: bool = True,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the base and what is left of the task vectors, see :class:`cart_hf.methods.linear.Linear`."""
    for task_vector, generator, keep, window in zip(models.sub_(base), generators, density, epsilon, strict=True):
        if keep == 1:
            continue
        probability = keep_probabilities(task_vector, keep, window)
        drawn = task_vector.new_empty(task_vector.shape, device="cpu").uniform_(generator=generator)
        task_vector.mul_(drawn.to(task_vector.device).lt_(probability))  # a mask of 0.0 and 1.0
        if rescale:
            task_vector.div_(probability.add_(probability.clone().eq_(0.0)))  # what has none is dropped
    return mixed(models, base, weight, normalize=normalize, elect_signs=elect_signs)


_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


@method(
    "della",
    title="DELLA",
    presets={"della_linear": {"elect_signs": False, "normalize": False}},
    parameters=(
        Parameter("scale", 1.0, "factor of the merged task vector (lambda)", aliases=("lambda",), search=_SCALES),
        Parameter(
            "density",
            0.5,
            "mean probability that an entry is kept (1 - p of the paper)",
            above=0,
            high=1,
            per_model=True,
            weighted_default=1.0,  # mergekit's default, for a recipe that weighs its models as mergekit's files do
        ),
        Parameter(
            "epsilon",
            0.15,
            "how far from the density the probabilities reach (half of the paper's window)",
            low=0,
            high=1,
            per_model=True,
        ),
        WEIGHT,
        Parameter(
            "normalize", True, "mean of the kept entries (of those that agree); false: their sum", kind="boolean"
        ),
        Parameter("rescale", True, "divide each kept entry by its probability", kind="boolean"),
        Parameter("elect_signs", True, f"{ELECT_SIGNS}; false: mergekit's della_linear", kind="boolean"),
    ),
    summary="task vectors thinned at random, small entries more than large ones, then merged where signs agree",
    equation="merged = base + scale * disjoint_mean(mask_t (W_t - base) / p_t), p_t by rank in the row",
    citation="Deep et al., DELLA-Merging (arXiv 2406.11617)",
    rows=True,
    random=True,
    linear=Linear(terms, coefficients),
)
def della(
    *,
    models: torch.Tensor,
    base: torch.Tensor,
    generators: Sequence[torch.Generator],
    scale: float,
    density: Sequence[float],
    epsilon: Sequence[float],
    weight: Sequence[float],
    normalize: bool = True,
    rescale: bool = True,
    elect_signs: bool = True,
) -> torch.Tensor:
    """Drop, elect, fuse.

    1. drop (MAGPRUNE): keep each entry of ``τ_t`` with the probability of its rank by magnitude in its row, see
       :func:`keep_probabilities`, and divide it by that probability, which keeps the expectation;
    2. elect and fuse as TIES does, see :func:`cart_hf.methods.ties.ties`, or add up everything.

    As the authors' code: its window is ``density ± epsilon`` (the paper's ε is the whole window, twice that), the
    kept entries are divided by their own probabilities, and a tensor of one dimension is one row. A row of a tensor
    of more than two dimensions is all that belongs to one index of its first, where mergekit ranks along its second;
    mergekit also rescales to the tensor's old L1 norm instead, and refuses a window that leaves (0, 1), which is
    narrowed here. O(T n log columns) for n elements.

    :param models: shape (T, rows, columns), float; overwritten.
    :param base: shape (rows, columns).
    :param generators: T seeded CPU generators; the masks are drawn on the CPU so that every device gives the same.
    """
    found = terms(
        models=models,
        base=base,
        generators=generators,
        density=density,
        epsilon=epsilon,
        weight=weight,
        normalize=normalize,
        rescale=rescale,
        elect_signs=elect_signs,
    )
    return combine(*found, coefficients(scale=scale, weight=weight))
