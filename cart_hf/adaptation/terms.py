"""The weights of the model as a centre and a term for each task, and the slopes of a loss along these terms.

A weight is formed once in a step, ``W = centre + sum_t c_t term_t``, and the model's own backward pass returns
``G = dloss/dW``, summed over all tasks. The chain rule gives the rest without any graph through the merge:

    dloss/dc_t = <G, term_t>        and for a direction r of a low-rank term    c_t s_r u_r' G v_r

So the device holds one model, its gradients and the low-rank factors, whatever the number of tasks: the dense terms and
the centres lie on disk and pass through a small buffer, once to form the weights and once to find the slopes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from cart_hf.merging.decomposing import add_terms
from cart_hf.merging.reading import BLOCK
from cart_hf.methods.linear import combine
from cart_hf.plan import Group
from cart_hf.plan.coefficients import Learnt
from cart_hf.plan.model import CHUNK

if TYPE_CHECKING:
    from cart_hf.linalg.low_rank import Factors


@dataclass(frozen=True)
class Slopes:
    """What a loss changes by.

    :param values: with each coefficient, float64, shape (models,).
    :param mask: with each direction that is kept or not, shape (models, k); None where none is chosen.
    """

    values: torch.Tensor
    mask: torch.Tensor | None = None


class Terms(Protocol):
    """The weights of one tensor (or fused group) of the model."""

    @property
    def group(self) -> Group:
        """Which they are, as planned."""

    def form(self, learnt: Learnt) -> None:
        """Write the centre plus the terms into the model."""

    def slopes(self, learnt: Learnt) -> Slopes:
        """Return the slopes, from the gradients of the model's weights."""


@dataclass(frozen=True)
class Rows:
    """Rows of float32 numbers, in a file or in memory.

    :param count: how many rows.
    :param elements: how many numbers each has.
    :param place: the file, or a tensor of shape (count, elements).
    """

    count: int
    elements: int
    place: Path | torch.Tensor

    @classmethod
    def empty(cls, count: int, elements: int, place: Path | torch.device) -> Rows:
        """Make room for them in a file, or on a device."""
        if isinstance(place, torch.device):
            return cls(count, elements, torch.empty(count, elements, device=place))
        with place.open("wb") as file:
            file.truncate(4 * count * elements)
        return cls(count, elements, place)

    def write(self, row: int, start: int, values: torch.Tensor) -> None:
        """Write numbers of one row, from ``start`` on."""
        if isinstance(self.place, torch.Tensor):
            self.place[row, start : start + len(values)] = values
            return
        with self.place.open("r+b") as file:
            file.seek(4 * (row * self.elements + start))
            file.write(values.float().contiguous().cpu().numpy().data)

    def blocks(self, device: torch.device, *, first: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the rows a block at a time: its first element, and the numbers, shape (rows, elements).

        :param first: the row to begin with.
        """
        step = BLOCK if device.type == "cpu" else CHUNK
        spans = [(start, min(start + step, self.elements)) for start in range(0, self.elements, step)]
        if isinstance(self.place, torch.Tensor):
            yield from ((start, self.place[first:, start:stop]) for start, stop in spans)
            return
        buffer = np.empty((self.count - first, step), dtype=np.float32)  # one: fresh memory costs more than reading
        with self.place.open("rb", buffering=0) as file:
            for start, stop in spans:
                for row, numbers in enumerate(buffer[:, : stop - start]):
                    file.seek(4 * ((first + row) * self.elements + start))
                    if file.readinto(numbers.data) != numbers.nbytes:
                        raise OSError(f"{self.place} is cut off")
                yield start, torch.from_numpy(buffer[:, : stop - start]).to(device)


@dataclass(frozen=True)
class DenseTerms:
    """A tensor whose terms have any rank.

    :param weight: the model's parameter.
    :param rows: the centre, and the term of each model.
    """

    group: Group
    weight: torch.nn.Parameter
    rows: Rows

    def form(self, learnt: Learnt) -> None:
        """Write the centre plus the terms into the model."""
        flat = self.weight.data.view(-1)
        for start, block in self.rows.blocks(flat.device):
            flat[start : start + block.shape[1]] = combine(block[0], block[1:], learnt.values)

    def slopes(self, learnt: Learnt) -> Slopes:
        """Return the slopes, from the gradient of the model's weight."""
        if self.weight.grad is None:  # this process had no input that reaches it
            return Slopes(torch.zeros(len(learnt.values), dtype=torch.float64))
        gradient = self.weight.grad.to_dense().reshape(-1)
        parts = [
            block @ gradient[start : start + block.shape[1]]
            for start, block in self.rows.blocks(gradient.device, first=1)
        ]
        return Slopes(torch.stack(parts).cpu().double().sum(dim=0))


@dataclass(frozen=True)
class LowRankTerms:
    """A matrix, or matrices stacked row-wise, whose terms are given by their factors.

    :param weights: the model's parameters.
    :param centre: one row.
    :param factors: of the terms, on the model's device.
    :param ranks: how many directions of each are kept where nothing chooses them.
    """

    group: Group
    weights: Sequence[torch.nn.Parameter]
    centre: Rows
    factors: Factors
    ranks: Sequence[int]

    def form(self, learnt: Learnt) -> None:
        """Write the centre plus the terms into the model."""
        from cart_hf.factors.store import Centred

        centre = self.factors.left.new_empty(self.centre.elements)
        for start, block in self.centre.blocks(centre.device):
            centre[start : start + block.shape[1]] = block[0]
        ranks = self.ranks if learnt.mask is None else None
        merged = add_terms(Centred(centre.view(self.group.shape), self.factors), ranks, learnt)
        for weight, part in zip(self.weights, torch.split(merged, [w.shape[0] for w in self.weights]), strict=True):
            weight.data.copy_(part)

    def slopes(self, learnt: Learnt) -> Slopes:
        """Return the slopes, from the gradients of the model's weights."""
        gradient = torch.cat([torch.zeros_like(w) if w.grad is None else w.grad for w in self.weights])
        left, right = self.factors.left, self.factors.right
        models, _, k = left.shape
        across = gradient @ right.reshape(models * k, -1).T  # (m, models k): G v_r
        along = (across.view(-1, models, k) * left.permute(1, 0, 2)).sum(dim=0)  # u_r' G v_r
        directions = (along * self.factors.singular).cpu().double()
        kept = prefixes(self.ranks, k) if learnt.mask is None else learnt.mask.cpu()
        values = torch.tensor(learnt.values, dtype=torch.float64)
        mask = None if learnt.mask is None else directions * values[:, None]
        return Slopes((directions * kept).sum(dim=1), mask)


def prefixes(ranks: Sequence[int], k: int) -> torch.Tensor:
    """Return the mask that keeps the first ``ranks[t]`` of k directions, bool, shape (models, k)."""
    return torch.arange(k)[None] < torch.tensor(list(ranks))[:, None]
