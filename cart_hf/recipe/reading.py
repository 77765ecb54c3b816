"""Reading recipes: every problem found is reported at once, each with its key and a suggestion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from cart_hf.errors import UserError, did_you_mean
from cart_hf.methods import Method, all_methods, get_method
from cart_hf.recipe.reference import split_name
from cart_hf.recipe.schema import UNSUPPORTED, ModelEntry, Recipe
from cart_hf.recipe.settings import scalars

IGNORED_PARAMETERS = {"int8_mask"}  # mergekit's memory hint: it changes no number, so a file with it runs as it is


def recipe_from_mapping(data: Mapping[str, Any]) -> Recipe:
    """Validate a recipe read from YAML.

    :raises UserError: with every problem found.
    """
    problems: list[str] = []
    data = _without_unsupported(dict(data), problems)
    recipe = _validate(data, problems)
    method = _method_of(data, problems)
    if method is not None:
        _check_parameters(data, method, problems)
    if recipe is not None and method is not None:
        recipe = _settle(recipe, method, problems)
    if problems or recipe is None:
        raise UserError(problems)
    return recipe


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
    return recipe_from_mapping({key: value for key, value in data.items() if value is not None})


def _without_unsupported(data: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    for key, what in UNSUPPORTED.items():
        if key in data:
            problems.append(f"{key}: {what} is valid mergekit, but cart-hf does not support it (use mergekit-yaml)")
            data.pop(key)
            if key in ("slices", "modules"):
                data.setdefault("models", [])
    return data


def _validate(data: dict[str, Any], problems: list[str]) -> Recipe | None:
    try:
        return Recipe.model_validate(data)
    except ValidationError as failure:
        for error in failure.errors():
            problems.append(_explain(error))  # type: ignore[arg-type]
        return None


def _explain(error: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors: where, what, and a suggestion."""
    place = ".".join(f"[{part}]" if isinstance(part, int) else str(part) for part in error["loc"]).replace(".[", "[")
    if error["type"] == "extra_forbidden":
        known = Recipe.model_fields if len(error["loc"]) == 1 else ModelEntry.model_fields
        return f"{place}: unknown key{did_you_mean(str(error['loc'][-1]), known)}"
    if error["type"] == "missing":
        return f"{place}: missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {message[:1].lower() + message[1:] if message.startswith('Input') else message}"


def _method_of(data: Mapping[str, Any], problems: list[str]) -> Method | None:
    name = data.get("merge_method")
    if not isinstance(name, str):
        return None  # reported by the schema
    try:
        return get_method(name)
    except UserError as failure:
        problems.extend(failure.problems)
        return None


def _check_parameters(data: Mapping[str, Any], method: Method, problems: list[str]) -> None:
    """Check every parameter of the recipe and of each model against what the method declares."""
    scopes = [("parameters", data.get("parameters"), False)]
    models = data.get("models")
    for position, entry in enumerate(models if isinstance(models, list | tuple) else []):
        if isinstance(entry, Mapping):
            scopes.append((f"models[{position}].parameters", entry.get("parameters"), True))
    for place, given, of_a_model in scopes:
        if not isinstance(given, Mapping):
            continue  # absent, or reported by the schema
        for name, setting in given.items():
            problem = _parameter_problem(method, str(name), setting, of_a_model)
            if problem:
                problems.append(f"{place}.{name}: {problem}")
        rivals = [name for name in method.one_of if name in given]
        if len(rivals) > 1:
            problems.append(f"{place}: {' and '.join(rivals)} exclude each other; give one")


def _parameter_problem(method: Method, name: str, setting: Any, of_a_model: bool) -> str | None:
    if name in IGNORED_PARAMETERS:
        return None
    parameter = method.parameter(name)
    if parameter is None:
        return f"{method.name} has no such parameter{did_you_mean(name, method.parameter_names())}"
    if of_a_model and not parameter.per_model:
        return "applies to the whole merge; move it to the recipe's own parameters"
    try:
        values = list(scalars(setting))
    except ValueError as problem:
        return str(problem)
    return next((p for p in map(parameter.problem_with, values) if p), None)


def _settle(recipe: Recipe, method: Method, problems: list[str]) -> Recipe:
    """Make what the method implies explicit: its canonical names and its defaults; check models against it."""
    models = recipe.models
    if method.needs_base:
        if recipe.base_model is None:
            problems.append(f"base_model: {method.name} works on task vectors and needs the base model")
        # mergekit's files list the base among the models; its own task vector is zero.
        models = tuple(m for m in models if m.model != recipe.base_model)
    if not models:
        problems.append("models: no model to merge")
    elif len(models) == 1:
        problems.append(f"models: only one model ({models[0].model}); a merge needs at least two")
    problems.extend(_duplicate_names(models))
    weighted = any("weight" in scope for scope in (recipe.parameters, *(m.parameters for m in models)))
    parameters = _canonical(recipe.parameters, method)
    for parameter in method.parameters:
        if parameter.name in method.one_of and any(name in parameters for name in method.one_of):
            continue
        default = parameter.default
        if weighted and parameter.weighted_default is not None:
            default = parameter.weighted_default
        if default is not None:
            parameters.setdefault(parameter.name, default)
    models = tuple(m.model_copy(update={"parameters": _canonical(m.parameters, method)}) for m in models)
    return recipe.model_copy(update={"merge_method": method.name, "parameters": parameters, "models": models})


def _canonical(parameters: Mapping[str, Any], method: Method) -> dict[str, Any]:
    known = {name: method.parameter(name) for name in parameters}
    return {parameter.name: parameters[name] for name, parameter in known.items() if parameter is not None}


def _duplicate_names(models: Sequence[ModelEntry]) -> list[str]:
    owners: dict[str, list[str]] = {}
    for entry in models:
        owners.setdefault(entry.name, []).append(str(entry.model))
    return [
        f"models: {' and '.join(places)} are both called '{name}'; give each its own name (NAME=REF)"
        for name, places in owners.items()
        if len(places) > 1
    ]


def method_of(recipe: Recipe) -> Method:
    """Return the recipe's method."""
    return all_methods()[recipe.merge_method]
