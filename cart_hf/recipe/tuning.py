"""Which settings `cart-hf tune` tries, and on which examples: the recipe's `tune:` key."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cart_hf.recipe.benchmark import Selection

Search = Literal["grid", "coordinate"]


class Tuning(BaseModel):
    """A search for a method's settings.

    :param grid: for each parameter the values to try; default: those that the method suggests.
    :param search: ``grid`` tries every combination; ``coordinate`` varies one parameter at a time, from the best point
        so far, until that finds nothing better.
    :param selection: the examples that points are compared on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    search: Search = "grid"
    selection: Selection = Selection()

    @field_validator("grid", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: values if isinstance(values, list | tuple) else (values,) for name, values in value.items()}

    @field_validator("grid")
    @classmethod
    def _values_to_try(cls, value: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        empty = [name for name, values in value.items() if not values]
        if empty:
            raise ValueError(f"{empty[0]}: no values to try")
        return {name: tuple(dict.fromkeys(values)) for name, values in value.items()}
