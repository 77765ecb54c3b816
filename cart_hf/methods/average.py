"""Weight averaging: model soups without the oven."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cart_hf.methods.parameters import WEIGHT, Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch


@method(
    "average",
    title="weight average",
    aliases=("linear",),
    parameters=(
        WEIGHT,
        Parameter("normalize", True, "divide by the sum of the weights", kind="boolean"),
    ),
    summary="the (weighted) average of the fine-tuned weights",
    equation="merged = sum_t w_t W_t / sum_t w_t",
    citation="Wortsman et al., Model soups (arXiv 2203.05482)",
    needs_base=False,
)
def average(*, models: torch.Tensor, weight: Sequence[float], normalize: bool = True) -> torch.Tensor:
    """Return ``sum_t w_t W_t``, divided by ``sum_t w_t`` when ``normalize``.

    :param models: shape (T, ...), float.
    :param weight: T weights.
    """
    total = models[0] * weight[0]
    for model, w in zip(models[1:], weight[1:], strict=True):
        total.add_(model, alpha=w)
    return total.div_(sum(weight)) if normalize else total
