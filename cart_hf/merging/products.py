"""Inner products of whole tensors, streamed: the angles between the models' tensors, or their task vectors."""

from __future__ import annotations

import torch

from cart_hf.merging.reading import BLOCK, read_block, sources_of
from cart_hf.parallel import Progress, in_parallel
from cart_hf.plan import Plan, PlannedTensor
from cart_hf.plan.model import CHUNK
from cart_hf.processes import Processes

Slice = tuple[PlannedTensor, int, int]
"""Some elements of a tensor, in every model that has it."""

_IN_CACHE = 2**12  # elements of each model at a time in float64: what stays in the core's own cache


def inner_products(plan: Plan, workers: int, report: Progress, processes: Processes) -> dict[str, torch.Tensor]:
    """Return ``<V_i, V_j>`` of every tensor that the method is applied to; the same in every process.

    ``V_t`` is the tensor of the t-th model that has it, minus the base's where the method needs the base, in float64.
    Takes one pass over the models and O(T² n) operations for n elements; memory does not depend on their size.

    :return: by the tensor's name, shape (T, T), float64, on the CPU.
    """
    tensors = [tensor for tensor in plan.tensors if tensor.role == "elementwise"]
    slices = [
        (tensor, start, min(start + CHUNK, tensor.elements))
        for tensor in tensors
        for start in range(0, tensor.elements, CHUNK)
    ]
    mine = slices[processes.rank :: processes.count]
    total = sum(stop - start for _, start, stop in mine)

    def multiply(piece: Slice) -> tuple[Slice, torch.Tensor]:
        return piece, _of_slice(plan, piece)

    found = []
    for (tensor, start, stop), products in in_parallel(multiply, mine, workers):
        found.append((tensor.name, start, products))
        report("measuring angles", stop - start, total)
    everyone = [part for share in processes.gather(found) for part in share]
    summed = {t.name: torch.zeros(len(t.inputs), len(t.inputs), dtype=torch.float64) for t in tensors}
    for name, _, products in sorted(everyone, key=lambda part: part[:2]):  # in one order, whoever was first
        summed[name] += products
    return summed


def _of_slice(plan: Plan, piece: Slice) -> torch.Tensor:
    tensor, start, stop = piece
    count, sources = len(tensor.inputs), sources_of(plan, tensor, with_base=plan.method.needs_base)
    products = torch.zeros(count, count, dtype=torch.float64)
    for first in range(start, stop, BLOCK):
        block = read_block(plan, sources, (first, min(first + BLOCK, stop)))
        for part in torch.split(block, _IN_CACHE, dim=1):
            rows = part.double()
            if len(rows) > count:
                rows = rows[:count] - rows[count]
            products += rows @ rows.T
    return products
