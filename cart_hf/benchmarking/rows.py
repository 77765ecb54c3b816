"""The rows of a benchmark's table, and which there are for a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cart_hf.evaluation.results import Results
from cart_hf.methods import all_methods, get_method
from cart_hf.methods.wrappers import get_wrapper
from cart_hf.recipe import Recipe, Trial
from cart_hf.recipe.benchmark import usual_name

PRETRAINED, INDIVIDUAL = "pretrained", "individual"
COMPRESS = "compress"
"""What stands for the method in the rows of CART-Indexing, TSV-C and EMR-Merging: the verb that makes them."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    :param name: what people call it.
    :param method: the merge method, or ``compress``; None for the pretrained and the individual models.
    :param parameters: the settings that were scored.
    :param on_edge: those that lie on the edge of their grid: a wider one may do better.
    :param results: every task's result.
    :param points: what was tried, with each one's average on the selection split.
    :param nbytes: bytes of weights for all tasks together; None where sizes are not compared.
    """

    name: str
    method: str | None
    parameters: Mapping[str, Any]
    on_edge: Sequence[str]
    results: Results
    points: Sequence[Mapping[str, Any]] = ()
    nbytes: int | None = None


def trials_of(recipe: Recipe) -> list[Trial]:
    """Return the methods that the recipe lists; without a list its own, and every other with its defaults."""
    if recipe.benchmark is not None:
        return list(recipe.benchmark.methods)
    name = usual_name(recipe.merge_method, recipe.wrap, adapted=False)
    own = Trial(method=recipe.merge_method, name=name, parameters=recipe.parameters, wrap=recipe.wrap)
    others = [
        Trial(method=name, name=name)
        for name, method in all_methods().items()
        if name != own.method
        and (recipe.base_model is not None or not method.needs_base)
        and method.model_count in (None, len(recipe.models))
        and method.calibration is None  # running every model on its data takes long: who wants it names it
    ]
    return [*others, own]


def display_name(trial: Trial) -> str:
    """Return what people call a row: its own name, or else its method's, with its wrappers."""
    method, adapted = get_method(trial.method), trial.adapt is not None
    suffix = usual_name("", trial.wrap, adapted=adapted)
    if trial.method in method.presets or trial.name.removesuffix(suffix) not in (trial.method, method.name):
        return trial.name
    return usual_name(method.title, [get_wrapper(name).title for name in trial.wrap], adapted=adapted)


def settings_text(parameters: Mapping[str, Any]) -> str:
    """Return settings for people: ``rank_ratio 0.08, scale 1.5``."""
    return ", ".join(f"{name} {value}" for name, value in parameters.items())
