"""Recipes from flags, as the command line and the Python API give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cart_hf.errors import UserError
from cart_hf.recipe.reference import split_name
from cart_hf.recipe.schema import Recipe


def recipe_from_flags(
    *,
    base: str | None,
    models: Sequence[str],
    method: str = "cart",
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    **other: Any,
) -> Recipe:
    """Build a recipe as the command line does: ``models`` are ``[NAME=]REF``.

    :param parameters: the method's parameters; None values are left out.
    :param other: further recipe keys (dtype, include ...); None values are left out.
    :raises UserError: with every problem found.
    """
    if weights is not None and len(weights) != len(models):
        raise UserError(f"--weights: {len(weights)} values for {len(models)} models; give one for each")
    entries = []
    for position, text in enumerate(models):
        name, reference = split_name(text)
        entry: dict[str, Any] = {"model": reference} | ({"name": name} if name else {})
        if weights is not None:
            entry["parameters"] = {"weight": weights[position]}
        entries.append(entry)
    given = {name: value for name, value in (parameters or {}).items() if value is not None}
    data = {"merge_method": method, "base_model": base, "models": entries, "parameters": given, **other}
    return Recipe.from_mapping({key: value for key, value in data.items() if value is not None})
