"""Recipes from flags, as the command line and the Python API give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cart_hf.errors import UserError
from cart_hf.recipe.reference import split_name
from cart_hf.recipe.schema import Recipe


def recipe_from_flags(settings: Mapping[str, Any], parameters: Mapping[str, Any], *, fewest: int = 2) -> Recipe:
    """Build a recipe from flags; None means that a flag was not given.

    :param settings: the recipe's keys, but for ``base``, ``models`` (a list of ``[NAME=]REF``), ``method`` and
        ``weights`` (a number for each model).
    :param parameters: the method's parameters.
    :param fewest: how many models there must be.
    :raises UserError: with every problem found.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    models, weights = given.pop("models", []), given.pop("weights", None)
    if not models:
        raise UserError("nothing to merge: give a recipe, or --base and --models (see cart-hf merge --help)")
    if weights is not None and len(weights) != len(models):
        raise UserError(f"--weights: {len(weights)} values for {len(models)} models; give one for each")
    entries = []
    for position, text in enumerate(models):
        name, reference = split_name(text)
        entry: dict[str, Any] = {"model": reference} | ({"name": name} if name else {})
        if weights is not None:
            entry["parameters"] = {"weight": weights[position]}
        entries.append(entry)
    data: dict[str, Any] = {
        "merge_method": given.pop("method", "cart"),
        "models": entries,
        "parameters": {name: value for name, value in parameters.items() if value is not None},
    }
    if "base" in given:
        data["base_model"] = given.pop("base")
    return Recipe.from_mapping(data | given, fewest=fewest)


def refuse_flags(settings: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Refuse flags beside a recipe file: what of the two counts would be a guess.

    :raises UserError: naming them.
    """
    given = [name for name, value in {**settings, **parameters}.items() if value is not None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{flags}: with a recipe file, edit the recipe instead")
