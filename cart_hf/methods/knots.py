"""KnOTS: task vectors turned into common coordinates before TIES merges them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cart_hf.methods.parameters import WEIGHT, Parameter
from cart_hf.methods.registry import method
from cart_hf.methods.ties import ties

if TYPE_CHECKING:
    import torch


@method(
    "knots",
    title="KnOTS-TIES",
    aliases=("knots_ties",),
    parameters=(
        Parameter(
            "scale",
            1.0,
            "factor of the merged task vector (lambda)",
            aliases=("lambda",),
            search=(0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5),
        ),
        Parameter(
            "density",
            0.2,
            "fraction of the entries of each task's coordinates that is kept",
            above=0,
            high=1,
            per_model=True,
            search=(0.1, 0.2, 0.4, 1.0),
        ),
        WEIGHT,
        Parameter("normalize", True, "disjoint mean of the agreeing entries; false: their sum", kind="boolean"),
    ),
    summary="TIES on the task vectors in the coordinates of their common left singular vectors; for LoRA",
    equation="merged = base + scale * U disjoint_mean(trim(S V_t)),  "
    "U S [V_1 ... V_T] = svd([W_1 - base ... W_T - base])",
    citation="Stoica et al., Model merging with SVD to tie the KnOTS (arXiv 2410.19735)",
    matrices=True,
    line=True,
)
def knots(
    *,
    models: torch.Tensor,
    base: torch.Tensor,
    scale: float,
    density: Sequence[float],
    weight: Sequence[float],
    normalize: bool = True,
) -> torch.Tensor:
    """Return ``base + scale * U TIES(Σ V_1, ..., Σ V_T)``, where ``[τ_1 ... τ_T] = U Σ [V_1 ... V_T]``.

    U are the left singular vectors of the task vectors side by side, so the coordinates ``Σ V_t = U^T τ_t`` of the
    tasks share a basis: that is what makes LoRA updates, which lie in different ones, fit for an entry-wise merge.
    :func:`cart_hf.methods.ties.ties` trims and merges them, U takes the result back.

    Differences from the authors' code: each matrix is trimmed by itself (there: one threshold for all matrices of a
    model together); directions that are nothing but rounding are dropped by a bound that follows from the base (there:
    σ <= 1e-5), which matters because ``density`` counts the entries of those that are kept; an elected sum of exactly
    zero counts as +. What is linear, KnOTS with task arithmetic, is not changed by a turn: use ``task_arithmetic``.

    Time is O(T m^2 n + m^3): one eigenproblem of ``sum_t τ_t τ_t^T`` in float64, or of the smaller Gram matrix where
    T n < m; the SVD of an m x T n matrix is not formed.

    :param models: shape (T, m, n), float; overwritten.
    :param base: shape (m, n).
    :param scale: λ; the authors use 0.5 and 0.6.
    :param density: T numbers in (0, 1]; the authors use 0.2 for CLIP and 1 for Llama.
    :param weight: T numbers, as in TIES.
    :raises DecompositionError: when the eigenproblem fails.
    """
    import torch

    from cart_hf.linalg.directions import directions, eigenvectors, rounding
    from cart_hf.linalg.gram import widened

    floor = rounding(base, len(models))
    models.sub_(base)
    if len(models) * base.shape[1] < len(base):
        vectors = directions(torch.cat(list(models), dim=1), floor).left
    else:
        vectors = eigenvectors(sum(wide @ wide.mT for wide in map(widened, models)), floor)  # type: ignore[arg-type]
    if vectors.shape[1] == 0:
        return base.clone()
    vectors = vectors.to(models.dtype)
    coordinates = vectors.mT @ models
    merged = ties(
        models=coordinates,
        base=coordinates.new_zeros(coordinates.shape[1:]),
        thresholds=[_threshold(part, share) for part, share in zip(coordinates, density, strict=True)],
        scale=scale,
        weight=weight,
        normalize=normalize,
    )
    return (vectors @ merged).add_(base)


def _threshold(coordinates: torch.Tensor, density: float) -> float:
    """Return the magnitude from which on entries are kept: the k-th smallest of N, ``k = N - int(density N)``.

    That is one more than ``int(density N)``, as in the authors' code.
    """
    import numpy as np

    magnitudes = coordinates.abs().flatten().cpu().numpy()
    place = max(0, len(magnitudes) - int(density * len(magnitudes)) - 1)
    return float(np.partition(magnitudes, place)[place])  # ten times faster than torch's kthvalue
