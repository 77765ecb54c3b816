"""ACE-merging: what RegMean does with the inputs' second moments, which are estimated from the task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cart_hf.methods.parameters import Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch

_LEAST = 1e-10  # of tr Σ: the least ε that a solution in float64 bears
_ROUNDING = 1e-12  # of a matrix's squared norm: what float32 may leave of a zero


@method(
    "ace",
    title="ACE-merging",
    parameters=(
        Parameter(
            "scale", 1.0, "factor of the merged task vector", aliases=("lambda",), search=(0.5, 0.75, 1.0, 1.25, 1.5)
        ),
        Parameter(
            "epsilon",
            1e-5,
            "added to the diagonal of each estimate (the paper: 4e-2 for GPT-2, 2e-4 for RoBERTa-base)",
            above=0,
            search=(1e-5, 2e-4, 1e-2, 4e-2),
        ),
        Parameter("threshold", 0.3, "heterogeneity of the tasks above which they are normalised and refined", low=0),
        Parameter("top_fraction", 0.3, "share of the singular directions that the refinement adds to", above=0, high=1),
    ),
    summary="closed-form merge by second moments that are estimated from the task vectors",
    equation="merged = base + scale * (sum_t D_t S_t) (sum_t S_t + C)^-1,  S_t = D_t^T D_t + ε I,  D_t = centred τ_t",
    citation="Xu et al., ACE-merging (CVPR 2026, arXiv 2603.02945)",
    matrices=True,
    line=True,
)
def ace(
    *,
    models: torch.Tensor,
    base: torch.Tensor,
    scale: float,
    epsilon: float = 1e-5,
    threshold: float = 0.3,
    top_fraction: float = 0.3,
) -> torch.Tensor:
    """Return ``base + scale * W``, W merged from the task vectors τ_t with an estimate of each task's inputs.

    1. ``D_t = τ_t`` less the mean of its rows; ``Σ_t = D_t^T D_t`` stands for the second moment of the task's inputs.
    2. Heterogeneity ``γ = Var_t[log ||τ_t||^2] / Mean_t[log ||τ_t||^2]^2``. Above ``threshold`` each task is
       normalised: from here on ``Σ_t / tr Σ_t`` stands for ``Σ_t`` and ``ε / tr Σ_t`` for ``ε``. ``S_t = Σ_t + ε I``.
    3. ``C = 1 c^T`` with ``c^T = 1^T sum_t Σ_t / n``, above the threshold divided by ``Mean_t ||τ_t||^2``.
       ``W = (sum_t D_t S_t) (sum_t S_t + C)^-1``.
    4. Above the threshold only: ``W + sum_t τ_t (Σ_t - Mean_t S_t) = U diag(σ) V^T``, and with k = ``top_fraction`` of
       all directions ``W += Mean(σ_1 ... σ_k) U_k V_k^T``.

    These are the published equations as the authors' code computes them (Var over T - 1; that code's own default for ε
    is 1e-2). Neither ε nor γ is free of the task vectors' scale. Ours: a task that changed nothing, or each row alike,
    is left out of every sum and mean (the code divides ε by 1e-12 there, which drowns all others), k is at least 1, and
    ε at least 1e-10 tr Σ_t: beside longer task vectors it would vanish, and leave a sum that cannot be inverted. The
    mean of τ_t's rows is lost by step 3, so that even a single model does not quite come back.

    Cost for m x n matrices: O(T m n min(m, n) + T m n^2 + n^3), above the threshold O(min(m, n)^3 + m n^2) besides;
    memory beside the models: four matrices n x n and six m x n.

    :param models: shape (T, m, n), float32 or float64; overwritten.
    :param base: shape (m, n).
    :raises DecompositionError: when the refinement's decomposition fails.
    """
    import torch

    from cart_hf.linalg.cubic import gram_and_cubic
    from cart_hf.linalg.directions import directions
    from cart_hf.linalg.gram import widened

    squares, centred_squares = _squared_norms(models.sub_(base))
    changed = [t for t, square in enumerate(squares) if centred_squares[t] > _ROUNDING * square]
    if not changed:
        return base.clone()
    heterogeneous = _heterogeneity([squares[t] for t in changed]) > threshold

    total = widened(models[0]).clone().zero_()  # sum_t τ_t, then sum_t D_t S_t and sum_t τ_t Σ_t
    target, matched = total.clone(), total.clone()
    moments = total.new_zeros(total.shape[1], total.shape[1])  # sum_t Σ_t
    ridge = 0.0
    for t in changed:
        task_vector = widened(models[t])
        mean = task_vector.mean(dim=0)
        gram, cubic = gram_and_cubic(task_vector - mean)
        share = 1 / centred_squares[t] if heterogeneous else 1.0
        least = max(epsilon, _LEAST * centred_squares[t])
        ridge += least * share
        moments.add_(gram, alpha=share)
        target.add_(cubic, alpha=share).add_(task_vector - mean, alpha=least * share)
        if heterogeneous:
            total.add_(task_vector)
            matched.add_(cubic, alpha=share).add_(mean @ gram, alpha=share)

    prior = moments.mean(dim=0)  # added to every row
    if heterogeneous:
        prior /= sum(squares[t] for t in changed) / len(changed)
    moments.diagonal().add_(ridge)  # now sum_t S_t
    update: torch.Tensor = torch.linalg.solve(moments + prior, target, left=False)
    if heterogeneous:
        fused = matched.addmm_(total, moments, alpha=-1 / len(changed)).add_(update)
        top = directions(fused).cut(max(1, int(top_fraction * min(fused.shape))))
        update.addmm_(top.left, top.right, alpha=float(top.singular.mean()) if len(top.singular) else 0.0)
    return base + update.to(base.dtype).mul_(scale)


def _squared_norms(task_vectors: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return ``||τ_t||^2``, and what is left of it without the mean of its rows, ``tr Σ_t``."""
    from cart_hf.linalg.gram import widened

    pairs = []
    for task_vector in map(widened, task_vectors):
        mean = task_vector.mean(dim=0)
        pairs.append((float(task_vector.square().sum()), float((task_vector - mean).square().sum())))
    return [square for square, _ in pairs], [centred for _, centred in pairs]


def _heterogeneity(squares: Sequence[float]) -> float:
    """Return ``Var[log ||τ||^2] / Mean[log ||τ||^2]^2``."""
    logs = [math.log(square) for square in squares]
    mean = sum(logs) / len(logs)
    if len(logs) == 1 or mean == 0.0:
        return 0.0 if len(set(logs)) == 1 else math.inf
    return sum((log - mean) ** 2 for log in logs) / (len(logs) - 1) / mean**2
