"""Merging a whole matrix, or matrices stacked row-wise, with a method on matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cart_hf.merging.decomposing import decompose, decomposed, factorize, merge_by_factors
from cart_hf.merging.known import NOTHING, Known
from cart_hf.merging.reading import read_base, read_group
from cart_hf.merging.thin import find_thin
from cart_hf.merging.wrapping import naming, wrapped
from cart_hf.plan import Group, Plan

if TYPE_CHECKING:
    from cart_hf.factors import FactorStore


def merge_group(
    plan: Plan, group: Group, device: torch.device, store: FactorStore | None = None, known: Known = NOTHING
) -> torch.Tensor:
    """Merge a matrix, or matrices stacked row-wise, with a method on matrices.

    :param store: where factors are looked for, and kept.
    :return: shape of the stacked matrix, in the arithmetic's type, on ``device``.
    """
    with naming(plan.method.name, group):
        merged = _merge_matrix(plan, group, device, store, known)
    return wrapped(plan, group, merged, device, known)


def _merge_matrix(
    plan: Plan, group: Group, device: torch.device, store: FactorStore | None, known: Known
) -> torch.Tensor:
    method, first = plan.method, group.tensors[0]
    if method.of_factors is not None:
        if store is not None:
            return merge_by_factors(plan, group, *decomposed(plan, group, device, store))
        centre = method.factors_centre
        thin = find_thin(plan, group, centre)
        if thin is not None:
            return merge_by_factors(plan, group, factorize(plan, group, thin, device, first.rank, first.energy, centre))
        if plan.learnt(group) is not None:
            around = decompose(plan, group, device, rank=first.rank, energy=first.energy, centre=centre)
            return merge_by_factors(plan, group, around)
    arguments = plan.arguments_of(first)
    models = read_group(plan, group, device)
    if method.low_rank:
        arguments |= {"rank": first.rank, "energy": first.energy}
    if method.calibration == "gram":
        assert known.calibration is not None  # found before the work
        arguments["grams"] = known.calibration.grams(plan, group, device)
    if method.needs_base:
        base = read_base(plan, group, device)
        arguments["base"] = base.mT if first.transposed else base
    if first.transposed:
        return method.function(models=models.mT, **arguments).mT
    return method.function(models=models, **arguments)
