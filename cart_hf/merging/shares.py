"""The plan cut into pieces, and the pieces divided among processes by what they cost."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cart_hf.plan import Group, Plan
from cart_hf.plan.model import CHUNK
from cart_hf.sources import element_size

Span = tuple[str, int, int]
"""Elements of a tensor: its name, the first one, and the one after the last."""

_FLOPS_PER_BYTE = 15  # arithmetic that one core does while it reads, merges and writes a byte element by element


@dataclass(frozen=True)
class Piece:
    """What is merged in one go: a matrix (or a fused group of them), or a slice of a tensor.

    :param group: the tensors.
    :param start, stop: which elements, where it is a slice of one tensor.
    """

    group: Group
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Number of bytes in the output."""
        return (self.stop - self.start) * element_size(self.group.tensors[0].dtype)

    @property
    def spans(self) -> list[Span]:
        """What it writes."""
        if self.group.is_whole:
            return [(tensor.name, 0, tensor.elements) for tensor in self.group.tensors]
        return [(self.group.tensors[0].name, self.start, self.stop)]

    @property
    def cost(self) -> int:
        """Estimate the floating-point operations that take as long."""
        first = self.group.tensors[0]
        inputs = len(first.inputs)
        if self.group.is_whole or first.wrapped:
            small, large = sorted(self.group.shape)
            # the Gram matrix of each model, and its eigenvectors: as measured on the matrices of ViT-B
            return inputs * small * small * (large + 2 * small)
        return _FLOPS_PER_BYTE * 4 * (inputs + 1) * (self.stop - self.start)


def pieces(plan: Plan) -> Iterator[Piece]:
    """Cut a plan into pieces: element-wise work into slices of one tensor, work on matrices into whole ones."""
    for group in plan.groups():
        first, elements = group.tensors[0], sum(tensor.elements for tensor in group.tensors)
        step = elements if group.is_whole or first.wrapped else CHUNK
        if plan.method.rows and not group.is_whole and elements:
            step = max(step // first.row, 1) * first.row
        for start in range(0, elements, max(step, 1)):
            yield Piece(group, start, min(start + step, elements))


def share_of(work: Sequence[Piece], rank: int, count: int) -> list[Piece]:
    """Return the pieces of one of ``count`` processes: the costliest first, each to the one with the least to do.

    Every process finds the same division; and its own costliest first, so that no worker is left alone with one.
    """
    loads = [(0, process) for process in range(count)]
    mine = []
    for piece in sorted(work, key=lambda piece: -piece.cost):
        load, process = loads[0]
        heapq.heapreplace(loads, (load + piece.cost, process))
        if process == rank:
            mine.append(piece)
    return mine
