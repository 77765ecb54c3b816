"""Settings of CART without any data: a rule, not a search.

Both follow from the factors of the centred task vectors ``D_t ~ U_t S_t V_t``. With ``M(k) = sum_t lowrank_k(D_t)`` and
``C_t(k) = U_t^T M V_t``, what M does within task t's own k directions, and sums over all matrices,

    explained(k) = (sum_t <C_t, S_t>)^2 / (sum_t ||C_t||^2 sum_t ||D_t||^2)
    rank         = 3 argmax_k explained(k)
    scale        = sqrt(sum_t ||D_t||^2) / ||M(rank)||

``explained`` is the share of the task vectors that M, scaled as well as one number can, gives back where the tasks want
it: few directions miss most of each task, many interfere. The scale makes M as long as the whole task vectors would be
together if no two of them had anything in common. The rule is ours, the factor 3 is experience: `docs/tuning.md` has
the benchmarks that it was set on, and those that it was tested on.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from cart_hf.api import factor_store, plan_merge
from cart_hf.errors import UserError
from cart_hf.merging import default_workers
from cart_hf.merging.decomposing import decompose, decomposed
from cart_hf.methods.cart import coefficients
from cart_hf.parallel import Progress, in_parallel, one_blas_thread
from cart_hf.plan import Group
from cart_hf.processes import Processes
from cart_hf.recipe import Recipe
from cart_hf.sources import fetch_weights

if TYPE_CHECKING:
    from cart_hf.linalg.low_rank import Factors

    Floats = npt.NDArray[np.float64]

RULE = (
    "rank: three times that at which the truncated sum gives back most of the centred task vectors within their own "
    "directions; scale: what makes the sum as long as they would be together if they were orthogonal to each other"
)
RATIOS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12)
FACTOR = 3
_CANCELS = 1e-6  # of the whole: less is rounding, and every scale gives the average


@dataclass(frozen=True)
class Lengths:
    """What the rule needs of matrices; to be added up. One value for each of ``RATIOS``, but for the last.

    :param agreement: ``sum_t <C_t, S_t>``.
    :param within: ``sum_t ||C_t||^2``.
    :param summed: ``||M||^2`` at ``FACTOR`` times the rank.
    :param whole: ``sum_t ||D_t||^2``.
    """

    agreement: Floats
    within: Floats
    summed: Floats
    whole: float

    def __add__(self, other: Lengths) -> Lengths:
        return Lengths(
            self.agreement + other.agreement,
            self.within + other.within,
            self.summed + other.summed,
            self.whole + other.whole,
        )

    def settings(self) -> tuple[float, float]:
        """Return rank ratio and scale.

        :raises UserError: where the task vectors cancel, as those of two models do.
        """
        if self.summed.max() <= _CANCELS * self.whole:
            raise UserError("--data-free: the centred task vectors cancel, so every scale gives the weight average")
        explained = self.agreement**2 / np.maximum(self.within * self.whole, np.finfo(np.float64).tiny)
        place = int(explained.argmax())
        return round(FACTOR * RATIOS[place], 3), round(float(np.sqrt(self.whole / self.summed[place])), 2)


def lengths_of(factors: Factors, weight: list[float]) -> Lengths:
    """Return what the rule needs of one matrix.

    :param factors: of its centred task vectors, up to the largest rank of the rule.
    :param weight: of each in the sum.
    """
    tasks, smaller = len(weight), min(factors.left.shape[1], factors.right.shape[2])
    singular = factors.singular.double()
    left = factors.left.double()
    right = factors.right.double()
    ranks = [max(1, int(ratio * smaller)) for ratio in RATIOS]
    summed_ranks = [min(max(1, int(round(FACTOR * ratio, 3) * smaller)), factors.rank) for ratio in RATIOS]
    agreement, within, summed = (np.zeros(len(RATIOS)) for _ in range(3))
    for task in range(tasks):
        columns = [left[task].mT @ left[other] for other in range(tasks)]
        rows = [right[other] @ right[task].mT for other in range(tasks)]
        for other in range(tasks):
            shared = (
                columns[other]
                * rows[other].mT
                * singular[task][:, None]
                * singular[other]
                * weight[task]
                * weight[other]
            )
            blocks = shared.cumsum(0).cumsum(1).diagonal().cpu().numpy()
            summed += blocks[[k - 1 for k in summed_ranks]]
        for place, k in enumerate(ranks):
            parts = [
                weight[other] * columns[other][:k, :k] @ (singular[other, :k, None] * rows[other][:k, :k])
                for other in range(tasks)
            ]
            inside = torch.stack(parts).sum(dim=0)
            agreement[place] += float((inside.diagonal() * singular[task, :k]).sum())
            within[place] += float(inside.square().sum())
    whole = sum(w**2 * square for w, square in zip(weight, factors.squares.tolist(), strict=True))
    return Lengths(agreement, within, summed, whole)


def settings_without_data(
    recipe: Recipe,
    factors: Mapping[str, Any],
    *,
    processes: Processes,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return CART's parameters by the rule.

    :param factors: where factors are kept, as arguments of a merge; empty: nowhere.
    :raises UserError: for another method, and where the task vectors cancel, as those of two models do.
    """
    import cart_hf.linalg.low_rank  # noqa: F401  # a limit on BLAS threads reaches only what is loaded by then

    if recipe.merge_method != "cart":
        raise UserError(f"--data-free: the rule is for cart, and not for {recipe.merge_method}; name tasks with data")
    fixed = {name: value for name, value in recipe.parameters.items() if name not in ("rank", "energy", "scale")}
    plan = plan_merge(recipe.variant("cart", {**fixed, "rank_ratio": FACTOR * RATIOS[-1]}))
    fetch_weights(plan.checkpoints, progress)
    store = factor_store(plan.recipe, factors.get("factors"), factors.get("factors_rank_ratio"))
    groups = [group for group in plan.groups() if group.is_whole]

    def measure(group: Group) -> tuple[str, Lengths]:
        first = group.tensors[0]
        if store is not None:
            centred, _ = decomposed(plan, group, processes.device, store)
        else:
            centred = decompose(plan, group, processes.device, rank=first.rank, energy=None)
        return group.name, lengths_of(centred.factors, coefficients(scale=1.0, weight=first.parameters["weight"]))

    found: dict[str, Lengths] = {}
    with one_blas_thread():
        for name, lengths in in_parallel(measure, groups, workers or default_workers(plan, processes)):
            found[name] = lengths
            if progress is not None:
                progress("decomposing", 1, len(groups))
    # in one order, whoever was first: sums of floats depend on it
    rank_ratio, scale = reduce(operator.add, (found[group.name] for group in groups)).settings()
    return {**fixed, "rank_ratio": rank_ratio, "scale": scale}
