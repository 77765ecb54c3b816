"""TIES' thresholds: the exact order statistic of each task vector's magnitudes, over the whole model, streamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from cart_hf.linalg import MagnitudeHistogram
from cart_hf.merging.pieces import Thresholds, read_input
from cart_hf.parallel import Progress, in_parallel
from cart_hf.plan import Plan, PlannedTensor
from cart_hf.plan.model import CHUNK

Histograms = dict[tuple[int, str], MagnitudeHistogram]
"""By (model, tensor name); the name is empty where one threshold serves the whole model."""


class _Slice(NamedTuple):
    scope: tuple[int, str]
    tensor: PlannedTensor
    name: str  # the tensor's name in the model
    start: int
    stop: int


def magnitude_thresholds(plan: Plan, workers: int, report: Progress) -> Thresholds:
    """Return the magnitude at which each model's task vector is trimmed, for every tensor.

    With N entries and density d, the threshold is the k-th smallest magnitude with ``k = N - int(d N)`` over the whole
    model, as the TIES authors' code has it. Per tensor (``per_tensor``, or a density that varies by tensor),
    ``k = N - int(d N) + 1`` keeps ``int(d N)`` entries, as mergekit does. Reads the models twice; memory does not
    depend on their size.
    """
    tensors = [t for t in plan.tensors if t.role == "elementwise"]
    scopes = {(i, t.name): scope for i in range(len(plan.models)) for t, scope in _scopes(tensors, i)}
    slices = [
        _Slice(scopes[i, tensor.name], tensor, name, start, min(start + CHUNK, tensor.elements))
        for tensor in tensors
        for i, name in tensor.inputs
        for start in range(0, tensor.elements, CHUNK)
    ]
    histograms = _count(plan, slices, {}, workers, report, "finding thresholds (1 of 2)")
    for tensor in tensors:
        for place, (i, _) in enumerate(tensor.inputs):
            histogram = histograms[scopes[i, tensor.name]]
            if not histogram.narrowed:
                kept = int(tensor.parameters["density"][place] * histogram.count)
                per_tensor = scopes[i, tensor.name][1] != ""
                histogram.narrow(max(1, min(histogram.count - kept + per_tensor, histogram.count)))
    histograms = _count(plan, slices, histograms, workers, report, "finding thresholds (2 of 2)")
    return {
        (i, t.name): 0.0 if t.parameters["density"][place] >= 1 else histograms[scopes[i, t.name]].value()
        for t in tensors
        for place, (i, _) in enumerate(t.inputs)
    }


def _scopes(tensors: Sequence[PlannedTensor], i: int) -> list[tuple[PlannedTensor, tuple[int, str]]]:
    """Say which histogram each tensor of model ``i`` counts in."""
    densities = {t.name: t.parameters["density"][p] for t in tensors for p, (j, _) in enumerate(t.inputs) if i == j}
    varies = len(set(densities.values())) > 1
    return [(t, (i, t.name if varies or t.parameters["per_tensor"] else "")) for t in tensors if t.name in densities]


def _count(
    plan: Plan, slices: Sequence[_Slice], before: Mapping[tuple[int, str], MagnitudeHistogram], workers: int,
    report: Progress, step: str,
) -> Histograms:  # fmt: skip
    """Show every slice to its histogram: a new one, or the next pass of the one it had before."""
    total = sum(piece.stop - piece.start for piece in slices)

    def count(piece: _Slice) -> tuple[_Slice, MagnitudeHistogram]:
        histogram = before[piece.scope].fork() if piece.scope in before else MagnitudeHistogram()
        histogram.add(_task_vector(plan, piece))
        return piece, histogram

    found: Histograms = dict(before)
    for piece, histogram in in_parallel(count, slices, workers):
        if piece.scope in found:
            found[piece.scope].join(histogram)
        else:
            found[piece.scope] = histogram
        report(step, piece.stop - piece.start, total)
    return found


def _task_vector(plan: Plan, piece: _Slice) -> torch.Tensor:
    base_name = piece.tensor.base_input
    assert plan.base is not None and base_name is not None  # what the elementwise role means
    cpu, span = torch.device("cpu"), (piece.start, piece.stop)
    values = read_input(plan, plan.models[piece.scope[0]], piece.name, span, cpu)
    return values.sub_(read_input(plan, plan.base, base_name, span, cpu))
