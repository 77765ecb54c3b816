"""One piece of work: read the inputs of a tensor (or a slice of it), call the method, cast the result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cart_hf.errors import UserError
from cart_hf.linalg import DecompositionError
from cart_hf.methods import get_method
from cart_hf.plan import Group, Plan, PlannedTensor
from cart_hf.sources import DTYPES, Checkpoint

Thresholds = Mapping[tuple[int, str], float]
"""Magnitude below which entries are trimmed, by (model, tensor name)."""


def merge_group(plan: Plan, group: Group, device: torch.device) -> torch.Tensor:
    """Merge a matrix, or matrices stacked row-wise, with a low-rank method.

    :return: shape of the stacked matrix, in the arithmetic's type, on ``device``.
    """
    first = group.tensors[0]
    whole = [(0, t.elements) for t in group.tensors]
    models = torch.stack(
        [
            torch.cat(
                [
                    read_input(plan, plan.models[i], t.inputs[place][1], span, device).view(t.shape)
                    for t, span in zip(group.tensors, whole, strict=True)
                ]
            )
            for place, (i, _) in enumerate(first.inputs)
        ]
    )
    return _call(plan, first, models, None, {"rank": first.rank, "energy": first.energy})


def merge_chunk(
    plan: Plan, tensor: PlannedTensor, start: int, stop: int, device: torch.device, thresholds: Thresholds
) -> torch.Tensor:
    """Merge elements ``start`` to ``stop`` of a tensor, entry by entry.

    :return: 1-D, in the output's type.
    """
    span = (start, stop)
    if tensor.role == "base":
        return _copy(plan, tensor, span)
    models = torch.stack([read_input(plan, plan.models[i], name, span, device) for i, name in tensor.inputs])
    if tensor.role == "average":
        weight = tensor.parameters.get("weight", [1.0] * len(models))
        normalize = tensor.parameters.get("normalize", True) if plan.method.name == "average" else True
        return cast(plan, tensor, get_method("average").function(models=models, weight=weight, normalize=normalize))
    base = None
    if plan.method.needs_base and plan.base is not None and tensor.base_input is not None:
        base = read_input(plan, plan.base, tensor.base_input, span, device)
    extra: dict[str, Any] = {}
    if plan.method.survey == "magnitude":
        extra["thresholds"] = [thresholds[i, tensor.name] for i, _ in tensor.inputs]
    if plan.method.random:
        extra["generators"] = [_generator(plan, tensor, plan.models[i].name, start) for i, _ in tensor.inputs]
    return cast(plan, tensor, _call(plan, tensor, models, base, extra))


def read_input(plan: Plan, model: Checkpoint, name: str, span: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Read a slice of one model's tensor, in the arithmetic's type, on ``device``.

    :raises UserError: naming tensor and model, when it holds NaN or Inf.
    """
    dtype = torch.float64 if plan.recipe.dtype == "float64" else torch.float32
    values = model.read(name, *span).to(device=device, dtype=dtype)
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


def _call(
    plan: Plan, tensor: PlannedTensor, models: torch.Tensor, base: torch.Tensor | None, extra: Mapping[str, Any]
) -> torch.Tensor:
    planning = {p.name for p in plan.method.parameters if p.planning}
    arguments = {name: value for name, value in tensor.parameters.items() if name not in planning}
    if base is not None:
        arguments["base"] = base
    if not plan.method.low_rank:
        extra = {name: value for name, value in extra.items() if name not in ("rank", "energy")}
    try:
        return plan.method.function(models=models, **arguments, **extra)
    except DecompositionError as failure:
        raise RuntimeError(
            f"{plan.method.name} failed on tensor '{tensor.name}' (shape {list(tensor.shape)}): {failure}"
        ) from failure


def _copy(plan: Plan, tensor: PlannedTensor, span: tuple[int, int]) -> torch.Tensor:
    """Read a slice to be copied: the base's where it has the tensor, else the first model's."""
    if plan.base is not None and tensor.base_input is not None:
        source, name = plan.base, tensor.base_input
    else:
        i, name = tensor.inputs[0]
        source = plan.models[i]
    if DTYPES[tensor.dtype].is_floating_point:
        return cast(plan, tensor, read_input(plan, source, name, span, torch.device("cpu")))
    return source.read(name, *span).to(DTYPES[tensor.dtype])


def _generator(plan: Plan, tensor: PlannedTensor, model: str, start: int) -> torch.Generator:
    """Seed a generator by recipe seed, tensor, model and position, so that no order of work changes the numbers."""
    words: Sequence[object] = (plan.recipe.seed, tensor.name, model, start)
    digest = hashlib.sha256("|".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
