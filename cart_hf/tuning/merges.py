"""Merged models of many settings, one after the other, without merging for each.

Where a method's result is a line in its scale, models that differ in their scale alone lie on a line,

    W(s) = W(0) + s (W(1) - W(0)),

so two merges give all of them. The lines of a low-rank method share one decomposition, which is kept on disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cart_hf.api import merge, plan_merge
from cart_hf.methods import get_method
from cart_hf.parallel import Progress
from cart_hf.recipe import Recipe, Trial
from cart_hf.sources import DTYPES
from cart_hf.sources.weights import SafetensorsFile

_BLOCK = 2**18  # elements that are mixed at a time: they stay in the core's cache


class Merges:
    """A folder in which one merged model after the other is made.

    :param folder: for the model, and for the ends of the line that it lies on; it may hold what an earlier run left.
    :param factors: arguments of a merge that say where factors are kept, by a low-rank method.
    :param device, workers: as for :func:`cart_hf.merge`.
    """

    def __init__(self, folder: Path, factors: Mapping[str, Any], device: str, workers: int | None) -> None:
        self._folder, self._options = folder, {"device": device, "workers": workers, **factors}
        self._centre: str | None = None
        self._line: str | None = None
        self._types: Mapping[str, torch.dtype] = {}
        self._moving: set[str] | None = None  # None: not known yet

    def make(self, recipe: Recipe, progress: Progress | None = None) -> Path:
        """Return the folder of a merged model; the next call overwrites it.

        On a line its weights are stored as float32, rounded to the type that the merge itself would store.
        """
        model, scale = self._folder / "model", recipe.parameters.get("scale")
        if not get_method(recipe.merge_method).line or recipe.wrap or not isinstance(scale, int | float):
            self._centre = self._line = None
            self._merge(recipe, model, progress)
            return model
        self._draw_line(recipe, model, progress)
        moved: set[str] = set()
        for name in _weight_files(model):
            ends = self._folder / "start" / name, self._folder / "end" / name
            moved |= _mix(*ends, model / name, scale, self._types, self._moving)
        self._moving = moved  # the others stay as they are, all along the line
        return model

    def _draw_line(self, recipe: Recipe, model: Path, progress: Progress | None) -> None:
        """Make both ends of the line, unless they are there: all lines of one centre start there."""
        start, end = (_at_scale(recipe, scale) for scale in (0.0, 1.0))
        line, centre = end.to_yaml(), _centre_of(recipe)
        if self._line == line:
            return
        self._line = self._moving = None
        if self._centre != centre:
            self._centre = None
            self._merge(start, model, progress)
            _keep_weights(model, self._folder / "start")
            self._centre = centre
        self._merge(end, model, progress)
        _keep_weights(model, self._folder / "end")
        self._types = {tensor.key: DTYPES[tensor.dtype] for tensor in plan_merge(recipe).tensors}
        self._line = line

    def _merge(self, recipe: Recipe, output: Path, progress: Progress | None) -> None:
        merge(recipe, output=output, overwrite=True, progress=progress, **self._options)


def kept_factors(trials: Sequence[Trial], folder: str | Path) -> dict[str, Any]:
    """Say where the factors of trials are kept, up to the largest rank of any, as arguments of a merge."""
    ratios = [point.get("rank_ratio") for trial in trials for point in trial.points]
    largest = max((ratio for ratio in ratios if isinstance(ratio, float | int)), default=None)
    return {"factors": folder, "factors_rank_ratio": largest}


def _at_scale(recipe: Recipe, scale: float) -> Recipe:
    """Return the recipe with another scale, stored without rounding to a half type."""
    return recipe.model_copy(
        update={
            "parameters": {**recipe.parameters, "scale": scale},
            "dtype": _arithmetic(recipe),
            "out_dtype": "float32",
        }
    )


def _arithmetic(recipe: Recipe) -> str:
    return "float64" if recipe.dtype == "float64" else "float32"


def _centre_of(recipe: Recipe) -> str:
    """Return what the model at scale 0 depends on: the average or the base, where a method has a line."""
    own = [entry.parameters.get("weight") for entry in recipe.models]
    return json.dumps([recipe.merge_method, recipe.parameters.get("weight"), own])


def _weight_files(folder: Path) -> list[str]:
    """Return the names of a merged folder's weight files; the heads of its tasks lie deeper."""
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _keep_weights(model: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in _weight_files(model):
        shutil.copyfile(model / name, folder / name)


def _mix(
    start: Path, end: Path, model: Path, scale: float, types: Mapping[str, torch.dtype], keys: Collection[str] | None
) -> set[str]:
    """Write ``start + scale (end - start)`` over the floating tensors of ``model``, a file laid out as ``end`` is.

    :param types: each tensor's type, to which it is rounded before it is stored as float32.
    :param keys: the tensors to write; None: all.
    :return: those that differ between start and end.
    """
    zero, one = SafetensorsFile.open(start), SafetensorsFile.open(end)
    moved: set[str] = set()
    buffers = torch.empty(2, _BLOCK)
    with model.open("r+b") as out:
        data_start = 8 + int.from_bytes(out.read(8), "little")
        for key, stored in one.tensors.items():
            # not an integer buffer, or a head that is carried along
            if stored.dtype != "F32" or (keys is not None and key not in keys):
                continue
            out.seek(data_start + stored.start)
            for first in range(0, stored.elements, _BLOCK):
                here, there = buffers[:, : min(_BLOCK, stored.elements - first)]
                zero.read_into(here, key, first)
                one.read_into(there, key, first)
                if bool(there.sub_(here).any()):
                    moved.add(key)
                mixed = there.mul_(scale).add_(here)
                out.write(mixed.to(types.get(key, torch.float32)).float().numpy().data)
    return moved
