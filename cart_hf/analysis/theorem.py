"""Theorem 1 of the CART paper, checked on the vectors that really reach a Linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from cart_hf.analysis.model import Bound

if TYPE_CHECKING:
    from cart_hf.factors.store import Centred
    from cart_hf.linalg.low_rank import Factors
    from cart_hf.recipe.compression import Centre

ROUNDING = float(torch.finfo(torch.float32).eps)
"""Of a matrix (m, n), singular values up to this times max(m, n) times the largest are rounding, and dropped."""


def check_theorem(
    centred: Centred,
    *,
    name: str,
    centre: Centre,
    rank: int,
    inputs: Sequence[torch.Tensor],
    transposed: bool = False,
) -> Bound:
    """Compare what the other tasks' matrices do to a task's inputs with the bound by their row-space interference.

    The paper bounds the loss ``L = sum_t sum_i ||sum_{s != t} D_s x_ti||^2`` by ``O(I^2)`` for inputs near the row
    space of ``D_t`` (Theorem 1 of arXiv 2412.12153, as secondary sources state it; the paper's own text and constants
    were not at hand). For ``D_t = U_t S_t V_t`` of the given rank and ``x' = V_t^T c`` with ``c = V_t x`` it takes two
    steps: ``||D_s x'|| = ||S_s V_s x'|| = ||(S_s V_s V_t^T S_t) (S_t^-1 c)|| <= I_st ||S_t^-1 c||`` with ``I_st =
    ||S_s V_s V_t^T S_t||_F`` (Cauchy and Schwarz), and the triangle inequality over s. Hence ``loss <= sum_t sum_i
    (sum_{s != t} I_st ||S_t^-1 c_ti||)^2``, for any matrices and inputs; and where all ``||S_t^-1 c|| <= C``, the sum
    over N inputs is at most ``N C^2 I^2`` with ``I = sum_{s != t} I_st``.

    What the theorem takes for granted is measured beside it: ``inside``, and ``unprojected``, the loss of the inputs
    as they are. ``S_t^-1`` grows without limit for small singular values, so the more of them a rank includes, the
    looser the bound; those that are rounding (:data:`ROUNDING`) are left out, of all that is computed here.

    :param centred: factors of T matrices.
    :param name, centre: what they are of, and around what, for the result.
    :param rank: how many directions of each; all that the factors have where these are fewer.
    :param inputs: for each matrix the vectors that reach its Linear, shape (any number, n), of any floating type.
    :param transposed: whether the matrices are stored as (n, m), inputs first, as GPT-2's Conv1D stores them.
    :return: computed in float64; without inputs, or where all are zero, ``inside`` is NaN and the rest zero.
    """
    factors = centred.factors.cut(rank)
    tasks = range(len(factors.singular))
    parts = [_part(factors, t, transposed=transposed) for t in tasks]
    lengths = [torch.linalg.qr(part.left.double() * part.singular, mode="r").R for part in parts]
    loss = bound = unprojected = inside = whole = 0.0
    for t, given in zip(tasks, inputs, strict=True):
        own = parts[t]
        right = own.right.double()
        x = given.to(right)
        c = x @ right.mT
        both = torch.stack([c @ right, x])
        moved = both.new_zeros(2, len(x), len(own.left))
        reach = 0.0
        for s in tasks:
            if s != t:
                other = parts[s].right.double()
                # R of a QR decomposition for S_s: rounding may leave the left vectors a little askew
                reach += float(torch.linalg.matrix_norm(lengths[s] @ (other @ right.mT) * own.singular))
                moved += (both @ other.mT * parts[s].singular) @ parts[s].left.double().mT
        loss += float(moved[0].square().sum())
        unprojected += float(moved[1].square().sum())
        bound += reach**2 * float((c / own.singular).square().sum())
        inside += float(c.square().sum())
        whole += float(x.square().sum())
    return Bound(
        name,
        centre,
        rank,
        sum(map(len, inputs)),
        loss,
        bound,
        unprojected,
        inside / whole if whole else float("nan"),
    )


class _Part(NamedTuple):
    """The top directions of one matrix.

    :param left: shape (m, k), unit columns.
    :param singular: shape (k,), float64, none of them zero.
    :param right: shape (k, n), unit rows.
    """

    left: torch.Tensor
    singular: torch.Tensor
    right: torch.Tensor


def _part(factors: Factors, t: int, *, transposed: bool) -> _Part:
    left, singular, right = factors.left[t], factors.singular[t], factors.right[t]
    if left.device.type == "mps":  # which has no float64
        left, singular, right = left.cpu(), singular.cpu(), right.cpu()
    singular = singular.double()
    count = int((singular > ROUNDING * max(len(left), right.shape[1]) * singular[:1]).sum())  # the largest come first
    left, singular, right = left[:, :count], singular[:count], right[:count]
    return _Part(right.mT, singular, left.mT) if transposed else _Part(left, singular, right)
