"""Doing to a merged matrix what the recipe's wrappers do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cart_hf.merging.known import Known
from cart_hf.merging.reading import read_base, read_group
from cart_hf.plan import Group, Plan


def wrapped(plan: Plan, group: Group, merged: torch.Tensor, device: torch.device, known: Known) -> torch.Tensor:
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
            with naming(wrapper.name, group):
                if first.transposed:
                    merged = wrapper.matrix(merged=merged.mT, base=base.mT, models=models.mT, **parameters).mT
                else:
                    merged = wrapper.matrix(merged=merged, base=base, models=models, **parameters)
    rows = [merged.new_full((tensor.shape[0], 1), scale) for tensor, scale in zip(group.tensors, scales, strict=True)]
    return torch.lerp(base, merged, torch.cat(rows))


@contextmanager
def naming(name: str, group: Group) -> Iterator[None]:
    """Say what failed, and where, when a decomposition does."""
    from cart_hf.linalg.gram import DecompositionError  # here: element-wise work does without SciPy

    try:
        yield
    except DecompositionError as failure:
        raise RuntimeError(
            f"{name} failed on tensor '{group.name}' (shape {list(group.shape)}): {failure}"
        ) from failure
