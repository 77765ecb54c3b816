"""TIES' thresholds: the exact order statistic of each task vector's magnitudes, over the whole model, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from cart_hf.merging.pieces import BLOCK, Thresholds, read_block
from cart_hf.parallel import Progress, in_parallel
from cart_hf.plan import Plan, PlannedTensor
from cart_hf.plan.model import CHUNK
from cart_hf.processes import Processes

if TYPE_CHECKING:
    from cart_hf.linalg.magnitude import MagnitudeHistogram

Slice = tuple[PlannedTensor, int, int]
"""Some elements of a tensor, in every model that has it."""

_SAMPLED = 64  # one entry in so many is looked at first, to know which window to count them all in
_MARGIN = 1  # by which a sample's window is wider: it then spans 1.5 to 3 % of the threshold


@dataclass(frozen=True)
class _Scope:
    """The entries of one model that share a threshold.

    :param model: the model's place in the plan.
    :param names: the tensors, and their names in the model.
    :param elements: how many entries there are.
    :param kth: which of their magnitudes, from the smallest on, is the threshold.
    """

    model: int
    names: Mapping[str, str]
    elements: int
    kth: int


def magnitude_thresholds(plan: Plan, workers: int, report: Progress, processes: Processes) -> Thresholds:
    """Return the magnitude at which each model's task vector is trimmed, for every tensor; the same in every process.

    With N entries and density d, the threshold is the k-th smallest magnitude with ``k = N - int(d N)`` over the whole
    model, as the TIES authors' code has it. Per tensor (``per_tensor``, or a density that varies by tensor),
    ``k = N - int(d N) + 1`` keeps ``int(d N)`` entries, as mergekit does. Reads a sample of the models and then all of
    them, and twice more where the sample has misled; memory does not depend on their size.
    """
    tensors = [t for t in plan.tensors if t.role == "elementwise"]
    scopes = [scope for i in range(len(plan.models)) for scope in _scopes(tensors, i)]
    across = [scope for scope in scopes if len(scope.names) > 1]
    by_tensor: dict[str, list[_Scope]] = {}
    for scope in scopes:
        if len(scope.names) == 1:
            by_tensor.setdefault(next(iter(scope.names)), []).append(scope)
    single = sorted(by_tensor.values(), key=lambda scopes: -scopes[0].elements)[processes.rank :: processes.count]
    total = sum(scopes[0].elements for scopes in single)

    def run(work: Callable[[Slice], int], slices: Sequence[Slice]) -> Iterator[int]:
        mine = slices[processes.rank :: processes.count]
        whole = sum(stop - start for _, start, stop in mine)
        for elements in in_parallel(work, mine, workers):
            report("finding thresholds", elements, whole)
            yield elements

    def alone(scopes: list[_Scope]) -> list[tuple[_Scope, float]]:
        return list(zip(scopes, _find(plan, scopes, map, Processes(0, 1, processes.device)), strict=True))

    found = list(zip(across, _find(plan, across, run, processes), strict=True))
    of_tensors = []
    for pairs in in_parallel(alone, single, workers):
        of_tensors += pairs
        report("finding thresholds of tensors", pairs[0][0].elements, total)
    found += [pair for pairs in processes.gather(of_tensors) for pair in pairs]
    if plan.arithmetic == "float64":
        found = [(scope, _least_rounded_to(threshold)) for scope, threshold in found]
    known = {(scope.model, name): threshold for scope, threshold in found for name in scope.names}
    return {(i, t.name): known.get((i, t.name), 0.0) for t in tensors for i, _ in t.inputs}


def _least_rounded_to(threshold: float) -> float:
    """Return the least number that float32, in which magnitudes are counted, rounds to a threshold."""
    below = float(np.nextafter(np.float32(threshold), np.float32(0.0)))
    return (below + threshold) / 2


def _scopes(tensors: Sequence[PlannedTensor], i: int) -> Iterator[_Scope]:
    """Say which entries of model ``i`` share a threshold; where all of them are kept there is none."""
    mine = [(t, name, t.parameters["density"][p]) for t in tensors for p, (j, name) in enumerate(t.inputs) if i == j]
    varies = len({density for _, _, density in mine}) > 1
    together = [entry for entry in mine if not (varies or entry[0].parameters["per_tensor"])]
    for members in (together, *([entry] for entry in mine if entry not in together)):
        elements = sum(t.elements for t, _, _ in members)
        if elements and members[0][2] < 1:
            kth = elements - int(members[0][2] * elements) + (members is not together)
            names = {t.name: name for t, name, _ in members}
            yield _Scope(i, names, elements, max(1, min(kth, elements)))


def _find(
    plan: Plan,
    scopes: Sequence[_Scope],
    run: Callable[[Callable[[Slice], int], Sequence[Slice]], Iterable[int]],
    processes: Processes,
) -> list[float]:
    """Return the threshold of each scope.

    :param run: shows slices to a function, or a share of them.
    :param processes: those that have the other shares.
    """
    from cart_hf.linalg.magnitude import MagnitudeHistogram  # here: the other methods do without SciPy

    found: dict[int, float] = {}
    for sampled in (_SAMPLED, 1):
        missing = [place for place in range(len(scopes)) if place not in found]
        if not missing:
            break
        wanted = [scopes[place] for place in missing]
        histograms = _count(plan, wanted, [MagnitudeHistogram() for _ in wanted], run, processes, sampled)
        for scope, histogram in zip(wanted, histograms, strict=True):
            k = max(1, round(scope.kth / scope.elements * histogram.count))
            histogram.narrow(k if sampled > 1 else scope.kth, _MARGIN if sampled > 1 else 0)
        histograms = _count(plan, wanted, [histogram.fork() for histogram in histograms], run, processes)
        values = [histogram.value(scope.kth) for scope, histogram in zip(wanted, histograms, strict=True)]
        found |= {place: value for place, value in zip(missing, values, strict=True) if value is not None}
    return [found[place] for place in range(len(scopes))]


def _count(
    plan: Plan,
    scopes: Sequence[_Scope],
    histograms: Sequence[MagnitudeHistogram],
    run: Callable[[Callable[[Slice], int], Sequence[Slice]], Iterable[int]],
    processes: Processes,
    sampled: int = 1,
) -> list[MagnitudeHistogram]:
    """Show one entry in ``sampled`` of every scope to its histogram."""
    members: dict[str, list[int]] = {}
    for place, scope in enumerate(scopes):
        for name in scope.names:
            members.setdefault(name, []).append(place)
    slices = [
        (tensor, start, min(start + CHUNK, tensor.elements))
        for tensor in plan.tensors
        if tensor.name in members
        for start in range(0, tensor.elements, CHUNK)
    ]
    lock = Lock()

    def count(piece: Slice) -> int:
        tensor, start, stop = piece
        places = members[tensor.name]
        forks = [histograms[place].fork() for place in places]
        sources = [(plan.models[scopes[place].model], scopes[place].names[tensor.name]) for place in places]
        assert plan.base is not None and tensor.base_input is not None  # what the elementwise role means
        sources.append((plan.base, tensor.base_input))
        for first in range(start, stop, BLOCK):
            elements = min(BLOCK, stop - first)
            block = read_block(plan, sources, (first, first + -(-elements // sampled)))
            for task_vector, fork in zip(block[:-1].sub_(block[-1]), forks, strict=True):
                fork.add(task_vector)
        for place, fork in zip(places, forks, strict=True):
            fork.tally()
            with lock:
                histograms[place].join(fork)
        return stop - start

    for _ in run(count, slices):
        pass
    joined, *others = processes.gather(list(histograms))
    for other in others:
        for histogram, more in zip(joined, other, strict=True):
            histogram.join(more)
    return joined
