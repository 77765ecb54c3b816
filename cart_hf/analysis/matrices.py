"""Each weight matrix that CART decomposes: its factors around both centres, and all that is measured of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add

import torch

from cart_hf.analysis.curves import around, rank_at
from cart_hf.analysis.layer_inputs import is_transposed
from cart_hf.analysis.model import Around, Bound, Matrix, Normalizer
from cart_hf.analysis.tensors import Products, centred_products, cosine_of, group_products
from cart_hf.analysis.theorem import check_theorem
from cart_hf.factors import FactorStore
from cart_hf.factors.store import Centred
from cart_hf.linalg.gram import DecompositionError
from cart_hf.merging.decomposing import decompose, decomposed, merge_by_factors
from cart_hf.plan import Group, Plan, PlannedTensor
from cart_hf.recipe.compression import Centre


@dataclass(frozen=True)
class Measured:
    """What came of one matrix (or fused group).

    :param products: of each of its tensors, with those of the merged one.
    """

    matrix: Matrix
    bounds: Sequence[Bound]
    products: Sequence[tuple[PlannedTensor, Products]]


@dataclass(frozen=True)
class Matrices:
    """What the measuring of every matrix shares.

    :param plan: of ``cart``.
    :param ratios: where the curves are sampled.
    :param up_to: the rank ratio up to which factors are computed; more where the recipe keeps more.
    :param merges: whether the plan's own merge is what is looked at, and so the merged matrices are wanted.
    :param device: where factors are computed.
    :param stores: where they are looked for, and kept.
    :param inputs: what reaches the Linear layers, by group and in the order of its inputs.
    """

    plan: Plan
    ratios: Sequence[float]
    up_to: float
    normalizer: Normalizer
    merges: bool
    device: torch.device
    stores: Mapping[Centre, FactorStore] = field(default_factory=dict)
    inputs: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)

    def widened(self, group: Group) -> Group:
        """Return a matrix (or fused group) planned with as many directions as are looked at."""
        first, whole = group.tensors[0], min(group.shape)
        # which ranks hold the energy is known of all directions only
        rank = max(first.rank, rank_at(self.up_to, whole)) if first.rank else whole
        return Group(tuple(replace(tensor, rank=rank, energy=None) for tensor in group.tensors))

    def wide_plan(self) -> Plan:
        """Return the plan with as many directions as are looked at, to know what memory it takes."""
        groups = (self.widened(g) if g.is_whole else g for g in self.plan.groups())
        return replace(self.plan, tensors=tuple(tensor for group in groups for tensor in group.tensors))

    def measure(self, group: Group) -> Measured:
        """Measure a matrix (or fused group); what is read again is in the system's cache.

        :raises UserError: when a model holds NaN or Inf.
        """
        plan, first = self.plan, group.tensors[0]
        centred = self._factors(group, "average")
        ranks = centred.factors.ranks(rank=first.rank, energy=first.energy) or [centred.factors.rank]
        rank = max(ranks)
        bounds = self._bounds(group, "average", centred, rank)
        merged = None
        if self.merges:
            merged = merge_by_factors(plan, group, Centred(centred.centre, centred.factors.cut(rank)), ranks)
        products = group_products(plan, group, merged)
        every = reduce(add, (one for _, one in products))
        found: dict[Centre, Around] = {"average": self._around(group, "average", centred, rank, every)}
        del centred
        if plan.base is not None and all(tensor.base_input is not None for tensor in group.tensors):
            based = self._factors(group, "base")
            bounds += self._bounds(group, "base", based, rank)
            found["base"] = self._around(group, "base", based, rank, every)
        names = tuple(plan.models[i].name for i, _ in sorted(first.inputs))
        rows, columns = group.shape
        return Measured(Matrix(group.name, (rows, columns), rank, names, found), bounds, products)

    def _factors(self, group: Group, centre: Centre) -> Centred:
        """Return the factors around a centre, as kept or computed, of as many directions as are looked at."""
        wide, store = self.widened(group), self.stores.get(centre)
        rank = wide.tensors[0].rank
        assert rank is not None
        try:
            if store is None:
                return decompose(self.plan, wide, self.device, rank=rank, energy=None, centre=centre)
            found, _ = decomposed(self.plan, wide, self.device, store)
        except DecompositionError as failure:
            raise RuntimeError(f"cannot decompose '{group.name}' (shape {list(group.shape)}): {failure}") from failure
        return Centred(found.centre, found.factors.cut(rank))

    def _around(self, group: Group, centre: Centre, centred: Centred, rank: int, products: Products) -> Around:
        count = len(group.tensors[0].inputs)
        gram = centred_products(products, weights(group.tensors[0])) if centre == "average" else products.gram
        return around(
            centred.factors,
            _order(group),
            ratios=self.ratios,
            rank=rank,
            normalizer=self.normalizer,
            cosine=cosine_of(gram[:count, :count]),
            transposed=is_transposed(self.plan, group),
        )

    def _bounds(self, group: Group, centre: Centre, centred: Centred, rank: int) -> list[Bound]:
        inputs = self.inputs.get(group.name)
        if inputs is None or not sum(map(len, inputs)):  # such as a layer that nothing of a task's examples reaches
            return []
        turned = is_transposed(self.plan, group)
        return [check_theorem(centred, name=group.name, centre=centre, rank=rank, inputs=inputs, transposed=turned)]


def weights(tensor: PlannedTensor) -> list[float]:
    """Return the models' weights in the average of a tensor, in the recipe's order.

    :param tensor: as planned for ``cart``.
    """
    return [weight for _, weight in sorted(zip(tensor.inputs, tensor.parameters["weight"], strict=True))]


def _order(group: Group) -> list[int]:
    """Return the places of a matrix's inputs, in the recipe's order: a plan has them in the order of names."""
    inputs = group.tensors[0].inputs
    return sorted(range(len(inputs)), key=inputs.__getitem__)
