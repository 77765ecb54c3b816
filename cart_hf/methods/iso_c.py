"""Iso-C: the sum of the task vectors with all its singular values made equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cart_hf.methods.parameters import Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch

SCALE = Parameter(
    "scale",
    1.0,
    "factor of the merged task vector (alpha)",
    aliases=("alpha",),
    search=(0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0),
)
CITATION = "Marczak et al., No Task Left Behind: isotropic model merging (arXiv 2502.04959)"


@method(
    "iso_c",
    title="Iso-C",
    parameters=(SCALE,),
    summary="the base plus the sum of the task vectors, all its singular values set to their mean",
    equation="merged = base + scale * mean(sigma) * U V^T,  U diag(sigma) V^T = sum_t (W_t - base)",
    citation=CITATION,
    matrices=True,
    line=True,
)
def iso_c(*, models: torch.Tensor, base: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``base + scale * σ̄ U V^T``, where ``U diag(σ) V^T`` is the SVD of the sum of the task vectors.

    ``σ̄`` is the mean of the singular values that are more than rounding, and the others' directions are dropped: the
    sum of the singular values is kept. The authors' code takes the mean over all min(m, n) and gives it to all. That is
    the same for a sum of full rank, as that of fine-tuned models is. Of a sum of rank k < min(m, n) (LoRA) it makes the
    update min(m, n) / k times shorter in its own directions, and fills all others with noise of the same length.

    Time is O(T m n + m n r + r^3), r = min(m, n): one eigenproblem in float64, no SVD.

    :param models: shape (T, m, n), float; overwritten.
    :param base: shape (m, n).
    :param scale: α; the authors search 0.1 to 3 on validation data.
    :raises DecompositionError: when the eigenproblem fails.
    """
    from cart_hf.linalg.directions import directions, rounding

    left, singular, right = directions(models.sub_(base).sum(dim=0), rounding(base, len(models)))
    if len(singular) == 0:
        return base.clone()
    return (left @ right).mul_(scale * singular.mean()).to(base.dtype).add_(base)
