"""Label names: the same label is written differently by datasets, checkpoints and people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_GENERIC = re.compile(r"(label|class)?[ _-]?\d+", re.IGNORECASE)


def plain(name: str) -> str:
    """Return a label name without case and punctuation: ``not_entailment`` and ``Not entailment`` are one label."""
    return "".join(character for character in str(name).casefold() if character.isalnum())


def are_generic(names: Sequence[str]) -> bool:
    """Whether names say nothing but a number, such as transformers' ``LABEL_0``."""
    return all(_GENERIC.fullmatch(str(name)) for name in names)


def positions(
    names: Sequence[str], among: Sequence[str], aliases: Mapping[str, Sequence[str]] | None = None
) -> list[int] | None:
    """Return for each of ``names`` its position in ``among``, or None unless the two are the same labels.

    :param aliases: other words for a label of ``names``.
    """
    place = {plain(name): position for position, name in enumerate(among)}
    if len(place) != len(among) or len(names) != len(among):
        return None
    found: list[int] = []
    for name in names:
        words = [name, *(aliases or {}).get(name, ())]
        hits = {place[plain(word)] for word in words if plain(word) in place}
        if len(hits) != 1:
            return None
        found.extend(hits)
    return found if len(set(found)) == len(found) else None


def contradict(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether the same name stands at different positions in two lists of labels."""
    place = {plain(name): position for position, name in enumerate(others)}
    return any(place.get(plain(name), position) != position for position, name in enumerate(names))
