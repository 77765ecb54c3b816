"""Tensors as runs: a model's layers by number, and what lies before, between and after them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

_NUMBERED = re.compile(r"(.+?)\.(\d+)(?:\.(.+))?")


class Block(NamedTuple):
    """Neighbouring tensors of one layer, or of one module outside the layers.

    :param path: the list that the layer is in, such as ``encoder.layer``; of others the module's name.
    :param number: the layer's; None outside the layers.
    :param start: the place of the first tensor.
    :param names: what the tensors are called within it; empty for the block itself.
    """

    path: str
    number: int | None
    start: int
    names: tuple[str, ...]

    @property
    def end(self) -> int:
        """The place after the last tensor."""
        return self.start + len(self.names)


def in_order(names: Sequence[str]) -> list[str]:
    """Return names with the layers of each list by their numbers: 2 before 10; all else stays in its place."""
    places: dict[str, tuple[int, int]] = {}
    firsts: dict[str, int] = {}
    for place, name in enumerate(names):
        match = _NUMBERED.fullmatch(name)
        places[name] = (firsts.setdefault(match[1], place), int(match[2])) if match else (place, 0)
    return sorted(names, key=places.__getitem__)


def blocks_of(names: Sequence[str]) -> list[Block]:
    """Cut names into blocks.

    :param names: see :func:`in_order`.
    """
    lists = {match[1] for match in map(_NUMBERED.fullmatch, names) if match}
    found: list[Block] = []
    parts = [_parts(name, lists) for name in names]
    for (path, number), members in groupby(parts, key=lambda part: part[:2]):
        start = found[-1].end if found else 0
        found.append(Block(path, number, start, tuple(inner for *_, inner in members)))
    return found


def stretches(blocks: Sequence[Block]) -> list[tuple[str, int, int]]:
    """Return where layers of one list lie beside each other: its path, the first place, the place after the last."""
    runs = [list(run) for _, run in groupby(blocks, key=lambda block: block.number is not None and block.path)]
    return [(run[0].path, run[0].start, run[-1].end) for run in runs if run[0].number is not None]


def _parts(name: str, lists: set[str]) -> tuple[str, int | None, str]:
    """Return a tensor's path, layer and name within it.

    :param lists: the paths of all layers: in CLIP's ``vision_model.embeddings.…`` the module beside them is
        ``embeddings``.
    """
    match = _NUMBERED.fullmatch(name)
    if match:
        return match[1], int(match[2]), match[3] or ""
    first, *rest = name.split(".")
    above = ""
    while rest and any(path.startswith(f"{above}{first}.") for path in lists):
        above += f"{first}."
        first, *rest = rest
    return first, None, ".".join(rest)
