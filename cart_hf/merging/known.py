"""What a method is told besides the tensors' values, found before the first tensor is merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from cart_hf.plan import Group, Plan, PlannedTensor

Surveyed = Mapping[str, Mapping[str, Any]]
"""By a tensor's name the arguments of the method's function that come from a survey of whole tensors."""


class Calibration(Protocol):
    """Statistics of the models at work on examples of their tasks, see :mod:`cart_hf.calibration`."""

    def grams(self, plan: Plan, group: Group, device: torch.device) -> Sequence[torch.Tensor]:
        """Return ``X_t^T X_t / n_t`` of what each model's Linear reads, shape (n, n); empty if nothing reaches it."""

    def fisher(self, plan: Plan, tensor: PlannedTensor, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Return the diagonal of each model's Fisher information, shape (models, elements)."""


@dataclass(frozen=True)
class Known:
    """What was found.

    :param surveyed: of whole tensors.
    :param calibration: of the models at work.
    :param scales: factor of each tensor's update, of wrappers; 1 where there is none.
    """

    surveyed: Surveyed = field(default_factory=dict)
    calibration: Calibration | None = None
    scales: Mapping[str, float] = field(default_factory=dict)


NOTHING = Known()
