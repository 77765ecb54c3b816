"""Merging a slice of a tensor, entry by entry."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cart_hf.merging.known import NOTHING, Known
from cart_hf.merging.reading import BLOCK, arithmetic, cast, read_block, read_input, sources_of
from cart_hf.merging.wrapping import wrapped
from cart_hf.methods import Method, get_method
from cart_hf.methods.linear import combine
from cart_hf.plan import Group, Plan, PlannedTensor
from cart_hf.sources import DTYPES


def merge_chunk(
    plan: Plan, tensor: PlannedTensor, start: int, stop: int, device: torch.device, known: Known = NOTHING
) -> torch.Tensor:
    """Merge elements ``start`` to ``stop`` of a tensor, entry by entry.

    :return: 1-D, in the output's type.
    """
    if tensor.role == "base":
        return _copy(plan, tensor, (start, stop))
    if tensor.wrapped:
        return cast(plan, tensor, merge_exactly(plan, tensor, start, stop, device, known))
    result = torch.empty(stop - start, dtype=DTYPES[tensor.dtype])
    for first, merged in _merged_blocks(plan, tensor, (start, stop), device, known):
        result[first : first + len(merged)] = cast(plan, tensor, merged)
    return result


def merge_exactly(
    plan: Plan, tensor: PlannedTensor, start: int, stop: int, device: torch.device, known: Known = NOTHING
) -> torch.Tensor:
    """Do the same with what is not just copied, before it is rounded to the output's type.

    :return: 1-D, in the arithmetic's type, on the CPU.
    """
    result = torch.empty(stop - start, dtype=arithmetic(plan))
    for first, merged in _merged_blocks(plan, tensor, (start, stop), device, known):
        result[first : first + len(merged)] = merged.cpu()
    if not tensor.wrapped:
        return result
    whole = result.view(tensor.shape).to(device)  # of a wrapped tensor there is one piece
    return wrapped(plan, Group((tensor,)), whole, device, known).reshape(-1).cpu()


def chunk_terms(
    plan: Plan, tensor: PlannedTensor, start: int, stop: int, device: torch.device, known: Known = NOTHING
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield elements ``start`` to ``stop`` of a tensor as a linear method's centre and terms, a block at a time.

    :return: the block's first element, counted from ``start``; the centre, 1-D; the terms, shape (models, elements).
    """
    arguments, linear = plan.arguments_of(tensor), plan.method.linear
    assert linear is not None  # the caller's business
    for first, inputs, _ in _blocks(plan, tensor, (start, stop), device, plan.method, known):
        centre, terms = linear.terms(**inputs, **arguments)
        yield first, centre.reshape(-1), terms.flatten(start_dim=1)


def _merged_blocks(
    plan: Plan, tensor: PlannedTensor, span: tuple[int, int], device: torch.device, known: Known
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield what a tensor's elements merge to, a block at a time, and the block's first element, from the span's."""
    method, arguments = plan.method, plan.arguments_of(tensor)
    learnt = plan.learnt(Group((tensor,)))
    if tensor.role == "average" and learnt is None:
        normalize = arguments.get("normalize", True) if method.name == "average" else True
        arguments = {"weight": tensor.weights, "normalize": normalize}
        method = get_method("average")
    # a matrix that is wrapped is scaled after that
    scale = 1.0 if tensor.wrapped else known.scales.get(tensor.name, 1.0)
    for first, inputs, base in _blocks(plan, tensor, span, device, method, known, with_base=scale != 1):
        if learnt is None:
            merged = method.function(**inputs, **arguments)
        else:
            assert method.linear is not None  # what coefficients are learnt for
            merged = combine(*method.linear.terms(**inputs, **arguments), learnt.values)
        merged = merged.reshape(-1)
        yield first, merged if scale == 1 or base is None else torch.lerp(base, merged, scale)


def _blocks(
    plan: Plan,
    tensor: PlannedTensor,
    span: tuple[int, int],
    device: torch.device,
    method: Method,
    known: Known,
    *,
    with_base: bool = False,
) -> Iterator[tuple[int, dict[str, Any], torch.Tensor | None]]:
    """Yield what an element-wise method is called with, besides its parameters, for one block after the other.

    :param with_base: whether the base's block is wanted although the method may do without.
    :return: the block's first element, counted from the span's; the arguments; the base's block, where there is one.
    """
    start, stop = span
    shared: dict[str, Any] = dict(known.surveyed.get(tensor.name, {})) if method is plan.method else {}
    if method.random:  # block by block they go on: what they draw does not depend on the block's size
        shared["generators"] = [_generator(plan, tensor, plan.models[i].name, start) for i, _ in tensor.inputs]
    count, needs_base = len(tensor.inputs), tensor.role == "elementwise" and method.needs_base
    sources = sources_of(plan, tensor, with_base=with_base or needs_base)
    shape = (-1, tensor.row) if method.rows else (-1,)
    for first in range(start, stop, step := _step(tensor, method, stop - start, device)):
        last = min(first + step, stop)
        block = read_block(plan, sources, (first, last)).to(device)
        base = block[count] if len(sources) > count else None
        inputs = {"models": block[:count].view(count, *shape), **shared}
        if needs_base and base is not None:
            inputs["base"] = base.view(shape)
        if method.calibration == "fisher":
            assert known.calibration is not None  # found before the work
            inputs["fisher"] = known.calibration.fisher(plan, tensor, first, last, device)
        yield first - start, inputs, base


def _step(tensor: PlannedTensor, method: Method, elements: int, device: torch.device) -> int:
    """Return how many elements of each model to compute with at a time."""
    if device.type != "cpu":
        return max(elements, 1)
    return max(BLOCK // tensor.row, 1) * tensor.row if method.rows else BLOCK


def _copy(plan: Plan, tensor: PlannedTensor, span: tuple[int, int]) -> torch.Tensor:
    """Read a slice to be copied."""
    ((source, name),) = sources_of(plan, tensor)
    if DTYPES[tensor.dtype].is_floating_point:
        return cast(plan, tensor, read_input(plan, source, name, span, torch.device("cpu")))
    return source.read(name, *span).to(DTYPES[tensor.dtype])


def _generator(plan: Plan, tensor: PlannedTensor, model: str, start: int) -> torch.Generator:
    """Seed a generator by recipe seed, tensor, model and position, so that no order of work changes the numbers."""
    words: Sequence[object] = (plan.recipe.seed, tensor.name, model, start)
    digest = hashlib.sha256("|".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
