"""EMR-Merging: elect one task vector for all tasks, mask it for each, and rescale it (Huang et al., NeurIPS 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch

# Signs are numbers, -1.0 and 1.0: on a CPU torch computes with them several times faster than with booleans.


def unify(*, models: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Elect one task vector for all tasks: ``s max_t |τ_t|`` over the tasks whose sign is ``s = sign(sum_t τ_t)``.

    A sum of exactly zero elects -, as the authors' code does: with the paper's sign(0) = 0 all tasks would lose such
    an entry, so some keep it. One pass over the models, O(T n) operations.

    :param models: shape (T, n), float; overwritten by the task vectors ``τ_t = W_t - base``.
    :param base: shape (n,).
    :return: shape (n,); zero where no task's entry has the elected sign.
    """
    sign = models.sub_(base).sum(dim=0).gt_(0.0).mul_(2.0).sub_(1.0)
    unified = torch.zeros_like(base)
    agreeing = torch.empty_like(base)
    for task_vector in models:
        torch.maximum(unified, torch.mul(task_vector, sign, out=agreeing), out=unified)
    return unified.mul_(sign)


def mask(*, task_vector: torch.Tensor, unified: torch.Tensor) -> torch.Tensor:
    """Return where a task vector has the sign of the unified one: shape (n,), bool; zero has no sign."""
    return (task_vector.sign() * unified.sign()).gt_(0.0).bool()  # a product of the entries might underflow


@dataclass(frozen=True)
class Sums:
    """Sums over some entries of one task, from which its rescaler and its error follow.

    :param own: of ``|τ|``.
    :param kept: of ``|m u|``, u being the unified task vector and m the mask.
    :param square, product, kept_square: of ``τ^2``, ``m u τ`` and ``(m u)^2``.
    """

    own: float
    kept: float
    square: float
    product: float
    kept_square: float

    @classmethod
    def of(cls, task_vector: torch.Tensor, kept: torch.Tensor) -> Sums:
        """Return the sums over the entries of a tensor, in float64.

        :param task_vector: shape (n,).
        :param kept: shape (n,), the unified task vector where the mask is set, else zero.
        """
        terms = (task_vector.abs(), kept.abs(), task_vector.square(), task_vector * kept, kept.square())
        return cls(*(float(term.sum(dtype=_widest(term))) for term in terms))

    @classmethod
    def over(cls, parts: Iterable[Sums]) -> Sums:
        """Return the sums over all parts, whatever their order."""
        columns = zip(*map(astuple, parts), strict=True)
        return cls(*(math.fsum(column) for column in columns))

    @property
    def rescaler(self) -> float:
        """``sum |τ| / sum |m u|`` over all entries, as in the paper (its code: of tensors' means); 0 without a mask."""
        return self.own / self.kept if self.kept else 0.0

    @property
    def error(self) -> float:
        """``||τ - λ m u|| / ||τ||``: 0 is the fine-tuned model, 1 the base; 0 where they are the same."""
        scale = self.rescaler
        lost = self.square - 2 * scale * self.product + scale**2 * self.kept_square
        return math.sqrt(max(lost, 0.0) / self.square) if self.square else 0.0


def _widest(values: torch.Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64  # which has none
