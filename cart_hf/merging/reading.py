"""Reading what a piece of work is made from, and rounding its result.

Element-wise work is bound by memory. So a worker reads every model straight into one buffer that it keeps, a block at a
time that stays in the core's cache: fresh memory would cost more than the arithmetic, a page fault every 4 KiB.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch

from cart_hf.errors import UserError
from cart_hf.plan import Group, Plan, PlannedTensor
from cart_hf.sources import DTYPES, Checkpoint

BLOCK = 2**17  # elements of each model that a CPU computes with at a time
_of_thread = threading.local()


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
