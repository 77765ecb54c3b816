"""Checking a recipe before and beside its schema: every problem is noted, with its key and a suggestion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cart_hf.errors import UserError, did_you_mean
from cart_hf.methods import Method, get_method
from cart_hf.recipe.settings import scalars

UNSUPPORTED = {
    "slices": "stacking layer ranges",
    "modules": "merging sub-modules separately",
    "tokenizer": "tokenizer surgery",
    "chat_template": "replacing chat templates",
    "name": "multi-stage merges (mergekit-multi)",
}
IGNORED_PARAMETERS = {"int8_mask"}  # mergekit's memory hint: it changes no number, so a file with it runs as it is


def unsupported(data: Mapping[str, Any]) -> list[str]:
    """Return a problem for each part of mergekit that we lack, by name."""
    return [
        f"{key}: {what} is valid mergekit, but cart-hf does not support it (use mergekit-yaml)"
        for key, what in UNSUPPORTED.items()
        if key in data
    ]


def explain(error: Mapping[str, Any], keys_at: Callable[[tuple[int | str, ...]], Iterable[str]]) -> str:
    """Return one line for one of pydantic's errors: where, what, and a suggestion.

    :param keys_at: returns the keys that may stand at a place.
    """
    place = ".".join(f"[{part}]" if isinstance(part, int) else str(part) for part in error["loc"]).replace(".[", "[")
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key{did_you_mean(str(error['loc'][-1]), keys_at(error['loc']))}"
    if error["type"] in ("tuple_type", "list_type"):
        return f"{place}: must be a list"
    if error["type"] == "missing":
        return f"{place}: missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {message[:1].lower() + message[1:] if message.startswith('Input') else message}"


def method_of(data: Mapping[str, Any], problems: list[str]) -> Method | None:
    """Return the recipe's method, or None when it names none that is known (reported)."""
    name = data.get("merge_method")
    if not isinstance(name, str):
        return None  # reported by the schema
    try:
        return get_method(name)
    except UserError as failure:
        problems.extend(failure.problems)
        return None


def check_parameters(data: Mapping[str, Any], method: Method, problems: list[str]) -> None:
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
            problem = parameter_problem(method, str(name), setting, of_a_model)
            if problem:
                problems.append(f"{place}.{name}: {problem}")
        rivals = [name for name in method.one_of if name in given]
        for parameter in method.parameters:
            names = [name for name in (parameter.name, *parameter.aliases) if name in given]
            if len(names) > 1:
                problems.append(f"{place}: {' and '.join(names)} are the same parameter; give one")
        if len(rivals) > 1:
            problems.append(f"{place}: {' and '.join(rivals)} exclude each other; give one")


def parameter_problem(method: Method, name: str, setting: Any, of_a_model: bool = False) -> str | None:
    """Say what is wrong with one parameter's setting (a scalar, a gradient, filters), or None."""
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


def settled_parameters(method: Method, parameters: Mapping[str, Any], *, weighted: bool) -> dict[str, Any]:
    """Return the parameters under the method's own names, with its defaults where the recipe is silent.

    :param weighted: whether the recipe weighs its models.
    """
    settled = canonical(method, parameters)
    for parameter in method.parameters:
        if parameter.name in method.one_of and any(name in settled for name in method.one_of):
            continue
        default = parameter.default
        if weighted and parameter.weighted_default is not None:
            default = parameter.weighted_default
        if default is not None:
            settled.setdefault(parameter.name, default)
    return settled


def canonical(method: Method, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters under the names the method gives them, aliases resolved."""
    known = {name: method.parameter(name) for name in parameters}
    return {parameter.name: parameters[name] for name, parameter in known.items() if parameter is not None}
