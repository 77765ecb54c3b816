"""DARE: drop random entries of the task vectors and rescale the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cart_hf.methods.linear import Linear
from cart_hf.methods.parameters import WEIGHT, Parameter
from cart_hf.methods.registry import method
from cart_hf.methods.task_arithmetic import NORMALIZE, SCALE, add_task_vectors, coefficients

if TYPE_CHECKING:
    import torch


def thinned(
    *,
    models: torch.Tensor,
    base: torch.Tensor,
    generators: Sequence[torch.Generator],
    density: Sequence[float],
    rescale: bool = True,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the base and the thinned task vectors, see :class:`cart_hf.methods.linear.Linear`."""
    for task_vector, generator, keep in zip(models.sub_(base), generators, density, strict=True):
        drawn = task_vector.new_empty(task_vector.shape, device="cpu").uniform_(generator=generator)
        task_vector.mul_(drawn.lt_(keep).to(task_vector.device))  # a mask of 0.0 and 1.0
        if rescale:
            task_vector.mul_(1.0 / keep)
    return base, models


@method(
    "dare",
    title="DARE",
    aliases=("dare_linear",),
    parameters=(
        SCALE,
        Parameter(
            "density",
            0.5,
            "probability that an entry is kept (1 - p of the paper)",
            above=0,
            high=1,
            per_model=True,
            weighted_default=1.0,  # mergekit's default, for a recipe that weighs its models as mergekit's files do
        ),
        WEIGHT,
        NORMALIZE,
        Parameter("rescale", True, "divide the kept entries by the density", kind="boolean"),
    ),
    summary="task arithmetic on randomly thinned, rescaled task vectors",
    equation="merged = base + scale * sum_t w_t mask_t (W_t - base) / density",
    citation="Yu et al., Language models are super Mario (arXiv 2311.03099)",
    random=True,
    linear=Linear(thinned, coefficients),
)
def dare(
    *,
    models: torch.Tensor,
    base: torch.Tensor,
    generators: Sequence[torch.Generator],
    scale: float,
    density: Sequence[float],
    weight: Sequence[float],
    normalize: bool = False,
    rescale: bool = True,
) -> torch.Tensor:
    """Keep each entry of ``τ_t`` with probability ``density``, divide it by ``density``, then do task arithmetic.

    The division by the density keeps the expectation (the paper's 1/(1-p)); mergekit rescales to the old L1 norm of
    the tensor instead, so its numbers differ.

    :param models: shape (T, ...), float; overwritten.
    :param base: shape (...).
    :param generators: T seeded CPU generators; the masks are drawn on the CPU so that every device gives the same.
    """
    _, terms = thinned(models=models, base=base, generators=generators, density=density, rescale=rescale)
    return add_task_vectors(terms, base, scale, weight, normalize=normalize)
