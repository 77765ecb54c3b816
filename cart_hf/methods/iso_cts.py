"""Iso-CTS: Iso-C, its weakest directions replaced by directions of the single tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cart_hf.methods.cart import SOLVER
from cart_hf.methods.iso_c import CITATION, SCALE
from cart_hf.methods.parameters import Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch

    from cart_hf.linalg.gram import Solver


@method(
    "iso_cts",
    title="Iso-CTS",
    parameters=(
        Parameter(
            "common_fraction",
            0.8,
            "share of the directions taken from the sum of the task vectors; the rest is the tasks' own",
            low=0,
            high=1,
            aliases=("common_space_fraction",),
            search=(0.6, 0.8, 0.9),
        ),
        SCALE,
        SOLVER,
    ),
    summary="Iso-C with the weakest common directions replaced by those of the single tasks",
    equation="merged = base + scale * mean(sigma) * whiten([U_1 ... U_T U_c]) whiten([V_1 ... V_T V_c])^T,  "
    "U_c diag V_c^T = lowrank_k(sum_t D_t),  U_t diag V_t^T = lowrank_s(D_t - U_c U_c^T D_t),  D_t = W_t - base",
    citation=CITATION,
    matrices=True,
    line=True,
)
def iso_cts(
    *, models: torch.Tensor, base: torch.Tensor, common_fraction: float, scale: float, solver: Solver = "fast"
) -> torch.Tensor:
    """Return ``base + scale * σ̄ U V^T`` of the common directions and of those of the single tasks.

    1. The top k directions of the sum of the task vectors are common. With ``r = min(m, n)`` and f the fraction,
       ``k = r - T s`` and ``s = round((r - int(f r)) / T)``, as the authors' code has it. (s is at most ``r // T``:
       theirs goes wrong where rounding up asks for more than r. With s = 0, as for T > 2 r (1 - f), it is Iso-C.)
    2. Of each task vector the top s directions of ``τ_t - U_c U_c^T τ_t`` are its own. With one model they are the rest
       of its directions, and this is Iso-C again.
    3. All left vectors are made orthonormal together (:func:`cart_hf.linalg.directions.orthonormal`), and so are all
       right ones. All get the mean σ̄ of their singular values.

    Directions that are nothing but rounding are dropped, and are not in the mean; see :func:`cart_hf.methods.iso_c`.

    Time is O(T m n r + r^3): three eigenproblems in float64, and T truncations to s directions by ``solver``.

    :param models: shape (T, m, n), float; overwritten.
    :param base: shape (m, n).
    :param scale: α; the authors search 0.1 to 3 on validation data.
    :param solver: how the tasks' own directions are found, see :func:`cart_hf.linalg.low_rank.factorize`.
    :raises DecompositionError: when an eigenproblem fails.
    """
    import torch

    from cart_hf.linalg.directions import LEAST, Directions, directions, rounding, side_by_side, whitened_sum
    from cart_hf.linalg.low_rank import factorize

    tasks, smaller = len(models), min(base.shape)
    own = min(round((smaller - int(common_fraction * smaller)) / tasks), smaller // tasks)
    models.sub_(base)
    parts = directions(models.sum(dim=0), rounding(base, tasks)).cut(smaller - tasks * own)
    if own:
        longest = torch.linalg.vector_norm(models, dim=(1, 2)).max()
        floor = max(rounding(base), LEAST * float(longest))  # what the projection leaves of common directions
        common = parts.left.to(models.dtype)
        factors = factorize(models.sub_(common @ (common.mT @ models)), rank=own, solver=solver)
        left, singular, right = side_by_side(factors, floor)
        parts = Directions(
            torch.cat([left, parts.left], dim=1),
            torch.cat([singular, parts.singular]),
            torch.cat([right, parts.right]),
        )
    if len(parts.singular) == 0:
        return base.clone()
    mean = parts.singular.mean().expand(len(parts.singular))
    return whitened_sum(parts, mean).mul_(scale).to(base.dtype).add_(base)
