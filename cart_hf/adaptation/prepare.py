"""From a plan to the terms of every weight that is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cart_hf.adaptation.terms import DenseTerms, LowRankTerms, Rows, Terms
from cart_hf.factors import FactorStore
from cart_hf.linalg.low_rank import Factors
from cart_hf.merging.decomposing import decomposed
from cart_hf.merging.known import NOTHING, Known
from cart_hf.merging.shares import Piece, pieces
from cart_hf.merging.slices import chunk_terms
from cart_hf.merging.survey import survey
from cart_hf.parallel import Progress, in_parallel, one_blas_thread, silent
from cart_hf.plan import Group, Plan
from cart_hf.processes import Processes

Parameters = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True)
class Preparation:
    """What the terms are made with.

    :param plan: the merge.
    :param parameters: the model's weights that are learnt, by the names of the plan's tensors.
    :param folder: where dense terms and centres go; None: onto the device.
    :param store: where factors are found, and kept; None for a method without.
    :param mask_ratio: share of the smaller dimension that directions are chosen from; None: they are not chosen.
    :param device: the model's.
    :param workers: threads.
    """

    plan: Plan
    parameters: Parameters
    folder: Path | None
    store: FactorStore | None
    mask_ratio: float | None
    device: torch.device
    workers: int

    def everywhere(self, processes: Processes, progress: Progress | None) -> list[Terms]:
        """Return the terms in every process; what lies on disk is written by the first."""
        if self.folder is None:
            return processes.everywhere(lambda: self.terms(progress, fill=True), in_turns=True)
        self.folder.mkdir(exist_ok=True)
        own: list[Terms] = []
        processes.by_main(lambda: own.extend(self.terms(progress, fill=True)))
        return processes.everywhere(lambda: own or self.terms(progress, fill=False))

    def terms(self, progress: Progress | None, *, fill: bool) -> list[Terms]:
        """Return the terms, in the order of the plan's tensors.

        :param fill: whether to compute what goes into the folder; False where another process has done so.
        """
        groups = learnable_groups(self.plan, self.parameters)
        rows = {group.name: self._room(place, group, fill=fill) for place, group in enumerate(groups)}
        total = sum(tensor.nbytes for group in groups for tensor in group.tensors)
        known = self._known(progress) if fill else NOTHING
        found: dict[str, Terms] = {}

        def work(piece: Piece) -> int:
            name = piece.group.name
            if piece.group.is_whole:
                found[name] = self._low_rank(piece.group, rows[name], fill=fill)
            elif fill:
                self._fill(piece, rows[name], known)
            return piece.nbytes

        wanted = [piece for piece in pieces(self.plan) if piece.group.name in rows]
        with one_blas_thread():
            for nbytes in in_parallel(work, wanted, self.workers):
                if progress is not None:
                    progress("preparing terms", nbytes, total)
        for group in groups:
            if group.name not in found:
                found[group.name] = DenseTerms(group, self._weights(group)[0], rows[group.name])
        return [found[group.name] for group in groups]

    def _known(self, progress: Progress | None) -> Known:
        with one_blas_thread():
            found = survey(self.plan, self.workers, progress or silent, Processes(0, 1, self.device))
        return Known(surveyed=found)

    def _room(self, place: int, group: Group, *, fill: bool) -> Rows:
        first = group.tensors[0]
        count = 1 if group.is_whole else 1 + len(first.inputs)
        elements = sum(tensor.elements for tensor in group.tensors)
        if self.folder is None:
            return Rows.empty(count, elements, self.device)
        path = self.folder / f"{place}.rows"
        return Rows.empty(count, elements, path) if fill else Rows(count, elements, path)

    def _fill(self, piece: Piece, rows: Rows, known: Known) -> None:
        (tensor,) = piece.group.tensors
        for first, centre, terms in chunk_terms(self.plan, tensor, piece.start, piece.stop, self.device, known):
            for row, values in enumerate((centre, *terms)):
                rows.write(row, piece.start + first, values)

    def _low_rank(self, group: Group, centre: Rows, *, fill: bool) -> Terms:
        assert self.store is not None  # a method of factors has one
        first = group.tensors[0]
        if self.mask_ratio is not None:
            width = max(int(self.mask_ratio * min(group.shape)), first.rank or 1)
            group = Group(tuple(replace(tensor, rank=width, energy=None) for tensor in group.tensors))
        centred, _ = decomposed(self.plan, group, self.device, self.store)
        factors = centred.factors
        if self.mask_ratio is not None:
            factors = factors.cut(width)
        ranks = factors.ranks(rank=first.rank, energy=first.energy) or [factors.rank] * len(first.inputs)
        factors = factors.cut(max(ranks)) if self.mask_ratio is None else factors
        if fill or self.folder is None:
            centre.write(0, 0, centred.centre.reshape(-1))
        # copied, so that the file, which has the centre too, need not stay mapped
        left, singular, right = (
            part.to(torch.float32, copy=True) for part in (factors.left, factors.singular, factors.right)
        )
        single = Factors(left, singular, right, factors.squares)
        return LowRankTerms(group, self._weights(group), centre, single, ranks)

    def _weights(self, group: Group) -> list[torch.nn.Parameter]:
        return [self.parameters[tensor.name] for tensor in group.tensors]


def learnable_groups(plan: Plan, parameters: Parameters) -> list[Group]:
    """Return the tensors (and fused groups) that have coefficients, and that the model has weights for."""
    return [
        group
        for group in plan.groups()
        if plan.own_coefficients(group) is not None and all(tensor.name in parameters for tensor in group.tensors)
    ]


def parameters_of(model: torch.nn.Module, plan: Plan) -> dict[str, torch.nn.Parameter]:
    """Return the model's weights by the names of the plan's tensors, where a tensor is one weight."""
    own = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, torch.nn.Parameter] = {}
    used: set[int] = set()
    for tensor in plan.tensors:
        weight = own.get(tensor.name)
        if weight is not None and tuple(weight.shape) == tensor.shape and id(weight) not in used:
            found[tensor.name] = weight
            used.add(id(weight))
    return found
