"""SLERP: from one model to another along the arc between them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cart_hf.methods.parameters import Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch

NEARLY_PARALLEL = 0.9995  # cosine beyond which the arc is a line, as in mergekit


@method(
    "slerp",
    title="SLERP",
    parameters=(
        Parameter(
            "t",
            0.5,
            "where between the two models: 0 is the first, 1 the second",
            low=0,
            high=1,
            search=(0.3, 0.5, 0.7),
        ),
    ),
    summary="spherical interpolation between two models",
    equation="merged = sin((1 - t) θ) / sin θ * W_1 + sin(t θ) / sin θ * W_2, cos θ = <W_1, W_2> / (|W_1| |W_2|)",
    citation="Shoemake, Animating rotation with quaternion curves (SIGGRAPH 1985)",
    needs_base=False,
    survey="products",
    ordered=True,
    model_count=2,
)
def slerp(*, models: torch.Tensor, products: torch.Tensor, t: float) -> torch.Tensor:
    """Return ``sin((1 - t) θ) / sin θ W_1 + sin(t θ) / sin θ W_2``, θ the angle between the whole tensors.

    The line ``(1 - t) W_1 + t W_2`` where they are nearly parallel or opposite, as in mergekit, and where one is zero
    (mergekit takes a right angle there). A tensor that only one model has is that model's. O(n) for n elements, after
    one pass over both models.

    :param models: shape (2, ...), float, in the recipe's order; overwritten.
    :param products: inner products of the whole tensors, shape (2, 2), float64, on the CPU.
    """
    if len(models) == 1:
        return models[0]
    first, second = _weights(products, t)
    return models[0].mul_(first).add_(models[1], alpha=second)


def _weights(products: torch.Tensor, t: float) -> tuple[float, float]:
    (square, product), (_, other) = products.tolist()
    lengths = math.sqrt(square) * math.sqrt(other)
    if lengths == 0 or abs(product) > NEARLY_PARALLEL * lengths:
        return 1 - t, t
    angle = math.acos(product / lengths)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
