"""Which methods a benchmark compares, and what each may choose from: the recipe's `benchmark:` key."""

from __future__ import annotations

import itertools
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Trial(BaseModel):
    """One row of the table: a method, and the settings it may choose from.

    :param method: a registered method.
    :param name: the row's name; default: the method's.
    :param parameters: settings that stay.
    :param grid: for each further parameter the values to try, every combination of them; the best on the selection
        split is scored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"method": data}
        return {**data, "name": data.get("name") or data.get("method")} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _values_to_try(self) -> Trial:
        empty = [name for name, values in self.grid.items() if not values]
        if empty:
            raise ValueError(f"grid.{empty[0]}: no values to try")
        twice = [name for name in self.grid if name in self.parameters]
        if twice:
            raise ValueError(f"{twice[0]}: stands in parameters and in grid; keep one")
        return self

    @property
    def points(self) -> list[dict[str, Any]]:
        """Every combination of settings."""
        combinations = itertools.product(*self.grid.values())
        return [{**self.parameters, **dict(zip(self.grid, values, strict=True))} for values in combinations]

    def on_edge(self, chosen: dict[str, Any]) -> list[str]:
        """Return the parameters whose chosen value lies on the edge of its grid: a wider grid may do better."""
        return [
            name
            for name, values in self.grid.items()
            if len(values) > 1 and chosen.get(name) in (values[0], values[-1])
        ]


class Selection(BaseModel):
    """The examples that settings are chosen on.

    :param split: their split; never the one that is scored.
    :param limit: at most so many of each task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: str = "validation"
    limit: int | None = Field(default=None, gt=0)


class Benchmark(BaseModel):
    """What `cart-hf benchmark` compares.

    :param methods: the rows, besides the pretrained model and the individual ones.
    :param selection: where settings are chosen.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: tuple[Trial, ...]
    selection: Selection = Selection()

    @model_validator(mode="after")
    def _rows_have_names(self) -> Benchmark:
        if not self.methods:
            raise ValueError("methods: name at least one")
        names = [trial.name for trial in self.methods]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"methods: two rows are called '{twice}'; give one a name")
        return self
