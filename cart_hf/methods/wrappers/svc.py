"""Singular value calibration: each direction of the update as long as the tasks' own updates say it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cart_hf.methods.parameters import Parameter
from cart_hf.methods.wrappers.registry import Wrapper

if TYPE_CHECKING:
    import torch

ALPHA = Parameter(
    "alpha", 0.1, "least that a task's share of a direction counts: 1 / alpha is the most that one grows by", above=0,
    search=(0.1, 0.3, 1.0),
)  # fmt: skip


def svc(*, merged: torch.Tensor, base: torch.Tensor, models: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return ``base + U diag(γ σ) V^T`` for the update ``merged - base = U diag(σ) V^T``.

    Direction r of the update answers ``a_r = u_r^T (merged - base)``, task t's own update ``a_r^t = u_r^T τ_t``. The
    update has ``s_r^t = <a_r, a_r^t> / ||a_r^t||^2`` times as much of the latter as the task asks for, and
    ``γ_r = T / sum_t max(alpha, s_r^t)``. A task that has nothing in a direction counts as ``alpha`` there.

    Where singular values tie (all do after Iso-C), so do the vectors, and the calibration is that of the ones which
    the decomposition happens to return.

    Time is O((T + 1) m n r + r^3), r = min(m, n); memory two matrices m x n beside the models.

    :param merged: shape (m, n), the result of any method.
    :param base: shape (m, n).
    :param models: shape (T, m, n).
    :raises DecompositionError: when the update's decomposition fails.
    """
    import torch

    from cart_hf.linalg.directions import directions

    found = directions(merged - base)
    answer = found.singular[:, None] * found.right
    shares = torch.zeros_like(found.singular)
    for model in models:
        own = found.left.mT @ (model - base).to(found.left.dtype)
        square = own.square().sum(dim=1)
        share = (answer * own).sum(dim=1) / torch.where(square > 0, square, 1.0)
        shares += share.clamp_(min=alpha)
    change = (len(models) / shares - 1)[:, None] * answer  # so that what needs no calibration stays as it is
    return merged + (found.left @ change).to(merged.dtype)


WRAPPER = Wrapper(
    name="svc",
    title="SVC",
    parameters=(ALPHA,),
    summary="rescale the update's singular values, where the tasks' updates pile up or are lost",
    equation="merged' = base + U diag(γ σ) V^T,  γ_r = T / sum_t max(alpha, <a_r, u_r^T τ_t> / ||u_r^T τ_t||^2)",
    citation="When shared knowledge hurts: spectral over-accumulation in model merging (arXiv 2602.05536)",
    matrix=svc,
)
