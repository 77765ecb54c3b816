"""The centre and the factors of a matrix: computed or kept, and what a method makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from cart_hf.merging.reading import arithmetic, read_base, read_group, refuse_broken
from cart_hf.merging.thin import Thin, factorize_thin, find_thin
from cart_hf.plan import Group, Plan

if TYPE_CHECKING:
    from cart_hf.factors import FactorStore
    from cart_hf.factors.store import Centred
    from cart_hf.methods.registry import Centre
    from cart_hf.plan.coefficients import Learnt


def merge_by_factors(plan: Plan, group: Group, centred: Centred, ranks: Sequence[int] | None = None) -> torch.Tensor:
    """Merge a matrix (or fused group) from its centre, which is overwritten, and its factors.

    :param ranks: how many directions of each model to keep; None: all there are.
    """
    learnt = plan.learnt(group)
    if learnt is not None:
        return add_terms(centred, ranks, learnt)
    arguments = plan.arguments_of(group.tensors[0])
    arguments.pop("solver", None)
    assert plan.method.of_factors is not None  # refused before the work
    return plan.method.of_factors(centre=centred.centre, factors=centred.factors, ranks=ranks, **arguments)


def add_terms(centred: Centred, ranks: Sequence[int] | None, learnt: Learnt) -> torch.Tensor:
    """Return the centre of a matrix plus its low-rank terms, each times the coefficient that was learnt for it.

    :param ranks: how many directions of each to keep; None: all there are.
    """
    from cart_hf.linalg.low_rank import weighted_sum

    factors = centred.factors if learnt.mask is None else centred.factors.masked(learnt.mask)
    return weighted_sum(factors, learnt.values, ranks).add_(centred.centre)


def decomposed(
    plan: Plan, group: Group, device: torch.device, store: FactorStore
) -> tuple[Centred, Sequence[int] | None]:
    """Return the centre and the factors of a matrix (or fused group), as kept, or else computed and then kept.

    :return: also how many directions of each model the plan keeps; None: all there are.
    """
    first = group.tensors[0]
    centred = store.load(plan, group, device)
    ranks = centred.factors.ranks(rank=first.rank, energy=first.energy) if centred else None
    if centred is None or ranks is None:
        rank = store.rank(group, first.rank) if first.rank else None
        centred = decompose(plan, group, device, rank=rank, energy=first.energy, centre=store.centre)
        store.keep(plan, group, centred)
        ranks = centred.factors.ranks(rank=first.rank) if first.rank else None
    return centred, ranks


def decompose(
    plan: Plan,
    group: Group,
    device: torch.device,
    *,
    rank: int | None,
    energy: float | None,
    centre: Centre = "average",
) -> Centred:
    """Compute the centre and the factors of a matrix (or fused group).

    :param rank: k for all models; or ``energy``, see :func:`cart_hf.linalg.low_rank.factorize`.
    :param centre: what the matrices are centred at.
    """
    from cart_hf.factors.store import Centred
    from cart_hf.methods.cart import centred_factors

    first = group.tensors[0]
    thin = find_thin(plan, group, centre)
    if thin is not None:
        return factorize(plan, group, thin, device, rank, energy, centre)
    models = read_group(plan, group, device)
    around = read_base(plan, group, device) if centre == "base" else None
    solver = first.parameters.get("solver", "fast")
    return Centred(*centred_factors(models, first.weights, rank=rank, energy=energy, solver=solver, centre=around))


def factorize(
    plan: Plan,
    group: Group,
    thin: Thin,
    device: torch.device,
    rank: int | None,
    energy: float | None,
    centre: Centre,
) -> Centred:
    """Do the same for the adapters of one base."""
    from cart_hf.factors.store import Centred

    (tensor,) = group.tensors
    base = thin.read_base(arithmetic(plan)).to(device)
    i, name = tensor.inputs[0]
    refuse_broken(base, plan.models[i], name)
    weight = tensor.weights if centre == "average" else None
    return Centred(*factorize_thin(thin, base, weight, rank=rank, energy=energy))
