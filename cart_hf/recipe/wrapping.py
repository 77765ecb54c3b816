"""What is done to the merge method's result: the recipe's `wrap:` key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cart_hf.errors import UserError, did_you_mean
from cart_hf.methods.wrappers import get_wrapper

Wrap = dict[str, dict[str, Any]]
"""The parameters of each wrapper by its name, in the order in which they act: those of matrices before all others."""


def read_wrap(value: Any) -> Wrap:
    """Return wrappers with all their parameters: from a name, a list of names, or a mapping of names to parameters.

    :raises ValueError: with every problem found.
    """
    problems: list[str] = []
    found = {name: _settled(name, told, problems) for name, told in _by_name(value).items()}
    if problems:
        raise ValueError("; ".join(problems))
    return found


def names_of(value: Any) -> list[str]:
    """Return the names of wrappers in what :func:`read_wrap` reads; none where it would refuse it."""
    try:
        return list(_by_name(value))
    except ValueError:
        return []


def _by_name(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        value = dict.fromkeys(value)
    if not isinstance(value, dict):
        raise ValueError(f"expected wrappers by name, such as {{lines: {{}}}}, not {value!r}")
    return {str(name): told for name, told in value.items()}


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


def as_point(wrap: Wrap) -> dict[str, Any]:
    """Return the wrappers' settings as those of a point."""
    return {f"{name}.{key}": value for name, parameters in wrap.items() for key, value in parameters.items()}


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
    if told is not None and not isinstance(told, dict):
        known = ", ".join(parameter.name for parameter in wrapper.parameters)
        problems.append(f"{name}: expected a mapping of its parameters ({known}), not {told!r}")
        return {}
    settled: dict[str, Any] = {parameter.name: parameter.default for parameter in wrapper.parameters}
    for key, value in (told or {}).items():
        parameter = wrapper.parameter(str(key))
        if parameter is None:
            close = did_you_mean(str(key), [parameter.name for parameter in wrapper.parameters])
            problems.append(f"{name} has no parameter '{key}'{close}")
        elif value is not None:  # which stands for the default
            problem = parameter.problem_with(value)
            if problem:
                problems.append(f"{name}.{key}: {problem}")
            settled[parameter.name] = value
    return settled
