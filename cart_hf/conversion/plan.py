"""What a conversion will write: checked whole, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from cart_hf.conversion.contents import Contents
from cart_hf.conversion.names import Origin, is_text, origin
from cart_hf.conversion.shapes import base_config, check_settings, chosen_activation, deduced_config
from cart_hf.errors import UserError, shorten
from cart_hf.merging.reading import is_finite
from cart_hf.sources import DTYPES, Checkpoint, describe

SHOWN = 3  # problems of one file that are shown


@dataclass(frozen=True)
class Conversion:
    """One open_clip model, about to become transformers'.

    :param contents: the model in its file.
    :param base: the CLIP model that fills what the file lacks, or None.
    :param config: the output's ``config.json``.
    :param origins: for each tensor of the output, in order, where it comes from; None: the base.
    :param shapes: their shapes.
    :param dtype: the output's type.
    :param left_out: the file's tensors that the output has no room for.
    """

    contents: Contents
    base: Checkpoint | None
    config: Mapping[str, Any]
    origins: Mapping[str, Origin | None]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    left_out: tuple[str, ...]

    @property
    def class_name(self) -> str:
        """The class of transformers that the output is of."""
        name: str = self.config["architectures"][0]
        return name

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        size: int = self.config.get("vision_config", self.config)["image_size"]
        return size

    def read(self, slot: str) -> torch.Tensor:
        """Return a tensor of the output.

        :raises UserError: when the file is damaged, or the values are not finite or do not fit the output's type.
        """
        place = self.origins[slot]
        if place is not None:
            where, values = str(self.contents.archive.path), place.take(self._stored(place.name))
        else:
            assert self.base is not None
            where, values = f"the base ({self.base.reference})", self.base.read(slot)
        name = slot if place is None else place.name
        if not is_finite(values):
            raise UserError(f"tensor '{name}' of {where} holds NaN or Inf: the checkpoint is broken; download it again")
        result: torch.Tensor = values.to(self.dtype).reshape(self.shapes[slot]).contiguous()
        if result.dtype != values.dtype and not is_finite(result):
            kind = str(self.dtype).removeprefix("torch.")
            raise UserError(f"tensor '{name}' of {where} does not fit {kind}; choose --dtype float32 or bfloat16")
        return result

    def _stored(self, name: str) -> torch.Tensor:
        return self.contents.archive.read(self.contents.tensors[name])


def plan_conversion(
    contents: Contents, base: Checkpoint | None, *, vision_only: bool, activation: str | None, dtype: str | None
) -> Conversion:
    """Decide where every tensor of the output comes from.

    :param base: a whole CLIP model: its configuration is the output's, and it fills a missing text tower.
    :param vision_only: write the vision tower and its projection, whatever else there is.
    :param activation: the blocks' activation where the file does not say.
    :param dtype: the output's type; default: the file's, the widest where it mixes them.
    :raises UserError: with the first few things that do not fit.
    """
    label = str(contents.archive.path)
    vision_only = vision_only or not (contents.has_text_tower or base is not None)
    if base is None:
        config = deduced_config(contents, chosen_activation(contents, activation), vision_only)
    else:
        check_settings(contents, base, activation)
        config = base_config(base, vision_only)
    config["architectures"] = ["CLIPVisionModelWithProjection" if vision_only else "CLIPModel"]
    slots = describe(config, label).slots
    shapes = {name: slot.shape for name, slot in slots.items()}
    origins = {name: _origin(name, contents, base) for name in shapes}
    problems = _misfits(contents, base, origins, shapes)
    used = {place.name for place in origins.values() if place is not None}
    left_out = tuple(sorted(set(contents.tensors) - used))
    towers = ("visual.",) if vision_only or not contents.has_text_tower else ("visual.", "transformer.")
    surplus = [name for name in left_out if name.startswith(towers)]
    if surplus and not problems:
        room = f"the base ({base.reference})" if base else "transformers' CLIP"
        problems.append(f"{label} has {len(surplus)} tensors that {room} has no room for: {shorten(surplus)}")
    if problems:
        more = [f"{label}: and {len(problems) - SHOWN} more tensors"] if len(problems) > SHOWN else []
        raise UserError(problems[:SHOWN] + more)
    target = getattr(torch, dtype) if dtype else reduce(torch.promote_types, _types(contents, used))
    config["dtype"] = str(target).removeprefix("torch.")
    return Conversion(contents, base, config, origins, shapes, target, left_out)


def _origin(slot: str, contents: Contents, base: Checkpoint | None) -> Origin | None:
    """Return where a slot comes from; a text tower is taken whole from one place."""
    place = origin(slot)
    if base is None or (contents.has_text_tower and is_text(slot)):
        return place
    if is_text(slot) or (slot == "logit_scale" and place.name not in contents.tensors):
        return None
    return place


def _misfits(
    contents: Contents,
    base: Checkpoint | None,
    origins: Mapping[str, Origin | None],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """Say which tensors are missing, or have another shape or type than their slots."""
    room = f"the base ({base.reference})" if base else "the rest of the model"
    problems: dict[str, str] = {}  # by open_clip's name: query, key and value have one
    for slot, place in origins.items():
        if place is None:
            if base is not None and slot not in base.tensors:
                problems[slot] = (
                    f"the base ({base.reference}) lacks tensor '{slot}', and so does {contents.archive.path}"
                )
            continue
        expected, tensor = place.shape(shapes[slot]), contents.tensors.get(place.name)
        where = f"{contents.archive.path}: tensor '{place.name}'"
        if tensor is None:
            problems[place.name] = f"{where} is missing; {room} wants it of shape {list(expected)}"
        elif not tensor.storage.dtype.is_floating_point:
            problems[place.name] = f"{where} holds {tensor.storage.dtype}, not weights".replace("torch.", "")
        elif tensor.shape != expected and not (expected == () and math.prod(tensor.shape) == 1):
            problems[place.name] = f"{where} has shape {list(tensor.shape)}, {room} wants {list(expected)}"
    return list(problems.values())


def _types(contents: Contents, used: set[str]) -> list[torch.dtype]:
    known = set(DTYPES.values())
    return [contents.tensors[name].storage.dtype for name in used if contents.tensors[name].storage.dtype in known]
