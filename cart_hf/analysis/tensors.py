"""Norms and inner products of whole tensors: how far each model and the merge moved them, and in which direction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cart_hf.analysis.model import Floats, Tensor
from cart_hf.merging.reading import BLOCK, cast, read_block
from cart_hf.plan import Group, Plan, PlannedTensor

_SLICE = 2**12  # elements of each model at a time in float64: what stays in the core's own cache
_IDENTICAL = 1e-13  # of the squared task vectors: what is left of a difference in float64 when there is none


@dataclass(frozen=True)
class Products:
    """Inner products of the T models' tensors of one name, and last the merged one, or of a slice of them.

    :param gram: ``<W_i - R, W_j - R>``, R the base's tensor or else the first model's; shape (T, T), or one more.
    :param squares: ``||W_i||^2``, shape (T,), or one more.
    :param base: ``||W_base||^2``; None where there is none.
    """

    gram: Floats
    squares: Floats
    base: float | None

    def __add__(self, other: Products) -> Products:
        """Return the products of two slices together."""
        base = None if self.base is None or other.base is None else self.base + other.base
        return Products(self.gram + other.gram, self.squares + other.squares, base)


def inner_products(
    plan: Plan, tensor: PlannedTensor, span: tuple[int, int], merged: torch.Tensor | None = None
) -> Products:
    """Read elements of a tensor from every model, in the recipe's order, and the base, and multiply them in float64.

    :param span: the first element, and the one after the last.
    :param merged: the merged ones, 1-D, on the CPU.
    :raises UserError: when a model holds NaN or Inf.
    """
    sources = [(plan.models[i], name) for i, name in sorted(tensor.inputs)]
    count = len(sources)
    with_base = plan.base is not None and tensor.base_input is not None
    if plan.base is not None and tensor.base_input is not None:
        sources.append((plan.base, tensor.base_input))
    size = count + (merged is not None)
    gram = torch.zeros(size, size, dtype=torch.float64)
    squares, base = torch.zeros(size, dtype=torch.float64), 0.0
    start, stop = span
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        block = read_block(plan, sources, (first, last))
        for place in range(0, last - first, _SLICE):
            part = block[:, place : place + _SLICE].double()
            rows, origin = part[:count], part[-1] if with_base else part[0]
            if merged is not None:
                there = first - start + place
                rows = torch.cat([rows, merged[None, there : there + part.shape[1]].double()])
            squares += rows.square().sum(dim=1)
            base += float(origin.square().sum())
            rows = rows - origin
            gram += rows @ rows.T
    return Products(gram.numpy(), squares.numpy(), base if with_base else None)


def group_products(plan: Plan, group: Group, merged: torch.Tensor | None) -> list[tuple[PlannedTensor, Products]]:
    """Do so for each whole tensor of a group.

    :param merged: the merged matrix, or matrices stacked, in the arithmetic's type, on any device.
    :raises UserError: also when a merged value does not fit the output's type.
    """
    parts: Sequence[torch.Tensor | None] = [None for _ in group.tensors]
    if merged is not None:
        split = torch.split(merged, [tensor.shape[0] for tensor in group.tensors])
        parts = [cast(plan, tensor, part.reshape(-1)) for tensor, part in zip(group.tensors, split, strict=True)]
    return [
        (tensor, inner_products(plan, tensor, (0, tensor.elements), part))
        for tensor, part in zip(group.tensors, parts, strict=True)
    ]


def centred_products(products: Products, weight: Sequence[float]) -> Floats:
    """Return ``<W_i - A, W_j - A>``, A the models' average with these weights, shape (T, T)."""
    count = len(weight)
    gram = products.gram[:count, :count]
    centring = np.eye(count) - np.asarray(weight, dtype=np.float64)[None, :] / sum(weight)
    result: Floats = centring @ gram @ centring.T
    nothing = result.diagonal() <= _IDENTICAL * gram.diagonal().max(initial=0.0)
    result[nothing, :] = result[:, nothing] = 0.0
    return result


def as_tensor(plan: Plan, tensor: PlannedTensor, products: Products, weight: Sequence[float]) -> Tensor:
    """Return what was measured of a whole tensor.

    :param products: with those of the merged one.
    :param weight: the models' in the average, in the order of the products.
    """
    gram, count = products.gram, len(weight)
    has_base = products.base is not None
    return Tensor(
        name=tensor.name,
        role=tensor.role,
        models=tuple(plan.models[i].name for i, _ in sorted(tensor.inputs)),
        base_norm=None if products.base is None else float(np.sqrt(products.base)),
        norms=np.sqrt(products.squares[:count]),
        products=gram[:count, :count] if has_base else None,
        centred=centred_products(products, weight),
        merged_norm=float(np.sqrt(products.squares[count])),
        merged_products=gram[count, :count] if has_base else None,
        merged_square=float(gram[count, count]) if has_base else None,
    )


def cosine_of(gram: Floats) -> Floats:
    """Return the cosines of vectors from their inner products; NaN where one is zero."""
    lengths = np.sqrt(gram.diagonal())
    result = ratio(gram, lengths[:, None] * lengths[None, :])
    np.fill_diagonal(result, np.where(lengths > 0, 1.0, np.nan))
    return result.clip(-1.0, 1.0)


@dataclass(frozen=True)
class Sums:
    """Inner products over several tensors; a model that lacks one counts there as if it were zero.

    What is about the base is of those tensors that it has: zero without a base.

    :param centred: ``<W_i - A, W_j - A>``, shape (T, T).
    :param products: ``<tau_i, tau_j>`` of the task vectors, shape (T, T).
    :param base: ``||W_base||^2``.
    :param merged: ``<W_merged - W_base, tau_t>``, shape (T,).
    :param merged_square: ``||W_merged - W_base||^2``.
    """

    centred: Floats
    products: Floats
    base: float
    merged: Floats
    merged_square: float

    @classmethod
    def over(cls, tensors: Iterable[Tensor], models: Sequence[str]) -> Sums:
        """Add up tensors.

        :param models: all of them, in the order of the result.
        """
        count = len(models)
        centred, products, merged = np.zeros((count, count)), np.zeros((count, count)), np.zeros(count)
        base = merged_square = 0.0
        for tensor in tensors:
            places = [models.index(name) for name in tensor.models]
            centred[np.ix_(places, places)] += tensor.centred
            if tensor.products is not None and tensor.merged_products is not None:
                products[np.ix_(places, places)] += tensor.products
                merged[places] += tensor.merged_products
                base += (tensor.base_norm or 0.0) ** 2
                merged_square += tensor.merged_square or 0.0
        return cls(centred, products, base, merged, merged_square)

    @property
    def update(self) -> Floats:
        """``||W_t - W_base||``, shape (T,)."""
        return np.sqrt(self.products.diagonal())

    @property
    def growth(self) -> Floats:
        """``||W_t - W_base|| / ||W_base||``, shape (T,); NaN where the base is zero, or has none of the tensors."""
        return self.update / (np.sqrt(self.base) or np.nan)

    @property
    def merged_update(self) -> float:
        """``||W_merged - W_base||``."""
        return float(np.sqrt(self.merged_square))

    @property
    def merged_growth(self) -> float:
        """``||W_merged - W_base|| / ||W_base||``; NaN as above."""
        return float(self.merged_update / (np.sqrt(self.base) or np.nan))

    @property
    def retention(self) -> Floats:
        """``<W_merged - W_base, tau_t> / ||tau_t||^2``, shape (T,); NaN where a model did not move."""
        return ratio(self.merged, self.products.diagonal())

    @property
    def merged_cosine(self) -> Floats:
        """The cosine of the merged model's task vector and each other one, shape (T,); NaN where one is zero."""
        return ratio(self.merged, self.update * self.merged_update)


def ratio(values: Floats, by: Floats, otherwise: float = np.nan) -> Floats:
    """Divide, but not by zero: the result is then ``otherwise``."""
    result: Floats = np.full(np.broadcast_shapes(values.shape, by.shape), otherwise)
    return np.divide(values, by, out=result, where=by > 0)
