"""Coefficients that were learnt for a merge: their file, and what they are about in a plan.

The file has a float32 tensor for each merged tensor (or fused group), by its name: a coefficient for each task, in the
order that the metadata gives. Of a decomposed matrix there may also be the directions that are kept of each task, and
of a task the tensors of its head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from cart_hf.errors import UserError, did_you_mean, shorten

_FORMAT, _MASK, _HEAD = "cart-hf coefficients 1", "mask/", "head/"
ABOUT = "cart_hf"  # the one key of the metadata: safetensors writes several in no certain order


def as_float32(values: Sequence[float]) -> tuple[float, ...]:
    """Round coefficients to the type they are kept in."""
    return tuple(torch.tensor(values, dtype=torch.float32).tolist())


@dataclass(frozen=True)
class Learnt:
    """What was learnt for one tensor (or fused group).

    :param values: a coefficient for each of the models that have it, in the order of its inputs; float32.
    :param mask: which directions of each are kept, bool, shape (models, k); None: as many as the plan says.
    """

    values: tuple[float, ...]
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of a merge.

    :param method: the method that they are of.
    :param tasks: the names of the models, in the order of the values.
    :param values: for each tensor (or fused group) float32, shape (tasks,).
    :param masks: for some matrices bool, shape (tasks, k).
    :param heads: the tensors of the heads that were learnt, by task and name.
    :param record: how they were learnt, as ``merge.json`` tells it.
    """

    method: str
    tasks: tuple[str, ...]
    values: Mapping[str, torch.Tensor]
    masks: Mapping[str, torch.Tensor]
    heads: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """A name for exactly these."""
        return hashlib.sha256(save(self._tensors()) + json.dumps([self.method, self.tasks]).encode()).hexdigest()

    def of(self, name: str, models: tuple[str, ...]) -> Learnt | None:
        """Return what was learnt for a tensor (or fused group), or None.

        :param models: the names of the models that have it.
        """
        values = self.values.get(name)
        if values is None:
            return None
        places = [self.tasks.index(model) for model in models]
        mask = self.masks.get(name)
        return Learnt(tuple(values[places].tolist()), None if mask is None else mask[places])

    def save(self, path: Path) -> None:
        """Write the file."""
        about = {"format": _FORMAT, "method": self.method, "tasks": self.tasks, "record": self.record}
        save_file(self._tensors(), path, {ABOUT: json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> Coefficients:
        """Read the file.

        :raises UserError: when it is not there, or something else.
        """
        where = f"coefficients: {path}"
        try:
            with safe_open(path, "pt") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
        except (OSError, SafetensorError) as failure:
            reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else failure
            raise UserError(f"{where}: {reason}") from failure
        if about.get("format") != _FORMAT:
            raise UserError(f"{where} is no file of coefficients (`cart-hf adapt` writes them)")
        values = {name: tensor for name, tensor in tensors.items() if not name.startswith((_MASK, _HEAD))}
        masks = {name.removeprefix(_MASK): t.bool() for name, t in tensors.items() if name.startswith(_MASK)}
        heads: dict[str, dict[str, torch.Tensor]] = {}
        for name in (name for name in tensors if name.startswith(_HEAD)):
            task, _, own = name.removeprefix(_HEAD).partition("/")
            heads.setdefault(task, {})[own] = tensors[name]
        for name, value in values.items():
            if value.shape != (len(about["tasks"]),) or not value.is_floating_point():
                raise UserError(f"{where}: '{name}' has not one number for each of the {len(about['tasks'])} models")
            if not bool(torch.isfinite(value).all()):
                raise UserError(f"{where}: those of '{name}' are not finite numbers")
        return cls(about["method"], tuple(about["tasks"]), values, masks, heads, about["record"])

    def problems(self, method: str, models: list[str], names: list[str]) -> list[str]:
        """Say why they are not those of a merge.

        :param method: its method.
        :param models: the names of its models.
        :param names: the names of its tensors and fused groups.
        """
        if self.method != method:
            return [f"coefficients: they were learnt for {self.method}, the recipe's method is {method}"]
        if set(self.tasks) != set(models):
            told = f"{shorten(sorted(self.tasks))}, the recipe has {shorten(sorted(models))}"
            return [f"coefficients: they were learnt for the models {told}"]
        unknown = next((name for name in self.values if name not in set(names)), None)
        if unknown is not None:
            return [f"coefficients: the merge has no tensor '{unknown}'{did_you_mean(unknown, names)}"]
        return []

    def _tensors(self) -> dict[str, torch.Tensor]:
        masks = {f"{_MASK}{name}": mask.to(torch.uint8).contiguous() for name, mask in self.masks.items()}
        heads = {f"{_HEAD}{task}/{name}": t.contiguous() for task, own in self.heads.items() for name, t in own.items()}
        return {**{name: value.contiguous() for name, value in self.values.items()}, **masks, **heads}
