"""What is done to the merge method's result: the recipe's `wrap:` key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cart_hf.errors import UserError, did_you_mean
from cart_hf.methods.wrappers import get_wrapper

Wrap = dict[str, dict[str, Any]]
"""The parameters of each wrapper by its name, in the order in which they act."""


def read_wrap(value: Any) -> Wrap:
    """Return wrappers with all their parameters: from a name, a list of names, or a mapping of names to parameters.

    :raises ValueError: with every problem found.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple):
        value = dict.fromkeys(value)
    if not isinstance(value, dict):
        raise ValueError(f"expected wrappers by name, such as {{lines: {{}}}}, not {value!r}")
    problems: list[str] = []
    found = {str(name): _settled(str(name), told, problems) for name, told in value.items()}
    if problems:
        raise ValueError("; ".join(problems))
    return found


def read_flag(texts: list[str]) -> Wrap:
    """Return wrappers from flags: ``NAME``, or ``NAME:KEY=VALUE,KEY=VALUE``.

    :raises UserError: for what is none of these.
    """
    import yaml

    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, _, told = text.partition(":")
        pairs = [pair.partition("=") for pair in told.split(",") if pair]
        if any(not key or not middle for key, middle, _ in pairs):
            raise UserError(f"--wrap {text}: write NAME, or NAME:KEY=VALUE,KEY=VALUE")
        found.setdefault(name, {}).update({key: yaml.safe_load(value) for key, _, value in pairs})
    return found


def with_point(wrap: Wrap, point: Mapping[str, Any]) -> tuple[Wrap, dict[str, Any]]:
    """Divide a point's settings into those of wrappers (``lines.beta``) and those of the method.

    :return: the wrappers with these settings, and the rest.
    """
    told = {name: dict(parameters) for name, parameters in wrap.items()}
    rest: dict[str, Any] = {}
    for key, value in point.items():
        name, dot, parameter = key.partition(".")
        if dot and name in told:
            told[name][parameter] = value
        else:
            rest[key] = value
    return told, rest


def searches(wrap: Wrap) -> dict[str, tuple[Any, ...]]:
    """Return the values that `cart-hf tune` tries of the wrappers' parameters."""
    wrappers = [get_wrapper(name) for name in wrap]
    return {f"{one.name}.{each.name}": each.search for one in wrappers for each in one.parameters if each.search}


def _settled(name: str, told: Any, problems: list[str]) -> dict[str, Any]:
    try:
        wrapper = get_wrapper(name)
    except UserError as failure:
        problems.extend(problem.removeprefix("wrap: ") for problem in failure.problems)
        return {}
    settled: dict[str, Any] = {parameter.name: parameter.default for parameter in wrapper.parameters}
    for key, value in (told or {}).items() if isinstance(told or {}, dict) else [(told, None)]:
        parameter = wrapper.parameter(str(key))
        if parameter is None:
            known = [parameter.name for parameter in wrapper.parameters]
            problems.append(f"{name} has no parameter '{key}'{did_you_mean(str(key), known)}")
            continue
        problem = parameter.problem_with(value) if value is not None else None
        if problem:
            problems.append(f"{name}.{key}: {problem}")
        settled[parameter.name] = value
    return settled
