"""Sizes as people write them."""

from __future__ import annotations

_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``5GB`` or ``200MiB``.

    :raises ValueError: when it is not one.
    """
    cleaned = str(text).strip().lower().replace(" ", "")
    for unit, factor in _UNITS.items():
        number = cleaned.removesuffix(unit)
        if number != cleaned and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return int(float(number) * factor)
    raise ValueError(f"'{text}' is not a size such as 5GB or 200MB")
