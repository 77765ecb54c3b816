"""Looking ahead: what must be known of whole tensors, or of the whole model, before the first tensor is merged."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from cart_hf.merging.known import Known
from cart_hf.merging.matrices import merge_group
from cart_hf.merging.reading import BLOCK, read_base, read_block, read_group, sources_of
from cart_hf.merging.shares import Piece, pieces, share_of
from cart_hf.merging.slices import merge_exactly
from cart_hf.merging.survey import survey
from cart_hf.parallel import Progress, in_parallel
from cart_hf.plan import Group, Plan, PlannedTensor
from cart_hf.processes import Processes

if TYPE_CHECKING:
    from cart_hf.factors import FactorStore
    from cart_hf.methods.wrappers.registry import Measure, Wrapper

Part = tuple[str, int, torch.Tensor]
"""What was measured of a tensor from some element on."""


def look_ahead(
    plan: Plan, workers: int, report: Progress, processes: Processes, known: Known, store: FactorStore | None = None
) -> Known:
    """Return what the method and the wrappers must know; the same in every process.

    :param known: what is known so far.
    :param store: where factors are looked for, and kept, by what must merge to know.
    """
    known = replace(known, surveyed=survey(plan, workers, report, processes))
    # those that no adapter changes count as blocks, too, as they do in whole models
    block = {t.name: t.block for t in plan.tensors if t.inputs and t.base_input is not None}
    for wrapper, told in ((one.wrapper, one.parameters) for one in plan.wrappings):
        if wrapper.factors is None:
            continue
        measured = _measure(plan, wrapper, workers, report, processes, known, store) if wrapper.needs(told) else {}
        found = wrapper.factors(measured=measured, block=block, models=len(plan.models), **told)
        # the next one measures what this one leaves
        known = replace(known, scales={name: known.scales.get(name, 1.0) * found.get(name, 1.0) for name in block})
    return known


def _measure(
    plan: Plan,
    wrapper: Wrapper,
    workers: int,
    report: Progress,
    processes: Processes,
    known: Known,
    store: FactorStore | None,
) -> dict[str, torch.Tensor]:
    """Measure every tensor as a wrapper of layers asks for it."""
    assert wrapper.measure is not None  # of one of layers
    measure = wrapper.measure
    if wrapper.whole:
        tensors = (t for t in plan.tensors if t.linear and t.has_update)
        work = [Piece(Group((t,)), 0, t.elements) for t in tensors]
    else:
        work = [piece for piece in pieces(plan) if piece.group.tensors[0].has_update]
    mine = share_of(work, processes.rank, processes.count)
    total = sum(piece.nbytes for piece in mine)

    def one(piece: Piece) -> tuple[int, list[Part]]:
        if wrapper.whole:
            return piece.nbytes, [_of_matrix(plan, piece.group, measure, processes.device)]
        return piece.nbytes, _of_piece(plan, piece, measure, processes.device, known, store)

    parts: list[Part] = []
    for nbytes, found in in_parallel(one, mine, workers):
        parts += found
        report(f"measuring for {wrapper.name}", nbytes, total)
    measured: dict[str, torch.Tensor] = {}
    # added up in one order, whoever was first
    for name, _, numbers in sorted((part for share in processes.gather(parts) for part in share), key=lambda p: p[:2]):
        measured[name] = measured[name] + numbers if name in measured else numbers
    return measured


def _of_matrix(plan: Plan, group: Group, measure: Measure, device: torch.device) -> Part:
    (tensor,) = group.tensors
    base, models = read_base(plan, group, device), read_group(plan, group, device)
    if tensor.transposed:
        base, models = base.mT, models.mT
    return tensor.name, 0, measure(base=base, models=models)


def _of_piece(
    plan: Plan, piece: Piece, measure: Measure, device: torch.device, known: Known, store: FactorStore | None
) -> list[Part]:
    """Merge a piece, and measure it beside what it is made from, a block at a time."""
    if piece.group.is_whole:
        merged = merge_group(plan, piece.group, device, store, known).reshape(-1)
        merged = merged.to("cpu", copy=True)  # out of the buffer that the models are read into
        parts = torch.split(merged, [tensor.elements for tensor in piece.group.tensors])
        pairs = [(tensor, 0, part) for tensor, part in zip(piece.group.tensors, parts, strict=True)]
    else:
        (tensor,) = piece.group.tensors
        pairs = [(tensor, piece.start, merge_exactly(plan, tensor, piece.start, piece.stop, device, known))]
    return [_of_slice(plan, tensor, start, values, measure) for tensor, start, values in pairs]


def _of_slice(plan: Plan, tensor: PlannedTensor, start: int, merged: torch.Tensor, measure: Measure) -> Part:
    sources = sources_of(plan, tensor, with_base=True)
    total: torch.Tensor | None = None
    for first in range(0, len(merged), BLOCK):
        part = merged[first : first + BLOCK]
        block = read_block(plan, sources, (start + first, start + first + len(part)))
        numbers = measure(merged=part, base=block[-1], models=block[:-1])
        total = numbers if total is None else total + numbers
    assert total is not None  # a piece has elements
    return tensor.name, start, total
