"""What an analysis found, as plain records: numbers, lists and NumPy arrays, for JSON, CSV and data frames.

Everything is measured around one or two centres: ``average`` (``D_t = W_t - A``, what CART truncates) and, where the
recipe names a base, ``base`` (the task vectors ``D_t = W_t - W_base``, which are not centred).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from cart_hf.recipe.compression import Centre

Floats = npt.NDArray[np.float64]
Normalizer = Literal["all", "top", "none"]

RATIOS = (
    *(0.0, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.24, 0.28, 0.32),
    *(0.4, 0.48, 0.56, 0.64, 0.72, 0.8, 0.9, 1.0),
)
"""The rank ratios k / min(m, n) at which the curves over the rank are sampled."""


@dataclass(frozen=True)
class Around:
    """The T matrices of one name, measured around one centre. r = min(m, n), K = the ratios that were sampled.

    :param spectra: singular values of each ``D_t``, largest first, shape (T, as many as were computed).
    :param squares: ``||D_t||_F^2``, shape (T,).
    :param reconstruction: ``R(k) = sum_t ||D_t - lowrank_k(D_t)||_F^2``, shape (K,).
    :param interference: ``I(k)``, the sum over the ordered pairs of tasks, shape (K,).
    :param pairs: the interference of each pair at the recipe's rank, shape (T, T), zero on the diagonal.
    :param cosine: of the flattened ``D_t``, shape (T, T); NaN where one is zero.
    :param overlap: of the row spaces at the recipe's rank, ``||V_i V_j^T||_F^2 / k``, from 0 (orthogonal) to 1 (the
        same), shape (T, T); NaN where one is zero. k is what there is where a matrix has fewer directions.
    :param effective_rank: ``exp`` of the entropy of ``sigma / sum(sigma)`` (Roy and Vetterli, 2007), shape (T,); NaN
        where not all singular values were computed, and where ``D_t`` is zero.
    :param stable_rank: ``||D_t||_F^2 / sigma_1^2``, shape (T,); NaN where ``D_t`` is zero.
    :param energy: share of ``||D_t||_F^2`` that the recipe's rank keeps, shape (T,); NaN where ``D_t`` is zero.
    """

    spectra: Floats
    squares: Floats
    reconstruction: Floats
    interference: Floats
    pairs: Floats
    cosine: Floats
    overlap: Floats
    effective_rank: Floats
    stable_rank: Floats
    energy: Floats


@dataclass(frozen=True)
class Matrix:
    """One weight matrix (or fused group) that CART decomposes.

    :param name: the tensor's canonical name.
    :param shape: (m, n).
    :param rank: how many directions of each task vector the recipe keeps (``energy``: the most of any); a recipe of
        another method, as many as CART keeps by default.
    :param models: the models that have it, in the recipe's order, which is that of all arrays.
    :param around: by centre.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    models: tuple[str, ...]
    around: Mapping[Centre, Around]


@dataclass(frozen=True)
class Tensor:
    """One merged tensor of any kind: how large it is, and how far each model and the merge moved it.

    :param name: its canonical name.
    :param role: what the merge does with it: ``low_rank``, ``elementwise``, ``average``, or ``base`` where all models
        are adapters that leave it as it is.
    :param models: the models that have it, in the recipe's order, which is that of all arrays.
    :param base_norm: ``||W_base||_F``; None where the base lacks it, or there is no base.
    :param norms: ``||W_t||_F``, shape (T,).
    :param products: ``<tau_i, tau_j>`` of the task vectors ``tau_t = W_t - W_base``, shape (T, T); None without a base.
    :param centred: the same of the centred task vectors ``W_t - A``, shape (T, T).
    :param merged_norm: ``||W_merged||_F``.
    :param merged_products: ``<W_merged - W_base, tau_t>``, shape (T,); None without a base.
    :param merged_square: ``||W_merged - W_base||_F^2``; None without a base.
    """

    name: str
    role: str
    models: tuple[str, ...]
    base_norm: float | None
    norms: Floats
    products: Floats | None
    centred: Floats
    merged_norm: float
    merged_products: Floats | None
    merged_square: float | None


@dataclass(frozen=True)
class Bound:
    """Theorem 1 of the paper, checked on one matrix around one centre: ``loss <= bound``.

    :param name: the matrix.
    :param centre: what the task vectors are taken from.
    :param rank: how many directions of each were kept.
    :param inputs: how many input vectors of each task.
    :param loss: ``sum_t sum_i ||sum_{s != t} D_s x_ti||^2`` of the inputs' projections on the row space of ``D_t``.
    :param bound: ``sum_t sum_i (sum_{s != t} I_st ||Sigma_t^-1 V_t x_ti||)^2``, I not normalised.
    :param unprojected: the loss of the inputs themselves.
    :param inside: share of the inputs' squared length that lies in the row space: the theorem supposes 1.
    """

    name: str
    centre: Centre
    rank: int
    inputs: int
    loss: float
    bound: float
    unprojected: float
    inside: float


@dataclass(frozen=True)
class Warned:
    """Something that a person should know about the models before they trust the merge.

    :param kind: a word for programs, such as ``near_duplicates``.
    :param text: one sentence for people.
    :param models: the models that it is about.
    """

    kind: str
    text: str
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class About:
    """What was analysed.

    :param method, title: the recipe's merge method, and what people call it.
    :param parameters: its settings.
    :param base: the base's reference, if there is one.
    :param base_hub_id: its name on the Hub, if it is from there.
    :param models: each model's name, reference and class, and its ``hub_id`` likewise.
    :param output_class: the class of the merged model.
    :param roles: how many tensors of each role.
    :param normalizer: what I(k) divides the squared singular values by: the sum of ``all``, or of the ``top`` k, or
        nothing (``none``).
    :param ratios: the rank ratios of the curves: of :data:`RATIOS` those that were computed.
    """

    method: str
    title: str
    parameters: Mapping[str, Any]
    base: str | None
    base_hub_id: str | None
    models: Sequence[Mapping[str, Any]]
    output_class: str
    roles: Mapping[str, int]
    normalizer: Normalizer
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class Analysis:
    """Everything that was measured of a merge.

    :param about: what was analysed.
    :param matrices: what CART decomposes, in the order of the model.
    :param tensors: every merged tensor.
    :param bounds: Theorem 1 on given inputs; empty where none were given.
    :param warnings: what a person should know.
    :param results: a table of scores, as :func:`cart_hf.analysis.results.read_results` returns it, if there is one.
    :param tuning: the points of a search, as ``tuning.json`` has them, if there was one.
    :param notes: what could not be drawn, and why.
    """

    about: About
    matrices: Sequence[Matrix]
    tensors: Sequence[Tensor]
    bounds: Sequence[Bound] = ()
    warnings: Sequence[Warned] = ()
    results: Mapping[str, Any] | None = None
    tuning: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
