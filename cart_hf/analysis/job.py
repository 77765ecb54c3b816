"""The measuring itself: matrices and tensors by several worker threads, the results in the order of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

from cart_hf.analysis.matrices import Matrices, Measured, weights
from cart_hf.analysis.model import About, Analysis, Tensor
from cart_hf.analysis.places import in_model_order
from cart_hf.analysis.tensors import Products, as_tensor, group_products, inner_products
from cart_hf.analysis.warnings import find_warnings
from cart_hf.api import calibrated
from cart_hf.merging.ahead import look_ahead
from cart_hf.merging.known import Known
from cart_hf.merging.matrices import merge_group
from cart_hf.merging.shares import Piece, pieces, share_of
from cart_hf.merging.slices import merge_chunk
from cart_hf.parallel import Progress, in_parallel, one_blas_thread
from cart_hf.plan import Plan
from cart_hf.processes import Processes
from cart_hf.sources import DTYPES, Checkpoint


@dataclass(frozen=True)
class Job:
    """An analysis under way.

    :param plan: of the recipe's own merge.
    :param matrices: how matrices are measured; their plan is the same, or CART's for the same models.
    """

    plan: Plan
    matrices: Matrices
    processes: Processes
    workers: int
    progress: Progress

    def analysis(self, results: Mapping[str, Any] | None, tuning: Mapping[str, Any] | None) -> Analysis:
        """Measure everything."""
        with one_blas_thread():
            measured = self._matrices()
            products = self._others()
        if self.matrices.merges:
            products |= {tensor.name: one for found in measured for tensor, one in found.products}
        tensors = self._tensors(products)
        return Analysis(
            about=self._about(),
            matrices=[found.matrix for found in measured],
            tensors=tensors,
            bounds=[bound for found in measured for bound in found.bounds],
            warnings=find_warnings(self.plan, tensors),
            results=results,
            tuning=tuning,
        )

    def _matrices(self) -> list[Measured]:
        """Measure what CART decomposes, in the order of the model."""
        plan = self.matrices.plan
        work = share_of([p for p in pieces(plan) if p.group.is_whole], 0, 1)
        total = sum(piece.nbytes for piece in work)

        def measure(piece: Piece) -> tuple[Piece, Measured]:
            return piece, self.matrices.measure(piece.group)

        found = {}
        for piece, measured in in_parallel(measure, work, self.workers):
            found[piece.group.name] = measured
            self.progress("analysing matrices", piece.nbytes, total)
        return [found[name] for name in in_model_order(plan, found)]

    def _others(self) -> dict[str, Products]:
        """Merge every other tensor, a piece at a time, and return its inner products."""
        work = share_of([p for p in pieces(self.plan) if self._is_missing(p)], 0, 1)
        total = sum(piece.nbytes for piece in work)
        known = Known(calibration=calibrated(self.plan, self.processes, self.progress))
        if work:
            known = look_ahead(self.plan, self.workers, self.progress, self.processes, known)

        def measure(piece: Piece) -> tuple[Piece, list[Products]]:
            return piece, self._merged(piece, known)

        found: dict[str, dict[int, Products]] = {}
        for piece, products in in_parallel(measure, work, self.workers):
            for tensor, one in zip(piece.group.tensors, products, strict=True):
                found.setdefault(tensor.name, {})[piece.start] = one
            self.progress("merging", piece.nbytes, total)
        # added up in one order, whoever was first
        return {name: reduce(add, (parts[start] for start in sorted(parts))) for name, parts in found.items()}

    def _is_missing(self, piece: Piece) -> bool:
        first = piece.group.tensors[0]
        if not first.inputs or not DTYPES[first.dtype].is_floating_point:
            return False
        return not (self.matrices.merges and piece.group.is_whole)

    def _merged(self, piece: Piece, known: Known) -> list[Products]:
        """Merge a piece as the recipe says, and multiply it with what it was made from."""
        plan, tensors, device = self.plan, piece.group.tensors, self.processes.device
        if piece.group.is_whole:
            merged = merge_group(plan, piece.group, device, known=known)
            return [one for _, one in group_products(plan, piece.group, merged)]
        (tensor,) = tensors
        merged = merge_chunk(plan, tensor, piece.start, piece.stop, device, known)
        return [inner_products(plan, tensor, (piece.start, piece.stop), merged)]

    def _tensors(self, products: Mapping[str, Products]) -> list[Tensor]:
        planned = {tensor.name: tensor for tensor in self.plan.tensors}
        of_cart = {tensor.name: tensor for tensor in self.matrices.plan.tensors}
        return [
            as_tensor(self.plan, planned[name], products[name], weights(of_cart[name]))
            for name in in_model_order(self.plan, products)
        ]

    def _about(self) -> About:
        plan = self.plan
        return About(
            method=plan.method.name,
            title=" + ".join([plan.method.title, *(one.wrapper.title for one in plan.wrappings)]),
            parameters=plan.recipe.parameters,
            base=None if plan.base is None else str(plan.base.reference),
            base_hub_id=None if plan.base is None else _hub_id(plan.base),
            models=[
                {
                    "name": model.name,
                    "reference": str(model.reference),
                    "class": model.architecture.class_name,
                    "hub_id": _hub_id(model),
                }
                for model in plan.models
            ],
            output_class=plan.output_class,
            roles=plan.counts,
            normalizer=self.matrices.normalizer,
            ratios=tuple(self.matrices.ratios),
        )


def _hub_id(model: Checkpoint) -> str | None:
    """Return the Hub's name of a model; None for a folder, which may look the same, and for an adapter on a base."""
    reference = model.reference
    return None if reference.is_local or reference.adapter is not None else reference.path
