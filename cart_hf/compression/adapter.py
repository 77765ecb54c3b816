"""Writing one task's adapter: factors, biases, and what is restored whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cart_hf.compression.config import adapter_config
from cart_hf.compression.outline import Outline, Target
from cart_hf.errors import UserError
from cart_hf.linalg.low_rank import Factors
from cart_hf.merging.reading import is_finite, refuse_broken
from cart_hf.plan import PlannedTensor
from cart_hf.plan.model import CHUNK
from cart_hf.recipe import Reference
from cart_hf.sources import DTYPES, Checkpoint
from cart_hf.sources.layout import ADAPTER_PREFIX, ADAPTER_WEIGHTS


@dataclass(frozen=True)
class Centre:
    """What the adapters are added to.

    :param checkpoint: the average that was written, or the base.
    :param is_base: whether it is the base.
    """

    checkpoint: Checkpoint
    is_base: bool

    def name_of(self, tensor: PlannedTensor) -> str | None:
        """Return a planned tensor's name in it."""
        return tensor.base_input if self.is_base else tensor.name


@dataclass(frozen=True)
class Fit:
    """How well a layer's weight is reproduced.

    :param rank: directions kept.
    :param norm: ``||D||_F`` of what the weight differs from the centre's by.
    :param error: ``||D - B A||_F``: directions left out, and the rounding of the factors.
    """

    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class Adapter:
    """An adapter that was written.

    :param nbytes: size of its weights' file.
    :param layers: how well each layer's weight is reproduced, by module.
    :param left_out: ``||W - centre||_F`` of each tensor that stays the centre's, by name.
    """

    nbytes: int
    layers: Mapping[str, Fit]
    left_out: Mapping[str, float]

    @property
    def error(self) -> float:
        """Relative error over all the layers' weights: 0 is exact, 1 is the centre."""
        whole = math.fsum(fit.norm**2 for fit in self.layers.values())
        return math.sqrt(math.fsum(fit.error**2 for fit in self.layers.values()) / whole) if whole else 0.0


def header_bytes(outline: Outline) -> int:
    """Return what names, types, shapes and offsets take in an adapter's file, at most."""
    names = [f"{target.module}.lora_A.weight" for target in outline.targets] * (3 if outline.biased else 2)
    names += [name for names_ in outline.saved.values() for name in names_]
    return 100 + sum(len(ADAPTER_PREFIX) + len(name) + 80 for name in names)


def write_adapter(
    outline: Outline,
    factors: Mapping[str, Factors],
    centre: Centre,
    folder: Path,
    *,
    base: Reference | str,
    dtype: str,
) -> Adapter:
    """Write a task's adapter.

    ``lora_B lora_A`` is ``left diag(singular) right``, the singular values divided between the two so that neither is
    large.

    :param factors: of each layer's weight, for this model alone, cut to its rank, by module.
    :param centre: what the adapter is added to.
    :param base: the name of the model that people add it to.
    :param dtype: type of the factors; biases are float32, what is restored keeps its type.
    :raises UserError: when a tensor holds NaN or Inf, or the factors do not fit the type.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, Fit] = {}
    ranks: dict[str, int] = {}
    for target in outline.targets:
        parts, layers[target.module] = _factor_tensors(target, factors[target.module], getattr(torch, dtype))
        if target.bias is not None:
            parts["lora_B.bias"] = _difference(outline, centre, target.bias, 0, target.bias.elements)
        if any(bool(part.any()) for part in parts.values()):  # else the layer is the centre's
            tensors |= {f"{ADAPTER_PREFIX}{target.module}.{name}": part for name, part in parts.items()}
            ranks[target.module] = max(1, layers[target.module].rank)
    if not ranks:
        raise UserError(f"{outline.name}: none of its layers differs from the centre's: it needs no adapter")
    for names in outline.saved.values():
        tensors |= {ADAPTER_PREFIX + name: _read(outline.model, source) for name, source in names.items()}
    folder.mkdir(parents=True, exist_ok=True)
    adapter_config(outline, ranks, base).save_pretrained(folder)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    left_out = {tensor.name: _distance(outline, centre, tensor) for tensor in outline.left_out}
    return Adapter((folder / ADAPTER_WEIGHTS).stat().st_size, layers, left_out)


def _factor_tensors(target: Target, factors: Factors, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], Fit]:
    """Return a layer's two factors, named as PEFT names them, and how well they do."""
    norm = math.sqrt(float(factors.squares[0]))
    if not factors.rank:  # PEFT knows no rank below 1, and there may be a bias
        rows, columns = reversed(target.tensor.shape) if target.transposed else target.tensor.shape
        nothing = {
            "lora_A.weight": torch.zeros(1, columns, dtype=dtype),
            "lora_B.weight": torch.zeros(rows, 1, dtype=dtype),
        }
        return nothing, Fit(0, norm, norm)
    root = factors.singular[0].sqrt()
    tall, wide = factors.left[0] * root, root[:, None] * factors.right[0]
    rounded = tall.to(dtype), wide.to(dtype)
    if not all(map(is_finite, rounded)):
        raise UserError(f"layer '{target.module}': its factors do not fit {dtype}; choose --adapter-dtype bfloat16")
    lost = 0.0
    if factors.rank < min(target.tensor.shape):
        lost = max(0.0, float(factors.squares[0]) - float(factors.singular[0].double().square().sum()))
    if dtype != torch.float32:
        lost += _squared_distance((tall, wide), rounded)
    lora_b, lora_a = (rounded[1].T, rounded[0].T) if target.transposed else rounded
    parts = {"lora_A.weight": lora_a.contiguous(), "lora_B.weight": lora_b.contiguous()}
    return parts, Fit(factors.rank, norm, math.sqrt(lost))


def _squared_distance(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return ``||B A - B' A'||_F^2`` from products of thin matrices only: the trace of ``P^T P Q Q^T``."""
    tall = torch.cat([one[0].double(), -other[0].double()], dim=1)
    wide = torch.cat([one[1].double(), other[1].double()])
    return max(0.0, float(((tall.T @ tall) * (wide @ wide.T)).sum()))


def _difference(outline: Outline, centre: Centre, tensor: PlannedTensor, start: int, stop: int) -> torch.Tensor:
    """Return what elements of a model's tensor differ from the centre's by, float32, 1-D."""
    name, there = dict(tensor.inputs)[outline.position], centre.name_of(tensor)
    values = torch.empty(stop - start, dtype=torch.float32)
    outline.model.read_into(values, name, start)
    refuse_broken(values, outline.model, name)
    return values if there is None else values - centre.checkpoint.read(there, start, stop).float()


def _distance(outline: Outline, centre: Centre, tensor: PlannedTensor) -> float:
    starts = range(0, tensor.elements, CHUNK)
    parts = (_difference(outline, centre, tensor, start, min(start + CHUNK, tensor.elements)) for start in starts)
    return math.sqrt(math.fsum(float(part.double().square().sum()) for part in parts))


def _read(model: Checkpoint, name: str) -> torch.Tensor:
    stored = model.tensors[name].stored
    values = model.read(name).view(stored.shape)
    if DTYPES[stored.dtype].is_floating_point:
        refuse_broken(values, model, name)
    return values
