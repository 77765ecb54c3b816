"""One piece of work: read the inputs of a tensor (or a slice of it), call the method, cast the result.

Element-wise work is bound by memory. So a worker reads every model straight into one buffer that it keeps, a block at a
time that stays in the core's cache: fresh memory would cost more than the arithmetic, a page fault every 4 KiB.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from cart_hf.errors import UserError
from cart_hf.merging.known import NOTHING, Known
from cart_hf.merging.thin import Thin, factorize_thin, find_thin
from cart_hf.methods import Method, get_method
from cart_hf.methods.linear import combine
from cart_hf.plan import Group, Plan, PlannedTensor
from cart_hf.sources import DTYPES, Checkpoint

if TYPE_CHECKING:
    from cart_hf.factors import FactorStore
    from cart_hf.factors.store import Centred
    from cart_hf.methods.registry import Centre
    from cart_hf.plan.coefficients import Learnt

BLOCK = 2**17  # elements of each model that a CPU computes with at a time
_of_thread = threading.local()


def merge_group(
    plan: Plan, group: Group, device: torch.device, store: FactorStore | None = None, known: Known = NOTHING
) -> torch.Tensor:
    """Merge a matrix, or matrices stacked row-wise, with a method on matrices.

    :param store: where factors are looked for, and kept.
    :return: shape of the stacked matrix, in the arithmetic's type, on ``device``.
    """
    with _naming(plan.method.name, group):
        merged = _merge_matrix(plan, group, device, store, known)
    return _wrapped(plan, group, merged, device, known)


@contextmanager
def _naming(name: str, group: Group) -> Iterator[None]:
    """Say what failed, and where, when a decomposition does."""
    from cart_hf.linalg.gram import DecompositionError  # here: element-wise work does without SciPy

    try:
        yield
    except DecompositionError as failure:
        raise RuntimeError(
            f"{name} failed on tensor '{group.name}' (shape {list(group.shape)}): {failure}"
        ) from failure


def _merge_matrix(
    plan: Plan, group: Group, device: torch.device, store: FactorStore | None, known: Known
) -> torch.Tensor:
    method, first = plan.method, group.tensors[0]
    if method.of_factors is not None:
        if store is not None:
            return merge_by_factors(plan, group, *decomposed(plan, group, device, store))
        centre = method.factors_centre
        thin = find_thin(plan, group, centre)
        if thin is not None:
            return merge_by_factors(
                plan, group, _factorize_thin(plan, group, thin, device, first.rank, first.energy, centre)
            )
        if plan.learnt(group) is not None:
            around = decompose(plan, group, device, rank=first.rank, energy=first.energy, centre=centre)
            return merge_by_factors(plan, group, around)
    arguments = _arguments(plan, first)
    models = read_group(plan, group, device)
    if method.low_rank:
        arguments |= {"rank": first.rank, "energy": first.energy}
    if method.calibration == "gram":
        assert known.calibration is not None  # found before the work
        arguments["grams"] = known.calibration.grams(plan, group, device)
    if method.needs_base:
        base = read_base(plan, group, device)
        arguments["base"] = base.mT if first.transposed else base
    if first.transposed:
        return method.function(models=models.mT, **arguments).mT
    return method.function(models=models, **arguments)


def _wrapped(plan: Plan, group: Group, merged: torch.Tensor, device: torch.device, known: Known) -> torch.Tensor:
    """Do to a merged matrix what the recipe's wrappers do: those of matrices first, in order, and those of layers."""
    first = group.tensors[0]
    scales = [known.scales.get(tensor.name, 1.0) for tensor in group.tensors]
    if not first.wrapped and set(scales) == {1.0}:
        return merged
    base = read_base(plan, group, device)
    if first.wrapped:
        merged = merged.clone()  # it may lie in the buffer that the models are read into
        for wrapper, parameters in ((one.wrapper, one.parameters) for one in plan.wrappings):
            if wrapper.matrix is None:
                continue
            models = read_group(plan, group, device)
            with _naming(wrapper.name, group):
                if first.transposed:
                    merged = wrapper.matrix(merged=merged.mT, base=base.mT, models=models.mT, **parameters).mT
                else:
                    merged = wrapper.matrix(merged=merged, base=base, models=models, **parameters)
    rows = [merged.new_full((tensor.shape[0], 1), scale) for tensor, scale in zip(group.tensors, scales, strict=True)]
    return torch.lerp(base, merged, torch.cat(rows))


def merge_by_factors(plan: Plan, group: Group, centred: Centred, ranks: Sequence[int] | None = None) -> torch.Tensor:
    """Merge a matrix (or fused group) from its centre, which is overwritten, and its factors.

    :param ranks: how many directions of each model to keep; None: all there are.
    """
    learnt = plan.learnt(group)
    if learnt is not None:
        return add_terms(centred, ranks, learnt)
    arguments = _arguments(plan, group.tensors[0])
    arguments.pop("solver", None)
    assert plan.method.of_factors is not None  # refused before the work
    return plan.method.of_factors(centre=centred.centre, factors=centred.factors, ranks=ranks, **arguments)


def add_terms(centred: Centred, ranks: Sequence[int] | None, learnt: Learnt) -> torch.Tensor:
    """Return the centre of a matrix plus its low-rank terms, each times the coefficient that was learnt for it.

    :param ranks: how many directions of each to keep; None: all there are.
    """
    from cart_hf.linalg.low_rank import weighted_sum

    factors = centred.factors if learnt.mask is None else centred.factors.masked(learnt.mask)
    return weighted_sum(factors, learnt.values, ranks).add_(centred.centre)


def decomposed(
    plan: Plan, group: Group, device: torch.device, store: FactorStore
) -> tuple[Centred, Sequence[int] | None]:
    """Return the centre and the factors of a matrix (or fused group), as kept, or else computed and then kept.

    :return: also how many directions of each model the plan keeps; None: all there are.
    """
    first = group.tensors[0]
    centred = store.load(plan, group, device)
    ranks = centred.factors.ranks(rank=first.rank, energy=first.energy) if centred else None
    if centred is None or ranks is None:
        rank = store.rank(group, first.rank) if first.rank else None
        centred = decompose(plan, group, device, rank=rank, energy=first.energy, centre=store.centre)
        store.keep(plan, group, centred)
        ranks = centred.factors.ranks(rank=first.rank) if first.rank else None
    return centred, ranks


def decompose(
    plan: Plan,
    group: Group,
    device: torch.device,
    *,
    rank: int | None,
    energy: float | None,
    centre: Centre = "average",
) -> Centred:
    """Compute the centre and the factors of a matrix (or fused group).

    :param rank: k for all models; or ``energy``, see :func:`cart_hf.linalg.low_rank.factorize`.
    :param centre: what the matrices are centred at.
    """
    from cart_hf.factors.store import Centred
    from cart_hf.methods.cart import centred_factors

    parameters, inputs = group.tensors[0].parameters, group.tensors[0].inputs
    weight, solver = parameters.get("weight", [1.0] * len(inputs)), parameters.get("solver", "fast")
    thin = find_thin(plan, group, centre)
    if thin is not None:
        return _factorize_thin(plan, group, thin, device, rank, energy, centre)
    models = read_group(plan, group, device)
    around = read_base(plan, group, device) if centre == "base" else None
    return Centred(*centred_factors(models, weight, rank=rank, energy=energy, solver=solver, centre=around))


def _factorize_thin(
    plan: Plan,
    group: Group,
    thin: Thin,
    device: torch.device,
    rank: int | None,
    energy: float | None,
    centre: Centre,
) -> Centred:
    """Do the same for the adapters of one base."""
    from cart_hf.factors.store import Centred

    (tensor,) = group.tensors
    base = thin.read_base(arithmetic(plan)).to(device)
    i, name = tensor.inputs[0]
    refuse_broken(base, plan.models[i], name)
    weight = tensor.parameters.get("weight", [1.0] * len(tensor.inputs)) if centre == "average" else None
    return Centred(*factorize_thin(thin, base, weight, rank=rank, energy=energy))


def read_base(plan: Plan, group: Group, device: torch.device) -> torch.Tensor:
    """Read the base's matrices, stacked, shape (m, n)."""
    assert plan.base is not None  # what to centre at the base means
    parts = [
        read_input(plan, plan.base, tensor.base_input, (0, tensor.elements), device).view(tensor.shape)
        for tensor in group.tensors
        if tensor.base_input is not None
    ]
    return torch.cat(parts)


def read_group(plan: Plan, group: Group, device: torch.device) -> torch.Tensor:
    """Read the matrices of every model, shape (T, m, n), into this thread's buffer where the device is the CPU."""
    first = group.tensors[0]
    models = _buffer(plan, len(first.inputs), math.prod(group.shape))
    row = 0
    for tensor in group.tensors:
        for place, (i, name) in enumerate(tensor.inputs):
            _read_row(models[place, row : row + tensor.elements], plan.models[i], name, 0)
        row += tensor.elements
    return models.view(len(first.inputs), *group.shape).to(device)


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
    return _wrapped(plan, Group((tensor,)), whole, device, known).reshape(-1).cpu()


def _merged_blocks(
    plan: Plan, tensor: PlannedTensor, span: tuple[int, int], device: torch.device, known: Known
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield what a tensor's elements merge to, a block at a time, and the block's first element, from the span's."""
    method, arguments = plan.method, _arguments(plan, tensor)
    learnt = plan.learnt(Group((tensor,)))
    if tensor.role == "average" and learnt is None:
        normalize = arguments.get("normalize", True) if method.name == "average" else True
        arguments = {"weight": arguments.get("weight", [1.0] * len(tensor.inputs)), "normalize": normalize}
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


def chunk_terms(
    plan: Plan, tensor: PlannedTensor, start: int, stop: int, device: torch.device, known: Known = NOTHING
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield elements ``start`` to ``stop`` of a tensor as a linear method's centre and terms, a block at a time.

    :return: the block's first element, counted from ``start``; the centre, 1-D; the terms, shape (models, elements).
    """
    arguments, linear = _arguments(plan, tensor), plan.method.linear
    assert linear is not None  # the caller's business
    for first, inputs, _ in _blocks(plan, tensor, (start, stop), device, plan.method, known):
        centre, terms = linear.terms(**inputs, **arguments)
        yield first, centre.reshape(-1), terms.flatten(start_dim=1)


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


def sources_of(plan: Plan, tensor: PlannedTensor, *, with_base: bool | None = None) -> list[tuple[Checkpoint, str]]:
    """Return what a tensor is made from, and its name there: every model's, and last the base's where it is needed.

    A tensor that is copied has one source: the base where the base has it, else the first model.

    :param with_base: whether the base is needed; default: as the method does.
    """
    models = [(plan.models[i], name) for i, name in tensor.inputs]
    base = [(plan.base, tensor.base_input)] if plan.base is not None and tensor.base_input is not None else []
    if tensor.role == "base":
        return (base or models)[:1]
    if with_base is None:
        acts = tensor.role == "elementwise" or tensor.is_whole
        with_base = bool(plan.wrappings) or (acts and plan.method.needs_base)
    return models + base if with_base else models


def read_block(plan: Plan, sources: Sequence[tuple[Checkpoint, str]], span: tuple[int, int]) -> torch.Tensor:
    """Read a slice of each source, in the arithmetic's type, into this thread's buffer: until the next call.

    :return: shape (sources, elements), on the CPU.
    :raises UserError: naming tensor and model, when one holds NaN or Inf.
    """
    block = _buffer(plan, len(sources), span[1] - span[0])
    for row, (model, name) in zip(block, sources, strict=True):
        _read_row(row, model, name, span[0])
    return block


def _buffer(plan: Plan, rows: int, elements: int) -> torch.Tensor:
    """Return this thread's buffer, shape (rows, elements), in the arithmetic's type."""
    dtype = arithmetic(plan)
    buffer: torch.Tensor | None = getattr(_of_thread, "buffer", None)
    if buffer is None or buffer.dtype != dtype or buffer.numel() < rows * elements:
        buffer = _of_thread.buffer = torch.empty(rows * elements, dtype=dtype)
    return buffer[: rows * elements].view(rows, elements)


def _read_row(row: torch.Tensor, model: Checkpoint, name: str, start: int) -> None:
    """Fill ``row`` (1-D) with a tensor's elements from ``start`` on.

    :raises UserError: naming tensor and model, when they hold NaN or Inf.
    """
    for first in range(0, len(row), BLOCK):
        part = row[first : first + BLOCK]
        model.read_into(part, name, start + first)
        refuse_broken(part, model, name)  # now, while it is in the cache


def read_input(plan: Plan, model: Checkpoint, name: str, span: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Read a slice of one model's tensor, in the arithmetic's type, on ``device``.

    :raises UserError: naming tensor and model, when it holds NaN or Inf.
    """
    values = model.read(name, *span).to(device=device, dtype=arithmetic(plan))
    refuse_broken(values, model, name)
    return values


def refuse_broken(values: torch.Tensor, model: Checkpoint, name: str) -> None:
    """Refuse values read from a checkpoint that are not finite.

    :raises UserError: naming tensor and model.
    """
    if not is_finite(values):
        kind = "NaN" if bool(torch.isnan(values).any()) else "Inf"
        raise UserError(
            f"tensor '{name}' of {model.name} ({model.reference}) holds {kind}: the checkpoint is broken; "
            "save or download it again, or leave the model out"
        )


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf."""
    # a finite sum proves every entry finite; only otherwise look at each (a sum may overflow)
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def cast(plan: Plan, tensor: PlannedTensor, values: torch.Tensor) -> torch.Tensor:
    """Return ``values`` on the CPU in the output's type.

    :raises UserError: when a finite result overflows it (float16).
    """
    result = values.to(device="cpu", dtype=DTYPES[tensor.dtype]).contiguous()
    if not is_finite(result):
        raise UserError(
            f"tensor '{tensor.name}': the merged values do not fit {tensor.dtype}; "
            "choose another scale, or --out-dtype float32 or bfloat16"
        )
    return result


def arithmetic(plan: Plan) -> torch.dtype:
    return torch.float64 if plan.arithmetic == "float64" else torch.float32


def _arguments(plan: Plan, tensor: PlannedTensor) -> dict[str, Any]:
    """Return the parameters that the method's function takes."""
    planning = {p.name for p in plan.method.parameters if p.planning}
    return {name: value for name, value in tensor.parameters.items() if name not in planning}


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
