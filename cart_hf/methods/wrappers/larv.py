"""LARV: blocks whose update is structured and goes with the base are scaled up, those in conflict with it down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from cart_hf.methods.parameters import Parameter
from cart_hf.methods.wrappers.registry import Place, Wrapper

if TYPE_CHECKING:
    import torch

_TINY = 1e-8
_STEEPNESS = 3.0  # of the continuous gate

GATE = Parameter(
    "gate",
    "three",
    "levels of the factor: three (low, 1, high), two (low, high), or continuous between them",
    kind="choice",
    choices=("three", "two", "continuous"),
    search=("three", "two", "continuous"),
)
LOW = Parameter("low", 0.5, "least factor", low=0, high=1)
HIGH = Parameter("high", 1.5, "largest factor", low=1)
DEPTH = Parameter("depth", 0.5, "power of the relative depth in a block's score; 0: depth does not count", low=0)


def measure(*, base: torch.Tensor, models: torch.Tensor) -> torch.Tensor:
    """Return the effective-rank contrast, the conflict, and 1, of one matrix; zeros if its update or base is zero.

    With ``D = sum_t τ_t``, ``r(A) = exp(entropy(σ_i^2 / ||A||^2))``:
    contrast ``e = r(base) / r(D)``; conflict ``c = (||B D^T - D B^T|| + ||B^T D - D^T B||) / (2 ||B|| ||D||)``.
    Both are free of the scale of D, so that the sum serves as well as the mean.

    Only products of the size of the smaller side are formed: ``||P - P^T||^2 = 2 ||P||^2 - 2 tr P^2``,
    ``||B^T D||^2 = <B B^T, D D^T>`` and ``tr (B^T D)^2 = tr (B D^T)^2``. Time is O(m n r + r^3), r = min(m, n).

    :param base: B, shape (m, n), float32 or float64.
    :param models: shape (T, m, n).
    :return: float64, CPU, shape (3,).
    """
    import torch

    from cart_hf.linalg.gram import widened

    update = widened(models[0]) * 0.0
    for model in models:
        update += model - base
    own = widened(base)
    if own.shape[0] > own.shape[1]:
        own, update = own.mT, update.mT
    norms = [float(torch.linalg.vector_norm(part)) for part in (own, update)]
    if not all(norms):
        return torch.zeros(3, dtype=torch.float64)
    own, update = own / norms[0], update / norms[1]
    grams, cross = [part @ part.mT for part in (own, update)], own @ update.mT
    contrast = _effective_rank(grams[0]) / (_effective_rank(grams[1]) + _TINY)
    shared = float((cross * cross.mT).sum())  # tr (B D^T)^2
    squares = float(cross.square().sum()), float((grams[0] * grams[1]).sum())
    conflict = sum(math.sqrt(max(2 * square - 2 * shared, 0.0)) for square in squares) / 2
    return torch.tensor([contrast, conflict, 1.0], dtype=torch.float64)


def _effective_rank(gram: torch.Tensor) -> float:
    """Return the exponential of the entropy of a Gram matrix's eigenvalues, of which the sum is 1."""
    import torch

    share = torch.linalg.eigvalsh(gram).clamp_(min=0.0)
    return math.exp(float(torch.special.entr(share).sum()))


def factors(
    *,
    measured: Mapping[str, torch.Tensor],
    block: Mapping[str, Place | None],
    models: int,
    gate: Literal["three", "two", "continuous"],
    low: float,
    high: float,
    depth: float,
) -> dict[str, float]:
    """Return the factor of each tensor's update: its block's, and 1 outside of the blocks.

    With e and c the means over the matrices of block l (from 1) of L, and c standardised over the blocks (z), a block
    scores ``g = e (l / L)^depth / (1 + softplus(z))``. ``three``: ``low`` in the lowest third of the scores, ``high``
    in the highest, else 1. ``two``: below and above their median. ``continuous``: 1 plus ``tanh(3 (g - 1))`` times the
    distance from 1 to ``high``, or to ``low`` where it is negative. Blocks of which nothing is measured keep 1.

    As far as the paper's equations are public to us: e, c, g and the continuous map with its constants are its own, the
    latter three as another implementation reports them. It prefers fixed levels to the continuous map; where they lie
    is ours (thirds of the scores, and the bounds of the continuous map), and so is the mean over a block's matrices.

    The paper scales the task vectors before they are merged. For every method whose update is as many times larger as
    they are, that is the same as scaling the update, which is what this does: not for TIES, DARE's and consensus'
    thresholds over several tensors, nor where a constant of its own has a scale (ACE's epsilon, WUDI's Adam).

    :param measured: what :func:`measure` returned of each matrix of the blocks.
    :param block: each tensor's block, or None.
    :param models: T; plays no part.
    """
    import torch

    totals: dict[Place, torch.Tensor] = {}
    for name, numbers in measured.items():
        place = block[name]
        if place is not None and numbers[2] > 0:
            totals[place] = totals.get(place, 0.0) + numbers
    if not totals:
        return dict.fromkeys(block, 1.0)
    contrast, conflict = torch.stack([totals[place][:2] / totals[place][2] for place in totals]).unbind(dim=1)
    spread = float(conflict.std(correction=0))
    standardised = (conflict - conflict.mean()) / (spread if spread > _TINY else 1.0)
    relative = torch.tensor([(place.index + 1) / place.count for place in totals], dtype=torch.float64)
    scores = contrast * relative**depth / (1 + torch.nn.functional.softplus(standardised))
    by_block = dict(zip(totals, _gated(scores.tolist(), gate, low, high), strict=True))
    return {name: by_block.get(place, 1.0) if place is not None else 1.0 for name, place in block.items()}


def _gated(scores: Sequence[float], gate: str, low: float, high: float) -> list[float]:
    import numpy as np

    if gate == "continuous":
        pushes = [math.tanh(_STEEPNESS * (score - 1)) for score in scores]
        return [1 + push * (high - 1 if push > 0 else 1 - low) for push in pushes]
    ends = (1 / 3, 2 / 3) if gate == "three" else (1 / 2, 1 / 2)
    lower, upper = np.quantile(scores, ends)
    slack = _TINY * max(scores)  # blocks that are equal but for rounding stay together
    return [low if score < lower - slack else high if score > upper + slack else 1.0 for score in scores]


WRAPPER = Wrapper(
    name="larv",
    title="LARV",
    parameters=(GATE, LOW, HIGH, DEPTH),
    summary="scale each block's update by its effective rank, its conflict with the base and its depth",
    equation="merged' = base + s_l (merged - base),  s_l by thirds of g_l = e_l (l / L)^depth / (1 + softplus(z_l))",
    citation="Wang et al., LARV: data-free layer-wise adaptive rescaling veneer for model merging (arXiv 2602.09413)",
    factors=factors,
    measure=measure,
    whole=True,
)
