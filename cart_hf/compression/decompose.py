"""Factors for every adapter, and how many of them each layer keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from cart_hf.compression.adapter import header_bytes
from cart_hf.compression.outline import Outline
from cart_hf.compression.ranks import allot
from cart_hf.errors import UserError
from cart_hf.factors import FactorStore
from cart_hf.linalg.low_rank import Factors
from cart_hf.merging.decomposing import decomposed
from cart_hf.parallel import Progress, in_parallel, one_blas_thread
from cart_hf.plan import Group, Plan

Ranks = Mapping[str, int]
"""The rank of each layer of one task, by module."""

Decompose = Callable[[Sequence[Group]], Mapping[str, Sequence[int]]]
"""Decomposes matrices, and returns the rank of each model's, by name."""


def decomposer(
    plan: Plan, store: FactorStore, device: torch.device, workers: int, progress: Progress | None
) -> Decompose:
    """Return what decomposes matrices to the ranks that are planned for them.

    :param store: receives the factors.
    """

    def work(group: Group) -> tuple[Group, Sequence[int]]:
        centred, ranks = decomposed(plan, group, device, store)
        return group, ranks if ranks is not None else [centred.factors.rank] * len(centred.factors.singular)

    def decompose(groups: Sequence[Group]) -> dict[str, Sequence[int]]:
        total = sum(group.tensors[0].nbytes for group in groups)
        found = {}
        with one_blas_thread():
            for group, ranks in in_parallel(work, groups, workers):
                found[group.name] = ranks
                if progress is not None:
                    progress("decomposing", group.tensors[0].nbytes, total)
        return found

    return decompose


def ranks_as_planned(outlines: Sequence[Outline], decompose: Decompose) -> list[Ranks]:
    """Return the rank of every layer of each adapter."""
    found = decompose(list(_groups(outlines).values()))
    return [{t.module: found[t.group.name][t.place] for t in outline.targets} for outline in outlines]


def ranks_within(
    plan: Plan, outlines: Sequence[Outline], store: FactorStore, decompose: Decompose, *, budget: int, size: int
) -> list[Ranks]:
    """Return ranks that fit a size, chosen where they reduce the error most.

    :param budget: bytes of each adapter's file.
    :param size: bytes of a number.
    :raises UserError: when not even one direction of each layer fits.
    """
    room = [budget - _least(outline, size) for outline in outlines]
    for outline, left in zip(outlines, room, strict=True):
        if left < 0:
            raise UserError(
                f"--budget: the adapter of {outline.name} takes {(budget - left) / 1e6:.2f} MB with one direction of "
                f"each layer ({outline.fixed_bytes / 1e6:.2f} MB of it head and restored tensors); give more"
            )
    # at first twice what the layers would get if they shared alike; those that want more are decomposed again
    alike = max(1 + n // _all_alike(outline, size) for n, outline in zip(room, outlines, strict=True))
    groups = _groups(outlines)
    bounds = {name: min(2 * alike, *group.shape) for name, group in groups.items()}
    missing = list(groups)
    ranks: list[Ranks] = []
    while missing:
        decompose([_with_rank(groups[name], bounds[name]) for name in missing])
        spectra = {name: store.spectra(plan, group).double().numpy() for name, group in groups.items()}
        ranks = []
        for outline, left in zip(outlines, room, strict=True):
            values = [spectra[t.group.name][t.place, : bounds[t.group.name]] for t in outline.targets]
            costs = [size * t.numbers for t in outline.targets]
            chosen = allot(values, costs, left + _all_alike(outline, size))
            ranks.append({t.module: rank for t, rank in zip(outline.targets, chosen, strict=True)})
        pairs = [
            (t, chosen[t.module]) for outline, chosen in zip(outlines, ranks, strict=True) for t in outline.targets
        ]
        missing = sorted({t.group.name for t, rank in pairs if rank == bounds[t.group.name] < min(t.group.shape)})
        bounds |= {name: min(2 * bounds[name], *groups[name].shape) for name in missing}
    return ranks


def factors_of(plan: Plan, outline: Outline, ranks: Ranks, store: FactorStore) -> dict[str, Factors]:
    """Return the factors of one model, cut to their ranks, by module; directions without length are left out."""
    found = {}
    for target in outline.targets:
        factors = store.of_model(plan, target.group, target.place)
        found[target.module] = factors.cut(min(ranks[target.module], int((factors.singular > 0).sum())))
    return found


def _groups(outlines: Sequence[Outline]) -> dict[str, Group]:
    return {target.group.name: target.group for outline in outlines for target in outline.targets}


def _with_rank(group: Group, rank: int) -> Group:
    return Group(tuple(replace(tensor, rank=rank, energy=None) for tensor in group.tensors))


def _all_alike(outline: Outline, size: int) -> int:
    """Return the bytes of one direction of each layer."""
    return size * sum(target.numbers for target in outline.targets)


def _least(outline: Outline, size: int) -> int:
    """Return the bytes of an adapter with one direction of each layer."""
    return outline.fixed_bytes + header_bytes(outline) + _all_alike(outline, size)
