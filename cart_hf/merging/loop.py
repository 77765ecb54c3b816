"""Carrying out a plan: pieces of work, read, merged and written by a few worker threads.

Element-wise work is cut into chunks of one tensor and low-rank work is one matrix (or one fused group) at a time, so
memory does not grow with the model. Each worker uses one BLAS thread; the solver and the tensor library release
Python's lock. A piece's result does not depend on who computes it or when, so any number of workers writes the same
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import torch

from cart_hf.merging.pieces import Thresholds, cast, merge_chunk, merge_group
from cart_hf.merging.survey import magnitude_thresholds
from cart_hf.parallel import Progress, cores, in_parallel, one_blas_thread
from cart_hf.plan import Group, Plan, PlannedTensor
from cart_hf.plan.model import CHUNK
from cart_hf.sources import element_size

Write = Callable[[PlannedTensor, int, torch.Tensor], None]


@dataclass(frozen=True)
class _Piece:
    group: Group
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * element_size(self.group.tensors[0].dtype)


def default_workers(plan: Plan, device: torch.device) -> int:
    """Return how many workers to use: one per core on a CPU, two (to read while computing) for an accelerator.

    Fewer, when the tensors that all of them hold would take more than half of the memory that is free.
    """
    workers = min(cores(), 16) if device.type == "cpu" else 2
    budget = psutil.virtual_memory().available / 2
    while workers > 1 and plan.memory(workers) > budget:
        workers -= 1
    return workers


def run(plan: Plan, device: torch.device, write: Write, *, workers: int, progress: Progress | None = None) -> None:
    """Merge every planned tensor and hand the results to ``write``.

    :param write: called with a tensor of the plan, the first element's position in it, and a 1-D tensor of the
        output's type; from several threads at once.
    :raises UserError: when an input holds NaN or Inf, or a result does not fit the output's type.
    """
    report = progress or (lambda step, advance, total: None)
    with one_blas_thread():
        thresholds: Thresholds = {}
        if plan.method.survey == "magnitude":
            thresholds = magnitude_thresholds(plan, workers, report)
        pieces = list(_pieces(plan))
        total = sum(piece.nbytes for piece in pieces)

        def work(piece: _Piece) -> int:
            _carry_out(plan, piece, device, thresholds, write)
            return piece.nbytes

        for nbytes in in_parallel(work, pieces, workers):
            report("merging", nbytes, total)


def _pieces(plan: Plan) -> Iterator[_Piece]:
    """Cut the plan into pieces, the expensive ones first so that no worker is left alone with one at the end."""
    groups = sorted(plan.groups(), key=lambda g: g.tensors[0].role != "low_rank")
    for group in groups:
        elements = sum(t.elements for t in group.tensors)
        if group.tensors[0].role == "low_rank":
            yield _Piece(group, 0, elements)
            continue
        for start in range(0, elements, CHUNK):
            yield _Piece(group, start, min(start + CHUNK, elements))


def _carry_out(plan: Plan, piece: _Piece, device: torch.device, thresholds: Thresholds, write: Write) -> None:
    tensors = piece.group.tensors
    if tensors[0].role == "low_rank":
        merged = merge_group(plan, piece.group, device)
        for tensor, part in zip(tensors, torch.split(merged, [t.shape[0] for t in tensors]), strict=True):
            write(tensor, 0, cast(plan, tensor, part.reshape(-1)))
        return
    (tensor,) = tensors
    write(tensor, piece.start, merge_chunk(plan, tensor, piece.start, piece.stop, device, thresholds))
