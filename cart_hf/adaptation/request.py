"""What is asked for: a recipe or flags, and what they say about learning and about the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cart_hf.recipe import Recipe, recipe_from_flags, refuse_flags, with_examples


def request(
    recipe: Recipe | None,
    settings: Mapping[str, Any],
    parameters: Mapping[str, Any],
    learning: Mapping[str, Any],
    examples: Mapping[str, Any],
) -> Recipe:
    """Return the recipe of an adaptation; None means that a flag was not given.

    :param recipe: what flags about the learning and the inputs change; or None, and ``settings`` say the rest.
    :param settings, parameters: as for :func:`cart_hf.recipe.recipe_from_flags`.
    :param learning: the fields of the recipe's ``adapt`` key.
    :param examples: fields of its ``evaluation`` key; ``tasks`` or ``suite`` takes the place of both.
    :raises UserError: with every problem found.
    """
    learning, examples = (_given(fields) for fields in (learning, examples))
    if recipe is None:
        parts = {"adapt": learning, "evaluation": _from_anywhere(examples) or None}
        return _started(recipe_from_flags({**settings, **parts}, parameters))
    refuse_flags(settings, parameters)
    examples = with_examples(recipe.evaluation, examples)
    known = recipe.adapt.model_dump(exclude_defaults=True) if recipe.adapt is not None else {}
    fields = {name: getattr(recipe, name) for name in Recipe.model_fields}
    fields |= {"adapt": {**known, **learning}, "coefficients": None}
    if examples:
        fields["evaluation"] = _from_anywhere(examples)
    return _started(Recipe.from_mapping(fields))


def static(recipe: Recipe) -> Recipe:
    """Return the merge that an adaptation begins with."""
    return recipe.model_copy(update={"adapt": None, "coefficients": None})


def _started(recipe: Recipe) -> Recipe:
    """Return the recipe with the scale that it is to begin with."""
    if recipe.adapt is None or recipe.adapt.init is None:
        return recipe
    fields = {name: getattr(recipe, name) for name in Recipe.model_fields}
    fields["parameters"] = {**recipe.parameters, "scale": recipe.adapt.init}
    return Recipe.from_mapping(fields)


def _from_anywhere(examples: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with whole paths: the output's recipe keeps them, and is used from other folders."""
    paths = ("tasks_file", "data")
    return {key: str(Path(v).expanduser().resolve()) if key in paths else v for key, v in examples.items()}


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
