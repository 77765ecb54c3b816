"""Methods whose result is linear in one coefficient for each model: what merges with learnt coefficients build on.

    merged = centre + sum_t c_t term_t

Task arithmetic's centre is the base and its terms are the task vectors; TIES' terms are what trimming and the election
of signs leave of them; CART's centre is the average and its terms are the (truncated) centred task vectors. With the
coefficients that the method itself uses, the sum is the method's own result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Terms = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Linear:
    """A method's centre, terms and coefficients.

    :param terms: takes what the method's function takes, and returns the centre, shape (...), and the terms, shape
        (T, ...); may overwrite ``models``. The centre depends on the models, their weights and the base, and on no
        other parameter. Of a low-rank method it is called for the tensors that are not decomposed:
        the terms of the others are the factors.
    :param coefficients: takes the declared parameters; returns the T coefficients that the method itself uses.
    """

    terms: Callable[..., Terms]
    coefficients: Callable[..., list[float]]


def combine(centre: torch.Tensor, terms: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    """Return ``centre + sum_t c_t term_t``.

    :param centre: shape (...), float.
    :param terms: shape (T, ...).
    """
    total = terms[0] * coefficients[0]
    for term, coefficient in zip(terms[1:], coefficients[1:], strict=True):
        total.add_(term, alpha=coefficient)
    return total.add_(centre)
