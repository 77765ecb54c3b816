"""What methods must know of whole tensors beforehand: exact order statistics of the task vectors' magnitudes, streamed.

TIES trims what lies below one of them, over the whole model or each tensor; breadcrumbs what lies outside of two, for
each tensor. Angles between tensors are measured in :mod:`cart_hf.merging.products`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from cart_hf.merging.known import Surveyed
from cart_hf.merging.products import Slice, inner_products
from cart_hf.merging.reading import BLOCK, read_block
from cart_hf.methods.breadcrumbs import kept_ranks
from cart_hf.parallel import Progress, in_parallel
from cart_hf.plan import Plan, PlannedTensor
from cart_hf.plan.model import CHUNK
from cart_hf.processes import Processes

if TYPE_CHECKING:
    import torch

    from cart_hf.linalg.magnitude import MagnitudeHistogram

Thresholds = Mapping[tuple[int, str], float]
"""Magnitude below which entries are trimmed, by (model, tensor name)."""

Ranges = Mapping[tuple[int, str], tuple[float, float]]
"""Least and greatest magnitude of the entries that are kept, by (model, tensor name)."""

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


def survey(plan: Plan, workers: int, report: Progress, processes: Processes) -> Surveyed:
    """Return what the plan's method must know of whole tensors beforehand; the same in every process.

    :return: nothing, for a method that needs none.
    """
    if plan.method.survey == "products":
        products = inner_products(plan, workers, report, processes)
        return {name: {"products": of_tensor} for name, of_tensor in products.items()}
    find = {"magnitude": magnitude_thresholds, "outliers": outlier_thresholds}.get(plan.method.survey or "")
    if find is None:
        return {}
    thresholds = find(plan, workers, report, processes)
    return {t.name: {"thresholds": [thresholds[i, t.name] for i, _ in t.inputs]} for t in _tensors(plan)}


def magnitude_thresholds(plan: Plan, workers: int, report: Progress, processes: Processes) -> Thresholds:
    """Return the magnitude at which each model's task vector is trimmed, for every tensor; the same in every process.

    With N entries and density d, the threshold is the k-th smallest magnitude with ``k = N - int(d N)`` over the whole
    model, as the TIES authors' code has it. Per tensor (``per_tensor``, or a density that varies by tensor),
    ``k = N - int(d N) + 1`` keeps ``int(d N)`` entries, as mergekit does. Reads a sample of the models and then all of
    them, and twice more where the sample has misled; memory does not depend on their size.
    """
    tensors = _tensors(plan)
    scopes = [scope for i in range(len(plan.models)) for scope in _scopes(tensors, i)]
    found = _order_statistics(plan, scopes, workers, report, processes)
    if plan.arithmetic == "float64":
        found = [_least_rounded_to(threshold) for threshold in found]
    known = _by_tensor(scopes, found)
    return {(i, t.name): known.get((i, t.name), 0.0) for t in tensors for i, _ in t.inputs}


def outlier_thresholds(plan: Plan, workers: int, report: Progress, processes: Processes) -> Ranges:
    """Return the least and the greatest magnitude that each model's task vector keeps of every tensor.

    Both are the magnitudes of entries, the first and the last that :func:`cart_hf.methods.breadcrumbs.kept_ranks`
    keeps, found like TIES' thresholds of single tensors; the same in every process.
    """
    tensors = _tensors(plan)
    least, greatest = [], []
    for tensor in tensors:
        densities, gammas = tensor.parameters["density"], tensor.parameters["gamma"]
        for (i, name), density, gamma in zip(tensor.inputs, densities, gammas, strict=True):
            first, last = kept_ranks(tensor.elements, density, gamma)
            if first > 1:
                least.append(_Scope(i, {tensor.name: name}, tensor.elements, first))
            if last < tensor.elements:
                greatest.append(_Scope(i, {tensor.name: name}, tensor.elements, last))
    found = _order_statistics(plan, [*least, *greatest], workers, report, processes)
    lows, highs = found[: len(least)], found[len(least) :]
    if plan.arithmetic == "float64":
        lows, highs = [_least_rounded_to(low) for low in lows], [_greatest_rounded_to(high) for high in highs]
    low, high = _by_tensor(least, lows), _by_tensor(greatest, highs)
    places = [(i, t.name) for t in tensors for i, _ in t.inputs]
    return {place: (low.get(place, 0.0), high.get(place, math.inf)) for place in places}


def _by_tensor(scopes: Sequence[_Scope], found: Sequence[float]) -> dict[tuple[int, str], float]:
    return {(scope.model, name): one for scope, one in zip(scopes, found, strict=True) for name in scope.names}


def _tensors(plan: Plan) -> list[PlannedTensor]:
    return [tensor for tensor in plan.tensors if tensor.role == "elementwise"]


def _order_statistics(
    plan: Plan, scopes: Sequence[_Scope], workers: int, report: Progress, processes: Processes
) -> list[float]:
    """Return the threshold of each scope.

    Those over several tensors are found together, each process with a share of the slices; those of one tensor by one
    worker, tensor by tensor, largest first.
    """
    across = [place for place, scope in enumerate(scopes) if len(scope.names) > 1]
    by_tensor: dict[str, list[int]] = {}
    for place, scope in enumerate(scopes):
        if len(scope.names) == 1:
            by_tensor.setdefault(next(iter(scope.names)), []).append(place)
    single = sorted(by_tensor.values(), key=lambda places: -scopes[places[0]].elements)
    single = single[processes.rank :: processes.count]
    total = sum(scopes[places[0]].elements for places in single)

    def run(work: Callable[[Slice], int], slices: Sequence[Slice]) -> Iterator[int]:
        mine = slices[processes.rank :: processes.count]
        whole = sum(stop - start for _, start, stop in mine)
        for elements in in_parallel(work, mine, workers):
            report("finding thresholds", elements, whole)
            yield elements

    def alone(places: list[int]) -> list[tuple[int, float]]:
        members = [scopes[place] for place in places]
        if members[0].elements <= BLOCK:
            return list(zip(places, _select(plan, members), strict=True))
        found = _find(plan, members, map, Processes(0, 1, processes.device))
        return list(zip(places, found, strict=True))

    known = dict(zip(across, _find(plan, [scopes[place] for place in across], run, processes), strict=True))
    of_tensors: list[tuple[int, float]] = []
    for pairs in in_parallel(alone, single, workers):
        of_tensors += pairs
        report("finding thresholds of tensors", scopes[pairs[0][0]].elements, total)
    known |= {place: threshold for share in processes.gather(of_tensors) for place, threshold in share}
    return [known[place] for place in range(len(scopes))]


def _least_rounded_to(threshold: float) -> float:
    """Return the least number that float32, in which magnitudes are counted, rounds to a threshold."""
    below = float(np.nextafter(np.float32(threshold), np.float32(0.0)))
    return (below + threshold) / 2


def _greatest_rounded_to(threshold: float) -> float:
    """Return the greatest number that float32 rounds to a threshold."""
    above = float(np.nextafter(np.float32(threshold), np.float32(np.inf)))
    return (threshold + above) / 2


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


def _select(plan: Plan, scopes: Sequence[_Scope]) -> list[float]:
    """Return the threshold of each scope, all of one tensor that is read at once."""
    (name,) = scopes[0].names
    tensor = next(tensor for tensor in plan.tensors if tensor.name == name)
    task_vectors = _read(plan, tensor, scopes, (0, tensor.elements))
    return [float(task_vectors[scope.model].abs().float().kthvalue(scope.kth).values) for scope in scopes]


def _read(
    plan: Plan, tensor: PlannedTensor, scopes: Iterable[_Scope], span: tuple[int, int]
) -> dict[int, torch.Tensor]:
    """Return some entries of the task vectors, by the model's place in the plan, until the next call."""
    names = {scope.model: scope.names[tensor.name] for scope in scopes}
    assert plan.base is not None and tensor.base_input is not None  # what the elementwise role means
    sources = [(plan.models[i], name) for i, name in names.items()]
    block = read_block(plan, [*sources, (plan.base, tensor.base_input)], span)
    return dict(zip(names, block[:-1].sub_(block[-1]), strict=True))


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
        for first in range(start, stop, BLOCK):
            elements = min(BLOCK, stop - first)
            span = first, first + -(-elements // sampled)
            task_vectors = _read(plan, tensor, (scopes[place] for place in places), span)
            for place, fork in zip(places, forks, strict=True):
                fork.add(task_vectors[scopes[place].model])
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
