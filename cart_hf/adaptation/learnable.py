"""What is learnt: coefficients, shared as the granularity says, and which singular directions are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cart_hf.adaptation.terms import LowRankTerms, Slopes, Terms, prefixes
from cart_hf.plan import Group, Plan
from cart_hf.plan.align import reference_architecture
from cart_hf.plan.coefficients import Learnt, as_float32
from cart_hf.recipe.adaptation import Granularity

_KEPT, _TEMPERATURE = 0.1, 10.0  # AdaRank's first logits, and what they are divided by


class Learnable:
    """The numbers that are learnt.

    A coefficient is the method's own plus an offset, which begins at zero: the offset is what tasks, layers or tensors
    share, so that a recipe whose scale varies over layers keeps its shape. A direction is kept where its logit is
    above zero; the gradient goes through as if the sigmoid of a tenth of it were the answer (straight-through;
    AdaRank, arXiv 2503.22178).

    :param plan: the merge.
    :param terms: what the coefficients are of.
    :param granularity: what shares an offset.
    :param masks: whether directions are chosen.
    :param heads: weights of heads that are learnt, too, on the model's device.

    ``heads`` and ``coefficients`` (with the logits, on the CPU) are what an optimiser changes.
    """

    def __init__(
        self,
        plan: Plan,
        terms: Sequence[Terms],
        granularity: Granularity,
        *,
        masks: bool,
        heads: Sequence[torch.nn.Parameter] = (),
    ) -> None:
        rows = _rows(plan, [term.group for term in terms], granularity)
        self._row = {name: place for place, name in enumerate(dict.fromkeys(rows.values()))}
        self._row_of = {group: self._row[row] for group, row in rows.items()}
        self._own = {term.group.name: plan.own_coefficients(term.group) or [] for term in terms}
        self._models = {term.group.name: [i for i, _ in term.group.tensors[0].inputs] for term in terms}
        self._offsets = torch.nn.Parameter(torch.zeros(len(self._row), len(plan.models)))
        self._logits = {term.group.name: _logits(term) for term in terms if masks and isinstance(term, LowRankTerms)}
        self._first = {name: logits.detach() > 0 for name, logits in self._logits.items()}
        self.coefficients = [self._offsets, *self._logits.values()]
        self.heads = list(heads)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All that is learnt."""
        return [*self.coefficients, *self.heads]

    def learnt(self, group: Group) -> Learnt:
        """Return the coefficients of a tensor (or fused group) as they are now."""
        offsets = self._offsets.detach()[self._row_of[group.name], self._models[group.name]].double()
        values = as_float32((torch.tensor(self._own[group.name], dtype=torch.float64) + offsets).tolist())
        logits = self._logits.get(group.name)
        return Learnt(values, None if logits is None else logits.detach() > 0)

    def changed_mask(self, group: Group) -> torch.Tensor | None:
        """Return which directions are kept, where those are others than at first."""
        mask = self.learnt(group).mask
        return None if mask is None or torch.equal(mask, self._first[group.name]) else mask

    def gradients(self) -> list[torch.Tensor]:
        """Return the slopes of all that is learnt, on the CPU."""
        return [(torch.zeros_like(p) if p.grad is None else p.grad).cpu() for p in self.parameters]

    def clear(self) -> None:
        """Set all slopes of coefficients to zero."""
        for parameter in self.coefficients:
            parameter.grad = torch.zeros_like(parameter)

    def add(self, group: Group, slopes: Slopes) -> None:
        """Add the slopes of a tensor (or fused group)."""
        assert self._offsets.grad is not None  # cleared before
        self._offsets.grad[self._row_of[group.name], self._models[group.name]] += slopes.values.float()
        logits = self._logits.get(group.name)
        if logits is not None and slopes.mask is not None:
            soft = torch.sigmoid(logits.detach() / _TEMPERATURE)
            logits.grad = (slopes.mask * soft * (1 - soft) / _TEMPERATURE).to(logits)

    def state(self) -> list[torch.Tensor]:
        """Return a copy of all that is learnt."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def restore(self, state: Sequence[torch.Tensor]) -> None:
        """Take back what :meth:`state` returned."""
        for parameter, values in zip(self.parameters, state, strict=True):
            parameter.data.copy_(values)


def _logits(term: LowRankTerms) -> torch.nn.Parameter:
    kept = prefixes(term.ranks, term.factors.rank)
    return torch.nn.Parameter(torch.where(kept, _KEPT, -_KEPT))


def _rows(plan: Plan, groups: Sequence[Group], granularity: Granularity) -> Mapping[str, str]:
    """Say for each tensor (or fused group) what it shares its offsets with."""
    if granularity == "task":
        return {group.name: "" for group in groups}
    if granularity == "tensor":
        return {group.name: group.name for group in groups}
    slots: Mapping[str, Any] = reference_architecture(plan.base, plan.models).slots
    blocks = {slot.block.path for slot in slots.values() if slot.block is not None}
    return {group.name: _layer(group.tensors[0].name, slots, blocks) for group in groups}


def _layer(name: str, slots: Mapping[str, Any], blocks: set[str]) -> str:
    """Return the block that a tensor is in, or else the outermost module that holds no blocks."""
    slot = slots.get(name)
    if slot is not None and slot.block is not None:
        return f"{slot.block.path}.{slot.block.index}"
    parts = name.split(".")
    for length in range(1, len(parts)):
        module = ".".join(parts[:length])
        if not any(path == module or path.startswith(f"{module}.") for path in blocks):
            return module
    return name
