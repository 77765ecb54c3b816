"""What is asked for: a recipe, flags, or a recipe and flags about the adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cart_hf.api import resolved_target
from cart_hf.errors import UserError
from cart_hf.output import check_target
from cart_hf.processes import Processes, join
from cart_hf.recipe import Compression, Recipe, recipe_from_flags, refuse_flags
from cart_hf.recipe.compression import Centre


def making_of(recipe: Recipe) -> Compression:
    """Return how a recipe wants its adapters made."""
    return recipe.compress or Compression()


def centre_of(recipe: Recipe) -> Centre:
    """Return what the adapters are added to; a single model's average is itself."""
    return "base" if len(recipe.models) == 1 else making_of(recipe).around


def writes_centre(recipe: Recipe) -> bool:
    """Whether what the adapters are added to is written beside them, with every task's head."""
    return len(recipe.models) > 1 and (centre_of(recipe) == "average" or making_of(recipe).form == "tsv_c")


def begin(output: str | Path, *, device: str, workers: int | None, overwrite: bool) -> tuple[Path, Processes]:
    """Return the output's path and this process, before any work.

    :raises UserError: when the output, the number of workers or of processes is not as it must be.
    """
    target = resolved_target(output)
    check_target(target, overwrite=overwrite)
    if workers is not None and workers < 1:
        raise UserError(f"workers: must be at least 1, not {workers}")
    processes = join(device)
    if processes.count > 1:
        raise UserError("compress runs as one process (it uses every core): start it without a launcher")
    return target, processes


def request(recipe: Recipe | None, settings: Mapping[str, Any], making: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a compression; None means that a flag was not given.

    :param recipe: what flags about the adapters change; or None, and ``settings`` say the rest.
    :param settings: as for :func:`cart_hf.recipe.recipe_from_flags`.
    :param making: the fields of the recipe's ``compress`` key.
    :raises UserError: with every problem found.
    """
    given = {name: value for name, value in making.items() if value is not None}
    if recipe is None:
        return recipe_from_flags({**settings, "compress": given or None}, {}, fewest=1)
    refuse_flags(settings, {})
    if not given:
        return recipe
    try:
        changed = recipe.model_copy(update={"compress": making_of(recipe).changed(given)})
    except ValidationError as failure:
        raise UserError([str(error["msg"]).removeprefix("Value error, ") for error in failure.errors()]) from failure
    fields = {name: getattr(changed, name) for name in Recipe.model_fields}
    return Recipe.from_mapping(fields, fewest=1)  # checks what it says about ranks
