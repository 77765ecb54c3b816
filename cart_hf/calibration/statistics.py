"""What a merge is given of the statistics: read tensor by tensor from the files, as it needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch

from cart_hf.calibration.kept import Kept
from cart_hf.plan import Group, Plan, PlannedTensor

_LEAST = 1e-6  # added to a norm, as FusionBench has it: a model that is sure of everything has none


@dataclass(frozen=True)
class Statistics:
    """The statistics of every model of a plan.

    :param plan: the merge.
    :param kept: the files, in the order of the plan's models.
    :param digest: what they are known by: the models, the data, the settings.
    """

    plan: Plan
    kept: tuple[Kept, ...]
    digest: str

    def grams(self, plan: Plan, group: Group, device: torch.device) -> Sequence[torch.Tensor]:
        """Return ``X_t^T X_t / n_t`` of what reaches a Linear layer (of a fused group all read the same).

        :return: for each model, in the order of the tensor's inputs, float32, shape (inputs, inputs); read as it is
            asked for. Empty where in some model nothing reaches the layer, such as the text tower of a CLIP.
        """
        inputs = [(self.kept[place], name) for place, name in group.tensors[0].inputs]
        return _Grams(inputs if all(name in kept.stored for kept, name in inputs) else [], device)

    def fisher(self, plan: Plan, tensor: PlannedTensor, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Return the diagonal Fisher information of elements ``start`` to ``stop`` of a tensor in every model.

        With the parameter ``normalize``, each model's is divided by the norm of all that is merged of it, over the
        harmonic mean of these norms.

        :return: shape (T, elements), in the arithmetic's type; 0 for what the answers do not depend on.
        """
        dtype = torch.float64 if plan.arithmetic == "float64" else torch.float32
        found = torch.zeros(len(tensor.inputs), stop - start, dtype=dtype)
        for row, (place, name) in zip(found, tensor.inputs, strict=True):
            if name in self.kept[place].stored:
                row.copy_(self.kept[place].read_slice(name, start, stop))
            if tensor.parameters["normalize"]:
                row.mul_(self._factors[place])
        return found.to(device)

    @cached_property
    def _factors(self) -> list[float]:
        """What brings the models' information to one norm."""
        squares = [0.0] * len(self.kept)
        for tensor in self.plan.tensors:
            for place, name in tensor.inputs:
                kept = self.kept[place]
                if name in kept.stored:
                    squares[place] += kept.norms[kept.stored[name]] ** 2
        inverse = [1 / (square**0.5 + _LEAST) for square in squares]
        return [one * len(inverse) / sum(inverse) for one in inverse]


class _Grams(Sequence[torch.Tensor]):
    """Gram matrices that are read when they are asked for."""

    def __init__(self, inputs: Sequence[tuple[Kept, str]], device: torch.device) -> None:
        self._inputs, self._device = inputs, device

    def __len__(self) -> int:
        return len(self._inputs)

    @overload
    def __getitem__(self, place: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[torch.Tensor]: ...

    def __getitem__(self, place: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        if isinstance(place, slice):
            return _Grams(self._inputs[place], self._device)
        kept, name = self._inputs[place]
        return kept.read(name).to(self._device)
