"""LiNeS: the update of deep blocks is scaled up, and that of shallow ones down, on a line over the depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cart_hf.methods.parameters import Parameter
from cart_hf.methods.wrappers.registry import Place, Wrapper

if TYPE_CHECKING:
    import torch

ALPHA = Parameter("alpha", None, "factor of the first block; default: so that it moves as far as the average", low=0)
BETA = Parameter("beta", 1.0, "by how much the last block's factor is larger", search=(0.25, 0.5, 1.0, 1.5, 2.0))


def measure(*, merged: torch.Tensor, base: torch.Tensor, models: torch.Tensor) -> torch.Tensor:
    """Return ``||sum_t τ_t||_1`` and ``||merged - base||_1``, float64, CPU, shape (2,).

    :param merged: any slice of a tensor, in any shape (...).
    :param base: shape (...).
    :param models: shape (T, ...).
    """
    import torch

    summed = torch.zeros_like(base)
    for model in models:
        summed += model - base
    return torch.tensor([float(part.abs_().sum()) for part in (summed, merged - base)], dtype=torch.float64)


def factors(
    *,
    measured: Mapping[str, torch.Tensor],
    block: Mapping[str, Place | None],
    models: int,
    alpha: float | None,
    beta: float,
) -> dict[str, float]:
    """Return ``alpha + beta * l / (L - 1)`` for the tensors of block l of L, and ``alpha`` for all others.

    :param measured: what :func:`measure` returned of each tensor; not needed when ``alpha`` is given.
    :param block: each tensor's block, or None; of two towers each has its own L.
    :param models: T.
    :param alpha: None: ``||sum_t τ_t||_1 / ||merged - base||_1 / T`` over all the tensors measured.
    """
    if alpha is None:
        summed, moved = (sum(float(pair[i]) for pair in measured.values()) for i in (0, 1))
        alpha = summed / moved / models if moved > 0 else 1 / models
    return {name: alpha + beta * _steps(place) for name, place in block.items()}


def _steps(place: Place | None) -> float:
    return place.index / max(place.count - 1, 1) if place is not None else 0.0


WRAPPER = Wrapper(
    name="lines",
    title="LiNeS",
    parameters=(ALPHA, BETA),
    summary="scale the update linearly with depth",
    equation="merged' = base + (alpha + beta * l / (L - 1)) * (merged - base) in block l of L; alpha outside of them",
    citation="Wang et al., LiNeS: post-training layer scaling (arXiv 2410.17146)",
    factors=factors,
    measure=measure,
    needs=lambda parameters: parameters.get("alpha") is None,
)
