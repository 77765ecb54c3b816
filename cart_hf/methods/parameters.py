"""What a merge method may be told: its parameters, declared as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Value = float | int | bool | str


@dataclass(frozen=True)
class Parameter:
    """One parameter of a merge method.

    :param name: its key in a recipe.
    :param default: the value used when a recipe is silent; None when there is none (one of a `one_of` group).
    :param help: one line for people.
    :param kind: ``number``, ``integer``, ``boolean`` or ``choice``.
    :param low, high: closed bounds; ``above`` is an open lower bound.
    :param choices: the allowed words of a ``choice``.
    :param per_model: whether each model may have its own value (``models[].parameters``).
    :param aliases: other names, e.g. those mergekit uses.
    :param weighted_default: the default once a recipe gives ``weight`` explicitly, as mergekit's files do.
    :param planning: True when it is used up before the arithmetic (to choose a rank, say) and not passed on.
    :param search: values that `cart-hf tune` tries where the recipe names none, in order.
    """

    name: str
    default: Value | None
    help: str
    kind: str = "number"
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    per_model: bool = False
    aliases: tuple[str, ...] = ()
    weighted_default: Value | None = None
    planning: bool = False
    search: tuple[Value, ...] = ()

    def problem_with(self, value: Any) -> str | None:
        """Say what is wrong with one scalar ``value``, or None."""
        if self.kind == "boolean":
            return None if isinstance(value, bool) else f"must be true or false, not {value!r}"
        if self.kind == "choice":
            return None if value in self.choices else f"must be one of {', '.join(self.choices)}, not {value!r}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            hint = "; YAML reads 1e-5 as a word, write 1.0e-5" if _is_number(value) else ""
            return f"must be a number, not {value!r}{hint}"
        if not math.isfinite(value):
            return f"must be a finite number, not {value!r}"
        if self.kind == "integer" and value != int(value):
            return f"must be a whole number, not {value!r}"
        if self.above is not None and not value > self.above:
            return f"must be greater than {self.above:g}, not {value!r}"
        if self.low is not None and value < self.low:
            return f"must be at least {self.low:g}, not {value!r}"
        if self.high is not None and value > self.high:
            return f"must be at most {self.high:g}, not {value!r}"
        return None


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


WEIGHT = Parameter("weight", 1.0, "relative weight of each model", per_model=True)
