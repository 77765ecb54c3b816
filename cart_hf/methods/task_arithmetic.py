"""Task arithmetic: add the scaled sum of the task vectors to the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cart_hf.methods.linear import Linear
from cart_hf.methods.parameters import WEIGHT, Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch

SCALE = Parameter(
    "scale",
    0.3,
    "factor of the summed task vectors (lambda)",
    aliases=("lambda",),
    search=(0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0),
    weighted_default=1.0,  # a recipe that weighs its models means the weights: mergekit's lambda defaults to 1
)
NORMALIZE = Parameter("normalize", False, "divide the weights by their sum", kind="boolean")


def terms(*, models: torch.Tensor, base: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the base and the task vectors, see :class:`cart_hf.methods.linear.Linear`."""
    return base, models.sub_(base)


def coefficients(*, scale: float, weight: Sequence[float], normalize: bool = False, **_: Any) -> list[float]:
    """Return ``scale * w_t``, divided by ``sum_t w_t`` when ``normalize``."""
    factor = scale / sum(weight) if normalize else scale
    return [factor * w for w in weight]


@method(
    "task_arithmetic",
    title="task arithmetic",
    parameters=(SCALE, WEIGHT, NORMALIZE),
    summary="the base plus the scaled sum of the task vectors",
    equation="merged = base + scale * sum_t w_t (W_t - base)",
    citation="Ilharco et al., Editing models with task arithmetic (arXiv 2212.04089)",
    linear=Linear(terms, coefficients),
)
def task_arithmetic(
    *,
    models: torch.Tensor,
    base: torch.Tensor,
    scale: float,
    weight: Sequence[float],
    normalize: bool = False,
) -> torch.Tensor:
    """Return ``base + scale * sum_t w_t (W_t - base)``.

    :param models: shape (T, ...), float; overwritten.
    :param base: shape (...).
    :param scale: λ; 0.3 suits eight tasks (methods in the literature search 0.1 to 1).
    """
    return add_task_vectors(models.sub_(base), base, scale, weight, normalize=normalize)


def add_task_vectors(
    task_vectors: torch.Tensor, base: torch.Tensor, scale: float, weight: Sequence[float], *, normalize: bool
) -> torch.Tensor:
    """Return ``base + scale * sum_t w_t τ_t``.

    :param task_vectors: shape (T, ...), float; overwritten.
    :param base: shape (...).
    """
    total = task_vectors[0].mul_(weight[0])
    for task_vector, w in zip(task_vectors[1:], weight[1:], strict=True):
        total.add_(task_vector, alpha=w)
    return total.mul_(scale / sum(weight) if normalize else scale).add_(base)
