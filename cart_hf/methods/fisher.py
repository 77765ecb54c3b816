"""Fisher merging: each entry averaged by how much the models' answers depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cart_hf.methods.parameters import WEIGHT, Parameter
from cart_hf.methods.registry import method

if TYPE_CHECKING:
    import torch


@method(
    "fisher",
    title="Fisher merging",
    parameters=(
        Parameter(
            "normalize",
            True,
            "bring the models' Fisher information to one norm, as the paper's code does",
            kind="boolean",
            planning=True,
        ),
        Parameter("floor", 1e-12, "added to every entry's Fisher information", above=0),
        WEIGHT,
    ),
    summary="the average of each entry, weighted by its (diagonal) Fisher information in every model",
    equation="merged = sum_t w_t F_t W_t / sum_t w_t F_t,  F_t = mean_x sum_c p_c (d log p_c / d W_t)^2 + floor",
    citation="Matena and Raffel, Merging models with Fisher-weighted averaging (arXiv 2111.09832)",
    needs_base=False,
    calibration="fisher",
)
def fisher(*, models: torch.Tensor, fisher: torch.Tensor, weight: Sequence[float], floor: float) -> torch.Tensor:
    """Return ``sum_t w_t F_t W_t / sum_t w_t F_t``, entry by entry, ``floor`` added to every ``F_t``.

    Where no model's answers depend on an entry, that is the (weighted) average. Time and memory: O(T) for each entry.

    With ``normalize`` the floor is added to what has been brought to one norm. The authors' code raises each ``F_t`` to
    its floor before that, and only the first model's by default: where all are below it, the model of the least norm
    decides there, here they count alike.

    :param models: shape (T, ...), float32 or float64; overwritten.
    :param fisher: the diagonal of the Fisher information, >= 0, of the same shape; overwritten.
    """
    shares = fisher.add_(floor).mul_(fisher.new_tensor(list(weight)).view(-1, *[1] * (fisher.dim() - 1)))
    return models.mul_(shares.div_(shares.sum(dim=0))).sum(dim=0)
