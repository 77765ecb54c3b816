"""Consensus task arithmetic: keep the entries that at least two tasks need (TALL masks)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cart_hf.methods.linear import Linear
from cart_hf.methods.parameters import Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch


def masked(
    *, models: torch.Tensor, base: torch.Tensor, mask_threshold: Sequence[float], min_tasks: int, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the base and the masked task vectors, see :class:`cart_hf.methods.linear.Linear`."""
    task_vectors = models.sub_(base)
    mask = _votes(task_vectors, task_vectors.sum(dim=0), mask_threshold).ge_(min_tasks)
    return base, task_vectors.mul_(mask)


def coefficients(*, scale: float, mask_threshold: Sequence[float], **_: Any) -> list[float]:
    """Return ``scale`` for each task."""
    return [scale] * len(mask_threshold)


def _votes(task_vectors: torch.Tensor, total: torch.Tensor, mask_threshold: Sequence[float]) -> torch.Tensor:
    """Count the tasks that need each entry."""
    votes = total.new_zeros(total.shape)  # masks are numbers: torch computes with them faster than with booleans
    needed = total.new_empty(total.shape)
    for task_vector, threshold in zip(task_vectors, mask_threshold, strict=True):
        others = (total - task_vector).abs_().mul_(threshold)
        votes.add_(needed.copy_(task_vector).abs_().gt_(others))
    return votes


@method(
    "consensus",
    title="Consensus TA",
    parameters=(
        Parameter(
            "scale",
            0.3,
            "factor of the masked sum of task vectors",
            aliases=("lambda",),
            search=(0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
        ),
        Parameter(
            "mask_threshold",
            0.6,
            "λ of the TALL mask: larger keeps fewer entries (the authors search 0.2 to 0.6 per task)",
            low=0,
            per_model=True,
            search=(0.2, 0.4, 0.6),
        ),
        Parameter("min_tasks", 2, "how many tasks must need an entry", kind="integer", low=0),
    ),
    summary="task arithmetic on the entries that several tasks need",
    equation="merged = base + scale * consensus_mask * sum_t (W_t - base)",
    citation="Wang et al., Localizing task information (arXiv 2405.07813)",
    linear=Linear(masked, coefficients),
)
def consensus(
    *,
    models: torch.Tensor,
    base: torch.Tensor,
    scale: float,
    mask_threshold: Sequence[float],
    min_tasks: int,
) -> torch.Tensor:
    """Return ``base + scale * [count_t(m_t) >= min_tasks] * τ`` with ``τ = sum_t τ_t``.

    The mask of task t is ``m_t = |τ_t| > λ_t |τ - τ_t|``: where the task's own update is not drowned by the others'.

    :param models: shape (T, ...), float; overwritten.
    :param base: shape (...).
    """
    task_vectors = models.sub_(base)
    total = task_vectors.sum(dim=0)
    votes = _votes(task_vectors, total, mask_threshold)
    return total.mul_(votes.ge_(min_tasks)).mul_(scale).add_(base)
