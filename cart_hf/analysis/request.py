"""What is asked for: a recipe or flags, and what they say about the examples that a model's layers see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cart_hf.recipe import Evaluation, Recipe, recipe_from_flags, refuse_flags, with_examples

INPUTS = 32  # of each task and layer: on so few the theorem is looked at, and the models need not read much


def request(
    recipe: Recipe | None, settings: Mapping[str, Any], parameters: Mapping[str, Any], examples: Mapping[str, Any]
) -> Recipe:
    """Return the recipe of an analysis; None means that a flag was not given.

    :param recipe: what flags about the examples change; or None, and ``settings`` say the rest.
    :param settings, parameters: as for :func:`cart_hf.recipe.recipe_from_flags`.
    :param examples: fields of its ``evaluation`` key; ``tasks`` or ``suite`` takes the place of both.
    :raises UserError: with every problem found.
    """
    if recipe is None:
        recipe = recipe_from_flags(settings, parameters)
    else:
        refuse_flags(settings, parameters)
    given = {name: value for name, value in examples.items() if value is not None}
    if not given:
        return recipe
    return recipe.model_copy(update={"evaluation": Evaluation.from_flags(with_examples(recipe.evaluation, given))})


def inputs_wanted(inputs: int | None, examples: Mapping[str, Any]) -> int:
    """Return how many inputs of each task and layer the theorem is checked on: none, unless something is said of them.

    :param inputs: how many; None: a few, where examples are named.
    """
    if inputs is not None:
        return inputs
    return INPUTS if any(value is not None for value in examples.values()) else 0
